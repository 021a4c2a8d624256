"""The composition root: the one page where a configuration becomes a running system."""

import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from opd_ray import world
from opd_ray.actors import Policy, RewardActor, RolloutActor, TeacherActor
from opd_ray.actors.recorded import RecordedActor, recordings
from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import Config, Placement, RolePlacement
from opd_ray.errors import PlacementError, PromptError
from opd_ray.evaluation import Evaluation
from opd_ray.experience import ExperienceSource, RecordedSource, RolloutSource
from opd_ray.learners import DdpEngine, Learner
from opd_ray.learners.learner import Training
from opd_ray.metrics import MetricsLog
from opd_ray.models.base import check_adapters, load_family, sigmas_of
from opd_ray.prompts import PromptStream, read_prompts
from opd_ray.report.live import Live
from opd_ray.rewards.base import check_rewards, make_rewards
from opd_ray.run import Run
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import LearnerGroup
from opd_ray.runtime.handle import Backend, WorkerSpec
from opd_ray.runtime.hosts import LearnerHost, RecordedHost, RewardHost, RolloutHost, TeacherHost
from opd_ray.runtime.local import LocalBackend
from opd_ray.runtime.pool import Pool
from opd_ray.storage.run_folder import abandon, claim, read_json, write_json_atomic
from opd_ray.types import Prompt

__all__ = ["build", "identity", "preflight"]

Prompts = dict[str, tuple[Prompt, ...]]


@contextmanager
def build(config: Config, folder: Path, live: Live, *, resume: bool = False) -> Iterator[Run]:
    """Check everything that can be checked, claim the folder, start the workers; end them afterwards.

    ``live`` is entered here, so that a refusal is one line and nothing else.

    Raises:
        UserError: what is wrong with the configuration, its files, the folder or the cluster.
    """
    folder = folder.resolve()  # as in `anchored`
    algorithm = make_algorithm(config)
    train, held_out = preflight(config, algorithm)
    attempt = claim(folder, identity(config), resume=resume)
    config = anchored(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    with ExitStack() as failed, live:
        failed.callback(abandon, folder)
        live.phase("starting Ray" if config.cluster.runtime == "ray" else "starting")
        backend = make_backend(config)
        try:
            run = _wire(config, folder, live, backend, algorithm, train, held_out, attempt)
            failed.pop_all()  # it started: the claim stands
            if resume:
                run.resume()
            run.status()
            yield run
        finally:
            backend.close()


def preflight(config: Config, algorithm: Algorithm) -> tuple[Prompts, Prompts]:
    """Everything that can be refused before a worker starts; returns training and held-out prompts."""
    prompts = config.prompts
    train = read_prompts(_located(prompts.train), "prompts.train") if prompts else {}
    held_out = read_prompts(_located(prompts.eval), "prompts.eval") if prompts and prompts.eval else {}
    if train:
        config.check_tasks(tuple(train))
    if config.recorded is not None:
        recordings(config.recorded)
    check_rewards(config.rewards, config.evaluation.rewards, tuple(held_out))
    algorithm.check(sigmas_of(config.model, config.sampling.steps))
    check_adapters(config.model, config.student.lora, config.teachers)
    return train, held_out


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
    """What a resumed run must not change. Where it runs, how long and what it reports may change."""
    free = {"cluster", "rounds", "checkpoint", "evaluation", "name"}
    if config.optimizer.schedule == "cosine":
        free.remove("rounds")  # the learning rate of every round depends on their number
    return config.model_dump(mode="json", exclude=free)


def anchored(config: Config) -> Config:
    """Local paths made absolute: workers of a Ray that was there before us have another working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path.partition("/")[0] != "world" and Path(path).exists() else path

    teachers = {
        name: teacher.model_copy(update={"lora": absolute(teacher.lora)}) for name, teacher in config.teachers.items()
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
    pools = _pools(config, folder, dispatcher, algorithm, rewards=algorithm.needs_rewards or evaluated)
    learner = _start(config, folder, dispatcher, live, attempt)
    evaluation = None
    if evaluated and pools.rollout is not None and pools.reward is not None:
        samples = folder / "samples"
        evaluation = Evaluation(
            config, held_out, dispatcher, rollout=pools.rollout, reward=pools.reward, folder=samples
        )
        evaluation.prove()
    elif config.rewards and not algorithm.needs_rewards:
        live.note("rewards are not used: there is nothing to score without prompts.eval and evaluation.images_per_task")
    facts = _facts(pools.teachers)
    _note_facts(folder, facts)
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        algorithm=algorithm,
        dispatcher=dispatcher,
        source=_source(config, algorithm, train, dispatcher, pools),
        learner=learner,
        evaluation=evaluation,
        log=MetricsLog(folder / "metrics.jsonl"),
        live=live,
        facts=facts,
    )
    dispatcher.tick = run.tick
    return run


def _pools(config: Config, folder: Path, dispatcher: Dispatcher, algorithm: Algorithm, *, rewards: bool) -> Pools:
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
        rollout=None if recorded else pool("rollout", cluster.rollout, _rollout_factory(config, algorithm)),
        teachers=_teacher_pools(config, pool) if algorithm.needs_teachers else {},
        reward=pool("reward", cluster.rewards.get("default", RolePlacement()), _reward_factory(config))
        if rewards
        else None,
        reader=pool("reader", cluster.rollout, _reader_factory(recorded)) if recorded else None,
    )


def _start(config: Config, folder: Path, dispatcher: Dispatcher, live: Live, attempt: int) -> LearnerGroup:
    """Start the learner and everything that is in the pools; wait until all of it is up."""
    placement, timeout = config.cluster.learner, config.cluster.start_timeout_s
    ranks = [
        _spec("learner", placement, partial(LearnerHost, partial(make_learner, config, rank)), folder)
        for rank in range(placement.ranks)
    ]
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


def _teacher_pools(config: Config, pool: Any) -> dict[str, Pool]:
    """One pool for all teachers, or one for each."""
    placements = config.cluster.teachers
    default = placements.get("default", RolePlacement())
    if config.cluster.share_teachers:
        shared: Pool = pool("teacher", default, _teacher_factory(config, tuple(config.teachers)))
        return dict.fromkeys(config.teachers, shared)
    return {
        name: pool(f"teacher.{name}", placements.get(name, default), _teacher_factory(config, (name,)))
        for name in config.teachers
    }


def _spec(role: str, placement: Placement, factory: Any, folder: Path) -> WorkerSpec:
    return WorkerSpec(role, factory, placement.threads, dict(placement.resources), (folder / "logs").resolve())


def _rollout_factory(config: Config, algorithm: Algorithm) -> Any:
    guidances = [config.student.guidance, *(teacher.guidance for teacher in config.teachers.values())]
    policy = Policy(
        lora=config.student.lora,
        adapter="student",
        guidance=config.student.guidance,
        kernel=algorithm.kernel,
        noise_level=algorithm.noise_level,
        seed=config.seed,
        negatives=any(guidance != 1 for guidance in guidances),
    )
    sigmas = tuple(sigmas_of(config.model, config.sampling.steps).tolist())
    return partial(RolloutHost, partial(make_rollout, config, policy, sigmas))


def make_rollout(config: Config, policy: Policy, sigmas: tuple[float, ...]) -> RolloutActor:
    """Text encoders, denoiser and VAE."""
    family = load_family(config.model, text=True, image=True)
    return RolloutActor(family, policy, torch.tensor(sigmas))


def _teacher_factory(config: Config, names: tuple[str, ...]) -> Any:
    return partial(TeacherHost, partial(make_teacher, config, names))


def make_teacher(config: Config, names: tuple[str, ...]) -> TeacherActor:
    """The denoiser alone, with these teachers' LoRAs over it."""
    family = load_family(config.model, text=False, image=False)
    return TeacherActor(family, {name: config.teachers[name] for name in names})


def _reader_factory(folder: str) -> Any:
    return partial(RecordedHost, partial(RecordedActor, folder))


def _reward_factory(config: Config) -> Any:
    return partial(RewardHost, partial(make_reward, config))


def make_reward(config: Config) -> RewardActor:
    """Every reward of the run."""
    return RewardActor(make_rewards(config.rewards))


def make_learner(config: Config, rank: int) -> Learner:
    """The denoiser alone, with the student's adapter over it."""
    family = load_family(config.model, text=False, image=False)
    training = Training(
        lora=config.student.lora,
        guidance=config.student.guidance,
        optimizer=config.optimizer,
        ema=config.ema,
        seed=config.seed,
        rounds=config.rounds,
    )
    return Learner(family, make_algorithm(config), training, DdpEngine(rank, config.cluster.learner.ranks))


def _facts(teachers: Mapping[str, Pool]) -> dict[str, Any]:
    """Teachers' files with their hashes, and versions of what computes."""
    found: dict[str, Any] = {}
    for pool in dict.fromkeys(teachers.values()):
        for name, facts in pool.workers[0].facts.items():
            found[name] = {
                "path": facts.lora.path,
                "sha256": facts.lora.sha256,
                "tensors": facts.lora.tensors,
                "rank": facts.lora.rank,
                "alpha": facts.lora.alpha,
                "guidance": facts.guidance,
            }
    packages = ("ray", "torch", "diffusers", "transformers", "accelerate", "peft")
    return {"teachers": found, "versions": {name: importlib.metadata.version(name) for name in packages}}


def _note_facts(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "run.json"
    write_json_atomic(path, read_json(path) | facts)
