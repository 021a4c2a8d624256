"""A protocol: what is compared, with which budgets, seeds and prompts, and what would have to come out.

It is committed before the first run. The sha256 of its file stands over every table that was made by it.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from opd_ray.config.section import Frozen
from opd_ray.errors import ConfigError
from opd_ray.prompts import read_prompts
from opd_ray.types import Prompt

__all__ = ["Arm", "Hypothesis", "Judged", "Protocol", "Test", "Tuning", "prompts_of", "read_protocol", "references"]

PROMPTS = "{prompts}"
REFERENCE = re.compile(r"\{(?!prompts\})([a-z0-9_]+)(:next)?\}")
NAME = re.compile(r"[a-z0-9_]+")
AVERAGE, MIXED = "average", "mixed"


class Tuning(Frozen):
    """How each method chooses its learning rate: as many trials for each, apart from all that is reported."""

    seed: int = Field(ge=0)
    """Of the trials, and of what they need; none of the reported ones."""
    rates: tuple[float, ...] = Field(min_length=1)
    """Learning rates, one trial each."""
    rounds: float = Field(gt=0, le=1)
    """Share of the arm's rounds that a trial has."""
    prompts: dict[str, str]
    """Task -> file of the prompts that trials are judged on."""
    images_per_task: int = Field(ge=2)
    """So many, the last of the file."""


class Judged(Frozen):
    """How every model is drawn with and scored."""

    model: str
    """The base of all arms."""
    guidance: float = Field(ge=0)
    """Of all drawings."""
    steps: int = Field(ge=1)
    """Of all drawings, by the ODE."""
    seed: int = Field(ge=0)
    """Of first noises, which all models share."""
    prompts: dict[str, str]
    """Task -> file of held-out prompts."""
    rewards: dict[str, tuple[str, ...]]
    """Task -> rewards; of several, a picture's score is the smallest that applies: all skills at once."""
    images_per_task: int = Field(ge=2)
    """The first prompts of each file, one picture each."""
    averaged: tuple[str, ...]
    """Tasks whose mean is the average."""
    truth: str | None = None
    """package.module:attribute, prompts' texts -> true pictures [B, 3, H, W], for the distance of fidelity."""
    varied: int = Field(ge=1)
    """Prompts of each task for diversity."""
    variants: int = Field(8, ge=2)
    """Pictures of each of these."""
    curve_images: int = Field(64, ge=2)
    """Pictures of each task at a point of a curve."""


class Arm(Frozen):
    """One row of a table, and how it is made."""

    says: str
    """What it is, for a reader."""
    group: str
    """The table in which it stands."""
    do: Literal["train", "record", "merge", "base", "router", "cosines"] = "train"
    """Train a recipe; record what its teachers draw; merge LoRAs; nothing; choose another arm by task; measure angles
    between the gradients of an arm's tasks."""
    recipe: str | None = None
    """Of train and record."""
    rounds: int = Field(1, ge=1)
    """Of train and record."""
    set: dict[str, Any] = {}
    """Keys of the recipe, dotted, and their values. {arm} in a value stands for the folder of that arm with the same
    seed, {arm:next} for that with the next seed of the protocol, {prompts} for the folder of `copies`."""
    rate_of: str | None = None
    """The arm whose learning rate this one takes; by trials of its own where not given."""
    curve: int = Field(0, ge=0)
    """Points at which it is judged on the way."""
    merge: dict[str, Any] = {}
    """Of merge: method, scale, density."""
    of: tuple[str, ...] = ()
    """Arms that are merged; or the arm whose gradients are compared."""
    by_task: dict[str, str] = {}
    """Of router: task -> arm."""

    @model_validator(mode="after")
    def _complete(self) -> "Arm":
        if (self.do in {"train", "record"}) != (self.recipe is not None):
            raise ValueError(f"do: {self.do} {'needs' if self.recipe is None else 'takes no'} recipe")
        if (self.do in {"merge", "cosines"}) != bool(self.of):
            raise ValueError(f"do: {self.do} {'needs' if not self.of else 'takes no'} of")
        if (self.do == "router") != bool(self.by_task):
            raise ValueError(f"do: {self.do} {'needs' if not self.by_task else 'takes no'} by_task")
        return self

    @property
    def needs(self) -> tuple[tuple[str, bool], ...]:
        """Arms that have to be there, and whether with the next seed."""
        named = [(name, False) for name in (*self.of, *self.by_task.values())]
        return tuple(dict.fromkeys([*named, *references(self.set)]))


class Test(Frozen):
    """One thing that has to be so for a hypothesis to hold."""

    kind: Literal["difference", "ratio", "uneven"]
    """difference: of - to, in a score. ratio: of / to, of each task. uneven: the share of the specialists' gain that
    ``of`` has in its easiest task, less its mean share in the others."""
    of: str
    """An arm."""
    to: tuple[str, ...] = ()
    """Arms, each of which has to be beaten."""
    score: str = AVERAGE
    """Of difference: a task, or average."""
    specialists: dict[str, str] = {}
    """Of ratio and uneven: task -> arm."""
    easiest: str | None = None
    """Of uneven: a task."""
    base: str | None = None
    """Of uneven: the arm without training."""
    at_least: float
    """Holds where the interval lies at or above it, fails where it lies below."""


class Hypothesis(Frozen):
    """What is expected: it holds where all tests do, and fails where one fails."""

    says: str
    """In words."""
    tests: tuple[Test, ...] = Field(min_length=1)
    """What it is decided by."""


class Quick(Frozen):
    """The same in minutes, to see that all of it runs; its numbers say nothing."""

    rounds: float = Field(gt=0, le=1)
    """Share of all rounds."""
    images_per_task: int = Field(ge=2)
    """Judged pictures."""


class Protocol(Frozen):
    """One comparison."""

    name: str = Field(pattern=NAME.pattern)
    """The folder is runs/<name>."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Each arm is trained with each."""
    tuning: Tuning
    """How learning rates are chosen."""
    judged: Judged
    """How models are scored."""
    set: dict[str, Any] = {}
    """Keys of every recipe, and their values."""
    copies: dict[str, str] = {}
    """Task -> file whose prompts are copied under its name: {prompts}/<task>.txt, for several teachers of one task."""
    arms: dict[str, Arm]
    """By name, in the order in which they are made."""
    hypotheses: dict[str, Hypothesis]
    """By name."""
    quick: Quick
    """How --quick shortens it."""
    _spare: tuple[int, ...] = PrivateAttr(())

    @property
    def spare(self) -> tuple[int, ...]:
        """Of a quick run, the seed after its only one: `:next` names what is made with it, and no more is."""
        return self._spare

    @model_validator(mode="after")
    def _fits_together(self) -> "Protocol":
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is one of the reported seeds; choose another")
        earlier = list[str]()
        for name, arm in self.arms.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"arms.{name}: expected {NAME.pattern}")
            named = [need for need, _ in arm.needs]
            for need in [*named, *([arm.rate_of] if arm.rate_of else [])]:
                if need not in earlier:
                    known = ", ".join(earlier) or "none"
                    raise ValueError(f"arms.{name}: {need} does not stand before it; before it are {known}")
            earlier.append(name)
        for key, where in self._named():
            if key not in self.arms:
                raise ValueError(f"{where}: no arm {key!r}; known: {', '.join(self.arms)}")
        return self

    def _named(self) -> Iterator[tuple[str, str]]:
        for name, hypothesis in self.hypotheses.items():
            for test in hypothesis.tests:
                others = (*test.to, *test.specialists.values(), *([test.base] if test.base else []))
                yield from ((arm, f"hypotheses.{name}") for arm in (test.of, *others))

    def shortened(self) -> "Protocol":
        """One seed, with a second one for what `:next` names; trials of one round; few rounds and pictures."""
        few = self.quick.images_per_task
        arms = self._shortened_arms()
        one_round = 1 / max(arm.rounds for arm in arms.values())
        shown = {"images_per_task": few, "varied": 2, "variants": 2, "curve_images": few}
        tuning = {"rates": self.tuning.rates[:2], "rounds": one_round}
        tuning |= {"images_per_task": min(few, self.tuning.images_per_task)}
        chosen = self.model_copy(
            update={
                "seeds": self.seeds[:1],
                "tuning": self.tuning.model_copy(update=tuning),
                "judged": self.judged.model_copy(update=shown),
                "arms": arms,
            }
        )
        chosen._spare = self.seeds[1:2]
        return chosen

    def _shortened_arms(self) -> dict[str, Arm]:
        """Of few rounds; of each recipe's arms the first one alone has trials, whose rate is that of the others."""
        arms, first, tried = dict[str, Arm](), dict[str, str](), dict[str, str]()
        for name, arm in self.arms.items():
            changes: dict[str, Any] = {"rounds": max(1, round(arm.rounds * self.quick.rounds))}
            if arm.do == "train":
                assert arm.recipe is not None
                owner = arm.rate_of or first.setdefault(arm.recipe, name)
                tried[name] = tried.get(owner, owner)
                changes["rate_of"] = tried[name] if tried[name] != name else None
            arms[name] = arm.model_copy(update=changes)
        return arms


def references(value: Any) -> list[tuple[str, bool]]:
    """The arms that a value names, and whether with the next seed."""
    if isinstance(value, str):
        return [(name, bool(following)) for name, following in REFERENCE.findall(value)]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [found for one in inside for found in references(one)]


@cache
def prompts_of(path: str, task: str) -> tuple[Prompt, ...]:
    """All prompts of a file, or of `world/<task>/<split>`; read once a process."""
    from opd_ray.preflight import locate  # imports torch, which a protocol does not need

    return read_prompts({task: locate(path)}, "a protocol's prompts")[task]


def read_protocol(path: Path) -> tuple[Protocol, str]:
    """A protocol, and the sha256 of its file.

    Raises:
        ConfigError: in one line, where it is wrong, what was seen and what is allowed.
    """
    try:
        content = path.read_bytes()
        data = yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a protocol") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    try:
        return Protocol.model_validate(data), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}{': ' if where else ''}{first['msg']}") from None
