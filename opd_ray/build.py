"""The composition root: the one page where a configuration becomes a running system."""

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from opd_ray import roles
from opd_ray.actors.recorded import recordings
from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import ClusterConfig, Config, Placement, RewardPlacement, RolePlacement
from opd_ray.errors import PlacementError
from opd_ray.evaluation import Evaluation
from opd_ray.experience import ExperienceSource, PairSource, RecordedSource, RolloutSource
from opd_ray.facts import facts_of, note_facts, other_versions
from opd_ray.metrics import MetricsLog, mirrors
from opd_ray.pairs.index import PairIndex, index_pairs
from opd_ray.planning import round_bytes, rounds_that_fit
from opd_ray.preflight import FORCED, Prompts, anchored, identity, overlaps, preflight
from opd_ray.prompts import PromptStream
from opd_ray.report.live import Live
from opd_ray.roles import Bases
from opd_ray.rows import TimeBooks
from opd_ray.run import Run
from opd_ray.runtime.clerk import ClerkHost
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import LearnerGroup
from opd_ray.runtime.handle import Backend, WorkerSpec
from opd_ray.runtime.local import LocalBackend
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.scaling import Scaler
from opd_ray.runtime.session import clean
from opd_ray.runtime.usage import Meter
from opd_ray.scoring import FAILURES, Judges, Watch, a_few
from opd_ray.startup import Startup
from opd_ray.storage.run_folder import abandon, claim, write_atomic
from opd_ray.types import Prompt

if TYPE_CHECKING:
    from opd_ray.runtime.telemetry import Telemetry

__all__ = ["build"]

CLERK = "clerk"
NONCE = ".nonce-"
"""Beginning of the name of a file in the run folder, new with each start: workers that find it see the same folder."""
STACK_AFTER = 0.75
"""Part of the heartbeat's timeout after which a wedged worker writes its stacks into its log."""


@contextmanager
def build(
    config: Config,
    folder: Path,
    live: Live,
    *,
    resume: bool = False,
    force: bool = False,
    startup: Startup | None = None,
) -> Iterator[Run]:
    """Check everything that can be checked, claim the folder, start the workers; end them afterwards.

    Args:
        config: the run.
        folder: its run folder.
        live: entered here, so that a refusal is one line and nothing else.
        resume: go on with the run that is there.
        force: also where it was trained otherwise until now, as far as the weights still fit.
        startup: books of the time until the first drawing.

    Raises:
        UserError: what is wrong with the configuration, its files, the folder or the cluster.
    """
    startup = startup or Startup()
    startup.mark("imports")
    folder = folder.resolve()  # as in `anchored`
    algorithm = make_algorithm(config)
    notes: list[str] = []
    train, held_out = preflight(config, algorithm, notes.append)
    pairs = anchored(config).pairs
    data = Data(train, held_out, index_pairs(pairs) if pairs else None)
    startup.mark("checks")
    attempt = claim(folder, identity(config), resume=resume, may_differ=FORCED if force else ())
    config = anchored(config)
    _new_nonce(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    with ExitStack() as failed, live:
        failed.callback(abandon, folder)
        for text in [*notes, *overlaps(train, held_out)]:
            live.note(text)
        if data.pairs is not None:
            live.note(f"pairs: {data.pairs}")
        live.phase("starting Ray" if config.cluster.runtime == "ray" else "starting")
        if config.cluster.runtime == "ray":
            for text in clean():
                live.note(text)
        backend = make_backend(config)
        if config.cluster.runtime == "ray":
            startup.mark("Ray")
        try:
            run = _wire(config, folder, live, backend, algorithm, data, attempt)
            startup.mark("workers and models")
            run.dispatcher.first |= {"rollout": lambda: _started(run, startup)} if algorithm.needs_rollouts else {}
            failed.pop_all()  # it started: the claim stands
            with closing(run.log):
                if resume:
                    run.resume(force=force)
                run.status()
                yield run
        finally:
            backend.close()


def _new_nonce(folder: Path) -> None:
    """A file that no worker has looked for before, so that no cache can know that it is not there."""
    for old in folder.glob(f"{NONCE}*"):
        old.unlink(missing_ok=True)
    name = uuid.uuid4().hex
    write_atomic(folder / f"{NONCE}{name}", name.encode())


def _started(run: Run, startup: Startup) -> None:
    startup.mark("weights, probes and the drawing")
    run.live.note(str(startup))
    note_facts(run.folder, {"startup_seconds": startup.parts})


def make_backend(config: Config) -> Backend:
    """Ray, or this process."""
    if config.cluster.runtime == "local":
        return LocalBackend()
    from opd_ray.runtime.cluster import RayBackend  # a local run does not import Ray

    return RayBackend(object_store_mb=config.cluster.object_store_mb)


@dataclass(frozen=True, slots=True)
class Data:
    """What a run learns from and is judged by, as far as the driver looks at it."""

    train: Prompts
    held_out: Prompts
    pairs: PairIndex | None


@dataclass(frozen=True, slots=True)
class Pools:
    """The elastic roles of a run; None where the algorithm has no use for it."""

    rollout: Pool | None
    teachers: dict[str, Pool]
    judges: Judges | None
    reader: Pool | None
    clerk: Pool | None


def _wire(
    config: Config, folder: Path, live: Live, backend: Backend, algorithm: Algorithm, data: Data, attempt: int
) -> Run:
    cluster = config.cluster
    dispatcher = Dispatcher(backend, call_timeout_s=cluster.call_timeout_s, pause_timeout_s=cluster.start_timeout_s)
    dispatcher.note, dispatcher.logs = live.note, folder / "logs"
    in_store = _rounds_in_store(config, algorithm, backend, live, len(data.train))
    evaluated = bool(data.held_out) and config.evaluated
    bases = Bases(share=config.cluster.share_base)
    reads = roles.reader(config, data.pairs, bases)
    some = a_few(*data.held_out.values(), *data.train.values())
    judged = some if algorithm.needs_rewards or evaluated else None
    pools = _pools(config, folder, dispatcher, algorithm, bases, reads, judged)
    learner = _start(config, folder, dispatcher, live, attempt, bases, pools.clerk)
    watch = Watch(pools.judges.limits if pools.judges is not None else {}, folder / FAILURES, live.note)
    evaluation = None
    if evaluated and pools.rollout is not None and pools.judges is not None:
        evaluation = Evaluation(
            config,
            data.held_out,
            dispatcher,
            rollout=pools.rollout,
            judges=pools.judges,
            watch=watch,
            folder=folder / "samples",
            clerk=pools.clerk,
        )
        evaluation.prove()
    elif config.rewards and not algorithm.needs_rewards:
        live.note("rewards are not used: there is nothing to score without prompts.eval and evaluation.images_per_task")
    facts = facts_of(pools.rollout, pools.teachers, pools.judges, learner)
    if text := other_versions(folder, facts):
        live.note(text)
    note_facts(folder, facts)
    chosen = facts["precision"]
    common = set(chosen.values())
    live.note(f"precision: {common.pop() if len(common) == 1 else ', '.join(map(' '.join, chosen.items()))}")
    telemetry = _telemetry(config, live)
    run = Run(
        config=config,
        folder=folder,
        attempt=attempt,
        algorithm=algorithm,
        dispatcher=dispatcher,
        source=_source(config, algorithm, data, dispatcher, pools),
        learner=learner,
        evaluation=evaluation,
        log=MetricsLog(folder / "metrics.jsonl", [*mirrors(config, folder, live.note), *telemetry]),
        live=live,
        facts=facts,
        scaler=_scaler(config, dispatcher),
        books=TimeBooks(dispatcher, learner),
        watch=watch,
        meter=Meter({pool.spec.role: pool for pool in dispatcher.pools if pool.spec.role != CLERK}),
        watchers=[one.roles for one in telemetry],
        rounds_in_store=in_store,
    )
    dispatcher.tick = run.tick
    return run


def _rounds_in_store(config: Config, algorithm: Algorithm, backend: Backend, live: Live, tasks: int) -> int:
    """How many rounds may be under way at once, so that no node's object store overflows."""
    store, wanted = backend.object_store(), config.cluster.max_staleness + 1
    parts = round_bytes(config, algorithm, tasks) if store is not None else {}
    fit = rounds_that_fit(parts, store.smallest, config.cluster.plasma_fraction) if store is not None else None
    if fit is None:
        return wanted
    if fit < wanted:
        live.note(
            f"cluster.max_staleness {wanted - 1} becomes {fit - 1}: the smallest node's object store has room for "
            f"{fit} rounds of {sum(parts.values()) / 2**20:.0f} MB"
        )
    return min(fit, wanted)


def _telemetry(config: Config, live: Live) -> "list[Telemetry]":
    """Prometheus, where there is a Ray to export it."""
    if config.cluster.runtime == "local":
        return []
    from opd_ray.runtime.telemetry import Telemetry  # imports Ray

    return [Telemetry(config.name, live.note)]


def _scaler(config: Config, dispatcher: Dispatcher) -> Scaler:
    cluster = config.cluster
    local = cluster.runtime == "local"
    limits, pools = {}, [pool for pool in dispatcher.pools if pool.spec.role != CLERK]
    for pool in pools:
        role, _, teacher = pool.spec.role.partition(".")
        placement = {
            "rollout": cluster.rollout,
            "reader": cluster.rollout,
            "teacher": cluster.of_teacher(teacher or "default"),
            "reward": cluster.of_reward(teacher or "default"),
        }[role]
        if placement.autoscale is not None and not local:
            limits[pool.spec.role] = placement.autoscale
    fixed = "this run is in one process (runtime: local), so there is nothing to scale" if local else ""
    return Scaler({pool.spec.role: pool for pool in pools}, limits, fixed=fixed)


def _pools(
    config: Config,
    folder: Path,
    dispatcher: Dispatcher,
    algorithm: Algorithm,
    bases: Bases,
    reads: Any,
    judged: list[Prompt] | None,
) -> Pools:
    """``judged``: some of the prompts whose pictures are scored; None where none are."""
    cluster = config.cluster

    def pool(
        role: str, placement: RolePlacement, factory: Any, teachers: tuple[str, ...] = (), *, home: bool = False
    ) -> Pool:
        own = placement if isinstance(placement, RewardPlacement) else RewardPlacement()
        made = Pool(
            dispatcher.backend,
            replace(_spec(role, placement, factory, folder, cluster), home=home, runtime_env=own.runtime_env),
            placement.workers,
            clock=time.monotonic,
            start_timeout_s=cluster.start_timeout_s,
            call_timeout_s=own.deadline_s or cluster.call_timeout_s,
            beat_timeout_s=cluster.heartbeat_timeout_s,
            teachers=teachers,
        )
        dispatcher.pools.append(made)
        return made

    return Pools(
        rollout=pool("rollout", cluster.rollout, roles.rollout(config, algorithm, bases))
        if judged is not None or not reads
        else None,
        teachers=_teacher_pools(config, pool, bases) if algorithm.needs_teachers else {},
        judges=roles.judges(config, dispatcher, pool, judged) if judged is not None else None,
        reader=pool("reader", cluster.rollout, reads) if reads else None,
        clerk=pool(CLERK, RolePlacement(resources={"cpu": 0}), ClerkHost, home=True)
        if cluster.storage == "ship" and cluster.runtime == "ray"
        else None,
    )


def _start(
    config: Config, folder: Path, dispatcher: Dispatcher, live: Live, attempt: int, bases: Bases, clerk: Pool | None
) -> LearnerGroup:
    """Start the learner and everything that is in the pools; wait until all of it is up."""
    placement, timeout = config.cluster.learner, config.cluster.start_timeout_s
    ranks = [
        _spec("learner", placement, roles.learner(config, rank, bases), folder, config.cluster)
        for rank in range(placement.ranks)
    ]
    elastic = [pool.spec for pool in dispatcher.pools for _ in range(pool.size)]
    lack = dispatcher.backend.shortage([*ranks, *elastic])
    if lack and not config.cluster.nodes_may_come:
        raise PlacementError(lack)
    if lack:
        live.note(f"waiting for nodes: {lack}")
    live.phase(f"starting {len(elastic) + len(ranks)} workers")
    if not lack and (taken := dispatcher.backend.shortage([*ranks, *elastic], free=True)):
        live.note(f"waiting up to {timeout:.0f} s for what others, or an old attempt, still hold: {taken}")
    learner = LearnerGroup(
        dispatcher,
        ranks,
        attempt=attempt,
        start_timeout_s=timeout,
        beat_timeout_s=config.cluster.heartbeat_timeout_s,
        sharded=placement.backend != "ddp",
        clerk=clerk,
    )
    dispatcher.wait_ready()
    learner.wait_ready()
    return learner


def _source(config: Config, algorithm: Algorithm, data: Data, dispatcher: Dispatcher, pools: Pools) -> ExperienceSource:
    if pools.reader is not None and config.recorded is not None:
        return RecordedSource(config, algorithm, recordings(config.recorded), dispatcher, pools.reader)
    if pools.reader is not None and data.pairs is not None:
        return PairSource(config, algorithm, data.pairs, dispatcher, pools.reader)
    assert pools.rollout is not None
    stream = PromptStream(data.train, config.seed)
    return RolloutSource(
        config,
        algorithm,
        stream,
        dispatcher,
        rollout=pools.rollout,
        teachers=pools.teachers,
        judges=pools.judges,
    )


def _teacher_pools(config: Config, pool: Any, bases: Bases) -> dict[str, Pool]:
    """One pool for all teachers, or one for each."""
    of = config.cluster.of_teacher
    if config.cluster.share_teachers:
        names = tuple(config.teachers)
        shared: Pool = pool("teacher", of(), roles.teacher(config, names, bases), names)
        return dict.fromkeys(config.teachers, shared)
    return {
        name: pool(f"teacher.{name}", of(name), roles.teacher(config, (name,), bases), (name,))
        for name in config.teachers
    }


def _spec(role: str, placement: Placement, factory: Any, folder: Path, cluster: ClusterConfig) -> WorkerSpec:
    return WorkerSpec(
        role,
        factory,
        placement.threads,
        dict(placement.resources),
        folder / "logs",
        nonce=next((path, path.read_text()) for path in folder.glob(f"{NONCE}*")),
        ship=cluster.storage == "ship",
        stack_after_s=STACK_AFTER * cluster.heartbeat_timeout_s,
    )
