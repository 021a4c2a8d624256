"""How fast one worker of each role is: measured by a run, or written down in a file."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from opd_ray import metrics
from opd_ray.algorithms import make_algorithm
from opd_ray.config import Config, RolePlacement
from opd_ray.config.section import Frozen, problems
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.recipes import read as read_config

__all__ = ["SHARED", "LearnerRate", "Rates", "teacher_placements", "teacher_role"]

SHARED = "teacher"
"""The one pool whose workers hold every teacher; otherwise each has a pool of its own, ``teacher.<name>``."""
WARM_UP = 2
"""First rounds of a run that are not counted, where it has more: caches fill, kernels are chosen."""


def teacher_role(name: str) -> str:
    """The pool of a teacher that shares its workers with nobody."""
    return f"{SHARED}.{name}"


def teacher_placements(config: Config) -> dict[str, RolePlacement]:
    """Of each pool of teachers: of all together, or of each."""
    names = (
        {SHARED: "default"} if config.cluster.share_teachers else {teacher_role(one): one for one in config.teachers}
    )
    return {role: config.cluster.of_teacher(name) for role, name in names.items()}


def reward_role(entry: str = "default") -> str:
    """The pool of an entry of ``cluster.rewards``."""
    return "reward" if entry == "default" else f"reward.{entry}"


class LearnerRate(Frozen):
    """Seconds of one round's update on the learner. Ranks share the forward and backward passes alone."""

    serial: float = Field(0.0, ge=0)
    """However many ranks there are: the reduction, the optimizer step, staging."""
    shared: float = Field(ge=0)
    """Of all the round's items on one rank; ranks divide it among themselves, a whole item each."""

    def seconds(self, ranks: int) -> float:
        """Of one round's update on so many ranks, where the items divide among them."""
        return self.serial + self.shared / ranks


class Rates(Frozen):
    """What a round holds and what each piece of work costs. Seconds are of one worker, and of wall time."""

    item_size: int = Field(ge=1)
    """Samples of one work item."""
    items: dict[str, int]
    """Teacher -> work items of a round that it marks, in the order in which they are drawn."""
    seconds: dict[str, float]
    """Role -> seconds of one item on one worker: rollout, teacher.<name> or teacher, reward if trained on."""
    transfer: dict[str, float] = Field(default_factory=dict)
    """Role -> seconds of one item in which its worker holds the request and does not work: transport, loading."""
    learner: LearnerRate
    """Of a round, for the whole group."""
    streams: bool = True
    """Whether the learner begins with a round's first items while others are still drawn, marked and scored; false
    where an update needs all of them. `plan` takes it from the recipe's algorithm and backend."""
    publish: float = Field(0.0, ge=0)
    """From the last step of a round until its weights can be asked for. The learner does nothing else meanwhile."""
    bind: float = Field(0.0, ge=0)
    """For which a rollout worker is not free each time it takes new weights."""
    checkpoint: float = Field(0.0, ge=0)
    """Spent on checkpoints, evaluation apart, spread over all rounds."""

    @field_validator("items")
    @classmethod
    def _some_items(cls, items: dict[str, int]) -> dict[str, int]:
        if not items or min(items.values()) < 1:
            raise ValueError("each teacher marks 1 item a round or more")
        return items

    @field_validator("seconds", "transfer")
    @classmethod
    def _not_negative(cls, seconds: dict[str, float]) -> dict[str, float]:
        for role, value in seconds.items():
            if value < 0:
                raise ValueError(f"{role} takes 0 seconds or more, got {value}")
        return seconds

    @model_validator(mode="after")
    def _known_roles(self) -> "Rates":
        known = ("rollout", SHARED, *map(teacher_role, self.items), reward_role())
        for field, given in (("seconds", self.seconds), ("transfer", self.transfer)):
            for role in given:
                if role not in known and not role.startswith(f"{reward_role()}."):
                    raise ValueError(f"{field}.{role}: no such role; allowed: {', '.join(known)}")
        if "rollout" not in self.seconds:
            raise ValueError("seconds.rollout is missing: every item is drawn first")
        return self

    @property
    def item_count(self) -> int:
        """Work items of a round."""
        return sum(self.items.values())

    @property
    def samples(self) -> int:
        """Of a round."""
        return self.item_count * self.item_size

    @property
    def marked(self) -> bool:
        """Whether teachers mark what is drawn."""
        return any(role.partition(".")[0] == SHARED for role in self.seconds)

    def held(self, role: str) -> float:
        """Seconds for which one item holds a worker of a role, as ``rollout``, ``teacher.<name>`` or ``reward``."""
        known = role if role in self.seconds or role.partition(".")[0] != SHARED else SHARED
        return self.seconds.get(known, 0.0) + self.transfer.get(known, 0.0)

    def roles(self, *, shared: bool) -> tuple[str, ...]:
        """The pools of a run with these rates, and its learner."""
        teachers = () if not self.marked else (SHARED,) if shared else tuple(map(teacher_role, self.items))
        return "rollout", *teachers, *self.scoring, "learner"

    @property
    def scoring(self) -> tuple[str, ...]:
        """Roles whose workers score what is drawn."""
        return tuple(role for role in self.seconds if role.partition(".")[0] == reward_role())

    def work(self, role: str) -> float:
        """Worker-seconds that a round costs a pool; for the learner, on one rank."""
        if role == "learner":
            return self.learner.seconds(1)
        if role == SHARED:
            return sum(count * self.held(teacher_role(name)) for name, count in self.items.items())
        return self.items.get(role.removeprefix(teacher_role("")), self.item_count) * self.held(role)

    def for_config(self, config: Config) -> "Rates":
        """The same speed on another batch: work grows with the samples, what is serial does not.

        Raises:
            ConfigError: a teacher of the configuration has no rate.
        """
        items, size = items_of(config), config.batch.item_size
        if self.marked and SHARED not in self.seconds:
            for name in items:
                if teacher_role(name) not in self.seconds:
                    raise ConfigError(
                        f"rates: seconds.{teacher_role(name)} is missing; known: {', '.join(self.seconds)}. Add it, or "
                        f"seconds.{SHARED} for all teachers"
                    )
        ratio = size / self.item_size
        stale = {teacher_role(name) for name in self.items} - {teacher_role(name) for name in items}
        growth = sum(items.values()) * size / self.samples
        return self.model_copy(
            update={
                "item_size": size,
                "items": items,
                "seconds": {role: value * ratio for role, value in self.seconds.items() if role not in stale},
                "transfer": {role: value * ratio for role, value in self.transfer.items() if role not in stale},
                "learner": LearnerRate(serial=self.learner.serial, shared=self.learner.shared * growth),
                "streams": _streams(config),
            }
        )

    def to_yaml(self) -> str:
        """What ``read`` takes."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """From YAML or JSON.

        Raises:
            ConfigError: in one line: what is wrong, where, and what is allowed.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))  # every JSON file is one of YAML
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            allowed = ", ".join(cls.model_fields)
            raise ConfigError(f"{path}: expected a mapping with {allowed}, found {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{path}: {problems(error)}") from None

    @classmethod
    def from_run(cls, folder: Path) -> "Rates":
        """Medians over a run's rounds, without the first ones.

        One run tells one number of ranks: what the ranks were at work counts as shared among them, all else of the
        update as serial.

        Raises:
            RunFolderError: there is no round to learn from.
            ConfigError: its configuration cannot be read.
        """
        rows = [row for row in metrics.rows(folder / "metrics.jsonl") if "seconds" in row and _busy(row, "rollout")]
        if not rows:
            raise RunFolderError(f"{folder}: no round with times in metrics.jsonl, so its rates are unknown")
        config = read_config(folder / "config.yaml")
        return _measure(rows[min(WARM_UP, len(rows) - 1) :], rows, config)


def items_of(config: Config) -> dict[str, int]:
    """Teacher -> work items of a round, in the order of drawing; all under one name where nobody teaches.

    Raises:
        ConfigError: rounds differ from each other.
    """
    if config.batch.tasks == "in_turn":
        raise ConfigError("batch.tasks in_turn: what a round costs is known where all are alike; plan with `together`")
    each = config.batch.images_per_task // config.batch.item_size
    routes = config.teacher_of_task
    tasks = list(config.drawn) if isinstance(config.drawn, dict) else list(routes)
    items: dict[str, int] = {}
    for task in tasks:
        teacher = routes.get(task, "all")
        items[teacher] = items.get(teacher, 0) + each
    return items or {"all": each}


def _streams(config: Config) -> bool:
    """What the learner does: ranks that go through their forwards together also wait for all items."""
    learner = config.cluster.learner
    lockstep = learner.backend == "fsdp2" or (learner.backend == "deepspeed" and learner.stage >= 2)
    return make_algorithm(config).streams and not lockstep


def _measure(rows: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]], config: Config) -> Rates:
    items = items_of(config)
    count, ranks = sum(items.values()), config.cluster.learner.ranks
    counts = {"rollout": count, SHARED: count} | {teacher_role(name): n for name, n in items.items()}
    counts |= dict.fromkeys(map(reward_role, config.cluster.panels(config.rewards)), count)
    seconds, transfer = dict[str, float](), dict[str, float]()
    for role, expected in counts.items():
        if role.partition(".")[0] == reward_role() and not make_algorithm(config).needs_rewards:
            continue  # it scores evaluations alone
        if any(_busy(row, role) for row in rows):
            answers = [_answers(row, role, expected) for row in rows]
            parts = max(round(statistics.median(answers) / expected), 1)  # an item may be handed over in parts
            each = [parts * _busy(row, role) / n for row, n in zip(rows, answers, strict=True)]
            idle = [parts * _role(row, role).get("transfer", 0.0) / n for row, n in zip(rows, answers, strict=True)]
            seconds[role], transfer[role] = statistics.median(each), statistics.median(idle)
    if any(role in seconds for role in counts if role.startswith(teacher_role(""))):
        seconds.pop(SHARED, None)  # their sum
        transfer.pop(SHARED, None)
    shared = _median(_busy(row, "learner") for row in rows)
    times = [row["seconds"] for row in rows]
    publish = _median(each.get("publish", 0.0) for each in times)
    wall = _median(each["round"] - each.get("wait", 0.0) - each.get("publish", 0.0) for each in times)
    return Rates(
        item_size=config.batch.item_size,
        items=items,
        seconds=seconds,
        transfer={role: value for role, value in transfer.items() if value > 0},
        learner=LearnerRate(serial=max(wall - shared / ranks, 0.0), shared=shared),
        streams=_streams(config),
        publish=publish,
        checkpoint=sum(row["seconds"].get("checkpoint", 0.0) for row in every) / len(every),
    )


def _role(row: Mapping[str, Any], role: str) -> Mapping[str, float]:
    found: Mapping[str, float] = row.get("roles", {}).get(role, {})
    return found


def _busy(row: Mapping[str, Any], role: str) -> float:
    """Worker-seconds of a role in a round: by the pool where the row knows, else by the first word of its name."""
    return float(_role(row, role).get("busy", 0.0) if row.get("roles") else row.get("busy", {}).get(role, 0.0))


def _answers(row: Mapping[str, Any], role: str, expected: int) -> float:
    return float(_role(row, role).get("answers", 0)) or expected


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
