"""The composition root: the one page where a configuration becomes a running system."""

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from opd_ray import roles, world
from opd_ray.actors.recorded import recordings
from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import ClusterConfig, Config, Placement, RolePlacement
from opd_ray.errors import PlacementError, PromptError
from opd_ray.evaluation import Evaluation
from opd_ray.experience import ExperienceSource, RecordedSource, RolloutSource
from opd_ray.metrics import MetricsLog, check_logging, mirrors
from opd_ray.models.base import check_adapters, sigmas_of
from opd_ray.models.checkpoint import check_complete
from opd_ray.models.teachers import check_checkpoint, teacher_model
from opd_ray.planning import check_memory, check_teacher_memory, needs
from opd_ray.prompts import PromptStream, read_prompts
from opd_ray.report.live import Live
from opd_ray.rewards.base import check_rewards
from opd_ray.roles import Bases
from opd_ray.run import Run
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import LearnerGroup
from opd_ray.runtime.handle import Backend, WorkerSpec
from opd_ray.runtime.local import LocalBackend
from opd_ray.runtime.pool import Pool
from opd_ray.startup import Startup
from opd_ray.storage.run_folder import abandon, claim, read_json, write_json_atomic
from opd_ray.types import Prompt

__all__ = ["build", "identity", "preflight"]

Prompts = dict[str, tuple[Prompt, ...]]


@contextmanager
def build(
    config: Config, folder: Path, live: Live, *, resume: bool = False, startup: Startup | None = None
) -> Iterator[Run]:
    """Check everything that can be checked, claim the folder, start the workers; end them afterwards.

    ``live`` is entered here, so that a refusal is one line and nothing else.

    Raises:
        UserError: what is wrong with the configuration, its files, the folder or the cluster.
    """
    startup = startup or Startup()
    startup.mark("imports")
    folder = folder.resolve()  # as in `anchored`
    algorithm = make_algorithm(config)
    train, held_out = preflight(config, algorithm)
    startup.mark("checks")
    attempt = claim(folder, identity(config), resume=resume)
    config = anchored(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    with ExitStack() as failed, live:
        failed.callback(abandon, folder)
        for text in overlaps(train, held_out):
            live.note(text)
        live.phase("starting Ray" if config.cluster.runtime == "ray" else "starting")
        backend = make_backend(config)
        if config.cluster.runtime == "ray":
            startup.mark("Ray")
        try:
            run = _wire(config, folder, live, backend, algorithm, train, held_out, attempt)
            startup.mark("workers and models")
            run.dispatcher.first["rollout"] = lambda: _started(run, startup)
            failed.pop_all()  # it started: the claim stands
            with closing(run.log):
                if resume:
                    run.resume()
                run.status()
                yield run
        finally:
            backend.close()


def _started(run: Run, startup: Startup) -> None:
    startup.mark("weights, probes and the drawing")
    run.live.note(str(startup))
    _note_facts(run.folder, {"startup_seconds": startup.parts})


def preflight(config: Config, algorithm: Algorithm) -> tuple[Prompts, Prompts]:
    """Everything that can be refused before a worker starts; returns training and held-out prompts."""
    check_logging(config)
    prompts = config.prompts
    train = read_prompts(_located(prompts.train), "prompts.train") if prompts else {}
    held_out = read_prompts(_located(prompts.eval), "prompts.eval") if prompts and prompts.eval else {}
    if train:
        config.check_tasks(tuple(train))
    if config.recorded is not None:
        recordings(config.recorded)
    scoring = config.evaluation.images_per_task > 0
    check_rewards(config.rewards, config.evaluation.rewards if scoring else {}, tuple(held_out) if scoring else ())
    algorithm.check(sigmas_of(config.model, config.sampling.steps))
    check_cards(config.cluster)
    if config.cluster.gpu_memory_gb is not None:
        check_memory(config, needs(config))
    check_complete(config.model)
    check_adapters(config.model, config.student.lora, config.teachers)
    for name, teacher in config.teachers.items():
        if teacher.model is not None:
            model = teacher_model(config.model, teacher)
            check_checkpoint(name, config.model, model)
            check_complete(model)
    check_teacher_memory(config)
    return train, held_out


def check_cards(cluster: ClusterConfig) -> None:
    """Refuse a card for a role in this process where there is none; Ray says so of its nodes itself.

    Raises:
        PlacementError: a role asks for one.
    """
    placements = [cluster.rollout, cluster.learner, *cluster.teachers.values(), *cluster.rewards.values()]
    wanted = any(placement.device == "cuda" for placement in placements)
    if wanted and cluster.runtime == "local" and not torch.cuda.is_available():
        raise PlacementError("a role asks for a gpu, and this process sees none; set resources.gpu to 0")


def overlaps(train: Prompts, held_out: Prompts) -> Iterator[str]:
    """A warning for each task whose held-out prompts are also trained on."""
    seen = {prompt.text for prompts in train.values() for prompt in prompts}
    for task, prompts in held_out.items():
        count = sum(prompt.text in seen for prompt in prompts)
        if count:
            yield f"{count} of {len(prompts)} held-out prompts of {task} are also trained on: its scores are too good"


def _located(spec: str | dict[str, str]) -> str | dict[str, str]:
    return {task: _locate(path) for task, path in spec.items()} if isinstance(spec, dict) else _locate(spec)


def _locate(path: str) -> str:
    """A prompt file, or `world/<task>/<split>` of the built-in ones."""
    match path.split("/"):
        case ["world", task, split]:
            try:
                return str(world.prompts_path(task, split))
            except ValueError as error:
                raise PromptError(f"{path}: {error}") from None
    return path


def identity(config: Config) -> dict[str, Any]:
    """What a resumed run must not change. Where it runs, how long and what it reports, and where, may change."""
    free = {"cluster", "rounds", "checkpoint", "evaluation", "logging", "name"}
    if config.optimizer.schedule == "cosine":
        free.remove("rounds")  # the learning rate of every round depends on their number
    if not make_algorithm(config).needs_rewards:
        free.add("rewards")  # they score what was trained, and change nothing of it
    found = config.model_dump(mode="json", exclude=free)
    (found["prompts"] or {}).pop("eval", None)
    return found


def anchored(config: Config) -> Config:
    """Local paths made absolute: workers of a Ray that was there before us have another working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path.partition("/")[0] != "world" and Path(path).exists() else path

    teachers = {
        name: teacher.model_copy(update={"lora" if teacher.lora else "model": absolute(teacher.path)})
        for name, teacher in config.teachers.items()
    }
    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    recorded = absolute(config.recorded) if config.recorded else None
    return config.model_copy(update={"teachers": teachers, "model": model, "recorded": recorded})


def make_backend(config: Config) -> Backend:
    """Ray, or this process."""
    if config.cluster.runtime == "local":
        return LocalBackend()
    from opd_ray.runtime.cluster import RayBackend  # a local run does not import Ray

    return RayBackend(object_store_mb=config.cluster.object_store_mb)


@dataclass(frozen=True, slots=True)
class Pools:
    """The elastic roles of a run; None where the algorithm has no use for it."""

    rollout: Pool | None
    teachers: dict[str, Pool]
    reward: Pool | None
    reader: Pool | None


def _wire(
    config: Config,
    folder: Path,
    live: Live,
    backend: Backend,
    algorithm: Algorithm,
    train: Prompts,
    held_out: Prompts,
    attempt: int,
) -> Run:
    dispatcher = Dispatcher(backend, call_timeout_s=config.cluster.call_timeout_s)
    dispatcher.note = live.note
    evaluated = bool(held_out) and config.evaluation.images_per_task > 0
    bases = Bases(share=config.cluster.share_base)
    pools = _pools(config, folder, dispatcher, algorithm, bases, rewards=algorithm.needs_rewards or evaluated)
    learner = _start(config, folder, dispatcher, live, attempt, bases)
    evaluation = None
    if evaluated and pools.rollout is not None and pools.reward is not None:
        samples = folder / "samples"
        evaluation = Evaluation(
            config, held_out, dispatcher, rollout=pools.rollout, reward=pools.reward, folder=samples
        )
        evaluation.prove()
    elif config.rewards and not algorithm.needs_rewards:
        live.note("rewards are not used: there is nothing to score without prompts.eval and evaluation.images_per_task")
    facts = _facts(pools, learner)
    _note_facts(folder, facts)
    chosen = facts["precision"]
    common = set(chosen.values())
    live.note(f"precision: {common.pop() if len(common) == 1 else ', '.join(map(' '.join, chosen.items()))}")
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        algorithm=algorithm,
        dispatcher=dispatcher,
        source=_source(config, algorithm, train, dispatcher, pools),
        learner=learner,
        evaluation=evaluation,
        log=MetricsLog(folder / "metrics.jsonl", mirrors(config, folder, live.note)),
        live=live,
        facts=facts,
    )
    dispatcher.tick = run.tick
    return run


def _pools(
    config: Config, folder: Path, dispatcher: Dispatcher, algorithm: Algorithm, bases: Bases, *, rewards: bool
) -> Pools:
    cluster = config.cluster

    def pool(role: str, placement: RolePlacement, factory: Any) -> Pool:
        made = Pool(
            dispatcher.backend,
            _spec(role, placement, factory, folder),
            placement.workers,
            clock=time.monotonic,
            start_timeout_s=cluster.start_timeout_s,
            call_timeout_s=cluster.call_timeout_s,
        )
        dispatcher.pools.append(made)
        return made

    recorded = config.recorded
    return Pools(
        rollout=None if recorded else pool("rollout", cluster.rollout, roles.rollout(config, algorithm, bases)),
        teachers=_teacher_pools(config, pool, bases) if algorithm.needs_teachers else {},
        reward=pool("reward", cluster.rewards.get("default", RolePlacement()), roles.reward(config))
        if rewards
        else None,
        reader=pool("reader", cluster.rollout, roles.reader(recorded)) if recorded else None,
    )


def _start(
    config: Config, folder: Path, dispatcher: Dispatcher, live: Live, attempt: int, bases: Bases
) -> LearnerGroup:
    """Start the learner and everything that is in the pools; wait until all of it is up."""
    placement, timeout = config.cluster.learner, config.cluster.start_timeout_s
    ranks = [_spec("learner", placement, roles.learner(config, rank, bases), folder) for rank in range(placement.ranks)]
    elastic = [pool.spec for pool in dispatcher.pools for _ in range(pool.size)]
    lack = dispatcher.backend.shortage([*ranks, *elastic])
    if lack:
        raise PlacementError(lack)
    live.phase(f"starting {len(elastic) + len(ranks)} workers")
    learner = LearnerGroup(dispatcher, ranks, attempt=attempt, start_timeout_s=timeout)
    dispatcher.wait_ready()
    learner.wait_ready()
    return learner


def _source(
    config: Config, algorithm: Algorithm, train: Prompts, dispatcher: Dispatcher, pools: Pools
) -> ExperienceSource:
    if pools.reader is not None and config.recorded is not None:
        return RecordedSource(config, algorithm, recordings(config.recorded), dispatcher, pools.reader)
    assert pools.rollout is not None
    stream = PromptStream(train, config.seed)
    return RolloutSource(
        config,
        algorithm,
        stream,
        dispatcher,
        rollout=pools.rollout,
        teachers=pools.teachers,
        reward=pools.reward,
    )


def _teacher_pools(config: Config, pool: Any, bases: Bases) -> dict[str, Pool]:
    """One pool for all teachers, or one for each."""
    of = config.cluster.of_teacher
    if config.cluster.share_teachers:
        shared: Pool = pool("teacher", of(), roles.teacher(config, tuple(config.teachers), bases))
        return dict.fromkeys(config.teachers, shared)
    return {name: pool(f"teacher.{name}", of(name), roles.teacher(config, (name,), bases)) for name in config.teachers}


def _spec(role: str, placement: Placement, factory: Any, folder: Path) -> WorkerSpec:
    return WorkerSpec(role, factory, placement.threads, dict(placement.resources), folder / "logs")


def _facts(pools: Pools, learner: LearnerGroup) -> dict[str, Any]:
    """Teachers' files with their hashes, what each role computes in, and versions of what computes."""
    found: dict[str, Any] = {}
    for pool in dict.fromkeys(pools.teachers.values()):
        for name, facts in pool.workers[0].facts.items():
            lora = facts.lora
            of_lora = {"tensors": lora.tensors, "rank": lora.rank, "alpha": lora.alpha} if lora else {}
            about = {"path": facts.path, "sha256": facts.sha256, **of_lora, "guidance": facts.guidance}
            found[name] = about | {"precision": facts.precision, "own_text_encoders": facts.own_text}
    precision = {"learner": learner.precision}
    if pools.rollout is not None:
        precision["rollout"] = pools.rollout.workers[0].facts
    precision |= {f"teacher {name}": about["precision"] for name, about in found.items()}
    packages = ("ray", "torch", "diffusers", "transformers", "accelerate", "peft")
    return {
        "teachers": found,
        "precision": precision,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _note_facts(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "run.json"
    write_json_atomic(path, read_json(path) | facts)
