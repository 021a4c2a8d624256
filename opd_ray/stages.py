"""Several runs as the stages of one job: specialists that are trained first, and the student that they then teach.

A stage is an ordinary run in a folder of its own, ``runs/<job>/<specialist>`` or ``runs/<job>/student``. Nothing but
its folder says how far it is, so one that has ended is used again by whoever asks for the same training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from opd_ray.actors.recorded import recordings
from opd_ray.algorithms import make_algorithm
from opd_ray.config import STUDENT, Config, Placement, RolePlacement
from opd_ray.errors import PlacementError, RunFolderError, Stopped, UserError
from opd_ray.experience import recorded_stream
from opd_ray.metrics import rows
from opd_ray.models.base import trained_folder
from opd_ray.pairs.index import index_pairs
from opd_ray.planning.rates import reward_role, teacher_placements
from opd_ray.preflight import FORCED, drawn_prompts, identity, preflight
from opd_ray.prompts import PromptStream
from opd_ray.recipes import specialist
from opd_ray.runtime.handle import Backend, WorkerSpec
from opd_ray.storage.checkpoint import newest
from opd_ray.storage.run_folder import differences, read_json, write_atomic

__all__ = ["Stage", "check", "check_room", "costs", "named", "stages", "standing", "workers"]

SPENT = ("seconds", "core_seconds")
Standing = Literal["new", "begun", "done"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a job."""

    config: Config
    """Its own; its name is that of its folder."""
    folder: Path

    @property
    def name(self) -> str:
        """As messages call it: `specialist text`, or `student`."""
        return STUDENT if self.config.name == STUDENT else f"specialist {self.config.name}"

    @property
    def recipe(self) -> Path:
        """The file that any `opd-ray train` can take in place of the job."""
        return self.folder.with_name(f"{self.config.name}.yaml")

    def progress(self) -> str:
        """How far it is, in words."""
        path = self.folder / "status.json"
        beat = read_json(path) if path.is_file() else {"round": 0, "rounds": self.config.rounds}
        return f"after round {beat['round']} of {beat['rounds']}"

    def write(self, at_once: int) -> None:
        """Write that file, for one of so many runs that share an object store at the same time."""
        data = self.config.model_dump(mode="json")
        data["cluster"]["plasma_fraction"] /= at_once
        self.recipe.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.recipe, yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())


def stages(job: Config, folder: Path) -> tuple[list[Stage], Stage]:
    """The specialists of a job, and the student that learns from what they leave.

    Args:
        job: a configuration with ``specialists``.
        folder: of the job; each stage's is below it.
    """
    folder = folder.resolve()
    first = [Stage(specialist(job, name), folder / name) for name in job.specialists]
    teachers = {
        name: teacher
        if teacher.specialist is None
        else teacher.model_copy(update={"lora": str(folder / teacher.specialist)})
        for name, teacher in job.teachers.items()
    }
    config = job.model_copy(update={"name": STUDENT, "teachers": teachers, "specialists": {}})
    return first, Stage(config, folder / STUDENT)


@contextmanager
def named(stage: Stage) -> Iterator[None]:
    """The stage's name stands in front of what ends it inside."""
    try:
        yield
    except (UserError, Stopped) as error:
        raise type(error)(f"{stage.name}: {error}") from None


def check(job: Config, todo: Sequence[Stage]) -> None:
    """Refuse before anything starts what any stage would refuse.

    Raises:
        UserError: what is wrong, and with which stage.
    """
    for stage in todo:
        config = job if stage.config.name == STUDENT else stage.config
        with named(stage):
            preflight(config, make_algorithm(config), awaiting=True)


def standing(stage: Stage, *, resume: bool, force: bool = False) -> Standing:
    """How far a stage is, by its folder.

    Args:
        stage: one of a job.
        resume: one that was begun may go on.
        force: also where it was trained otherwise until now, as far as the weights still fit. A specialist that has
            come to its end, and would teach what it learned then, has to be the one that is asked for in any case.

    Raises:
        RunFolderError: the folder holds another training, more of it than is asked for, or one that was begun, and
            ``resume`` is false.
    """
    folder, rounds = stage.folder, stage.config.rounds
    run: dict[str, Any] = read_json(folder / "run.json") if (folder / "run.json").is_file() else {"abandoned": True}
    if run.get("abandoned"):
        return "new"
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else {}
    ended = result.get("status") == "done" and result["rounds"] == rounds
    if ended and stage.config.name != STUDENT:
        with named(stage):
            _require_same(stage, run["identity"])
    elif other := _differences(stage, run["identity"], FORCED if force else ()):
        raise RunFolderError(
            f"{stage.name}: {folder} was trained otherwise: {'; '.join(other)}. Give the job another name, set it as "
            "it was, or add --resume --force where the weights still fit"
        )
    if result.get("status") == "done" and result["rounds"] > rounds:
        raise RunFolderError(
            f"{stage.name}: {folder} has {result['rounds']} rounds, and {rounds} are asked for; ask for as many, or "
            "give the job another name"
        )
    trained = folder / trained_folder(stage.config.model, stage.config.student)
    if ended and trained.is_dir():
        return "done"
    if not resume:
        raise RunFolderError(f"{stage.name}: {folder} was begun already; go on with --resume, or choose another name")
    return "begun"


def _require_same(stage: Stage, before: Mapping[str, Any]) -> None:
    """A specialist at its end learned from what it would learn from now, wherever its prompts lie.

    Raises:
        UserError: it did not, or nothing says so any more.
    """
    kept, damaged = newest(stage.folder)
    if kept is None:
        raise RunFolderError(
            f"{stage.folder} has come to its end, and no checkpoint says from which prompts it learned"
            f"{''.join(f' ({one})' for one in damaged)}. Give the job another name, or the teacher its LoRA by the path"
        )
    was, now = kept.state["driver"]["prompts"], _learned_from(stage.config)
    changed = [task for task in sorted(was.keys() | now.keys()) if was.get(task) != now.get(task)]
    other = _differences(stage, before, ("prompts",)) + [f"prompts of {task} are others now" for task in changed]
    if other:
        raise RunFolderError(
            f"{stage.folder} has come to its end, trained otherwise: {'; '.join(other)}. Give the job another name, or "
            "set it as it was"
        )


def _learned_from(config: Config) -> dict[str, str]:
    """Task -> hash of all that there is to take, as ``ExperienceSource.prompts`` tells a checkpoint."""
    if config.recorded is not None:
        return recorded_stream(recordings(config.recorded), config.seed).digests()
    if config.pairs is not None:
        return {config.pairs.task: index_pairs(config.pairs).digest()}
    return PromptStream(drawn_prompts(config), config.seed).digests()


def _differences(stage: Stage, before: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    sides = (before, identity(stage.config))
    return differences(*({key: one for key, one in side.items() if key not in free} for side in sides))


def check_room(backend: Backend, together: Sequence[Stage]) -> None:
    """Refuse runs that the cluster has no room for at the same time, unless nodes may come.

    Raises:
        PlacementError: asked, free per node and missing.
    """
    specs = [spec for stage in together for spec in workers(stage.config)]
    lack = backend.shortage(specs)
    if lack and not any(stage.config.cluster.nodes_may_come for stage in together):
        raise PlacementError(f"{' and '.join(stage.name for stage in together)} at the same time: {lack}")


def workers(config: Config) -> list[WorkerSpec]:
    """What each worker of a run asks for."""
    return [
        WorkerSpec(role, dict, placement.threads, dict(placement.resources))
        for role, (placement, count) in _roles(config).items()
        for _ in range(count)
    ]


def _roles(config: Config) -> dict[str, tuple[Placement, int]]:
    """The placement and number of each role's workers, as ``build`` starts them."""
    cluster, algorithm = config.cluster, make_algorithm(config)
    read = config.recorded is not None or config.pairs is not None
    elastic: dict[str, RolePlacement] = {"reader": cluster.rollout} if read else {}
    if not read or config.evaluated:
        elastic["rollout"] = cluster.rollout
    if algorithm.needs_rewards or config.evaluated:
        elastic |= {reward_role(entry): cluster.of_reward(entry) for entry in cluster.panels(config.rewards)}
    if algorithm.needs_teachers:
        elastic |= teacher_placements(config)
    found: dict[str, tuple[Placement, int]] = {role: (one, one.workers) for role, one in elastic.items()}
    return found | {"learner": (cluster.learner, cluster.learner.ranks)}


def costs(first: Sequence[Stage], student: Stage) -> dict[str, dict[str, float]]:
    """What each stage's rounds took, from its folder, also where another job trained it.

    Returns:
        By stage, and for all specialists ``one after the other`` (the sums) and ``at the same time`` (of seconds the
        most): ``rounds``; ``images`` that they learned from; ``seconds``; ``core_seconds``, those in which workers
        computed times their threads.
    """
    found = {stage.config.name: _cost(stage) for stage in first}
    serial = {kind: sum(cost[kind] for cost in found.values()) for kind in ("rounds", "images", *SPENT)}
    return found | {
        "one after the other": serial,
        "at the same time": serial | {"seconds": max(cost["seconds"] for cost in found.values())},
        STUDENT: _cost(student),
    }


def _cost(stage: Stage) -> dict[str, float]:
    told = list(rows(stage.folder / "metrics.jsonl"))
    threads = {role: placement.threads for role, (placement, _) in _roles(stage.config).items()}
    return {
        "rounds": len(told),
        "images": sum(stage.config.batch.images_per_task * len(row["loss"].keys() - {"total"}) for row in told),
        "seconds": sum(row["seconds"]["round"] for row in told),
        # A role that is not among them now had one thread: `clerk`, and whoever shared workers before.
        "core_seconds": sum(spent * threads.get(role, 1) for row in told for role, spent in row["busy"].items()),
    }
