"""A protocol: what is compared, with which budgets, seeds and prompts, and what would have to come out.

It is committed before the first run. The sha256 of its file stands over every table that was made by it.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from opd_ray.comparison.arms import PROMPTS, Arm, braces, check_name, check_set
from opd_ray.comparison.hypotheses import AVERAGE, Hypothesis
from opd_ray.config.section import Frozen, problems
from opd_ray.errors import ConfigError
from opd_ray.prompts import read_prompts
from opd_ray.recipes import yaml_of
from opd_ray.types import Prompt

__all__ = ["PREFIX", "Judged", "OnBad", "Protocol", "Tuning", "prompts_in", "prompts_of", "read_protocol"]

OnBad = Literal["stop", "skip"]
PREFIX = "a protocol's prompts"
"""What messages about a prompt file begin with."""
JUDGED = {"train", "merge", "base", "router"}
"""Arms that have scores."""


class Tuning(Frozen):
    """How each method chooses its learning rate: as many trials for each, apart from all that is reported."""

    seed: int = Field(ge=0)
    """Of the trials, and of what they need; none of the reported ones."""
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Learning rates, one trial each; of a single one there are no trials."""
    rounds: float = Field(gt=0, le=1)
    """Share of the arm's rounds that a trial has."""
    prompts: dict[str, str]
    """Task -> file of the prompts that trials are judged on."""
    images_per_task: int = Field(ge=2)
    """So many, the last of the file."""

    @field_validator("rates")
    @classmethod
    def _distinct(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{rate:g}" for rate in rates}) < len(rates):  # as their folders are named
            raise ValueError(f"{', '.join(f'{rate:g}' for rate in rates)} has a rate twice; give each once")
        return rates


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
    averaged: tuple[str, ...] = Field(min_length=1)
    """Tasks whose mean is the average."""
    truth: str | None = None
    """package.module:attribute, prompts' texts -> true pictures [B, 3, H, W], for the distance of fidelity."""
    varied: int = Field(ge=1)
    """Prompts of each task for diversity."""
    variants: int = Field(8, ge=2)
    """Pictures of each of these."""
    curve_images: int = Field(64, ge=2)
    """Pictures of each task at a point of a curve."""

    @model_validator(mode="after")
    def _of_its_tasks(self) -> "Judged":
        tasks = ", ".join(self.prompts) or "none"
        for task in self.prompts:
            check_task(task, "prompts")
            if task == AVERAGE:
                raise ValueError(f"prompts.{task}: {AVERAGE} is the mean of tasks; name the task otherwise")
            if not self.rewards.get(task):
                raise ValueError(f"rewards.{task}: missing; give the rewards that score prompts.{task}")
        for task in self.rewards.keys() - self.prompts.keys():
            raise ValueError(f"rewards.{task}: no judged task {task!r}; known: {tasks} (judged.prompts)")
        for task in self.averaged:
            if task not in self.prompts:
                raise ValueError(f"averaged: no judged task {task!r}; known: {tasks} (judged.prompts)")
        if len({*self.averaged}) < len(self.averaged):
            raise ValueError(f"averaged: {', '.join(self.averaged)} has a task twice; give each once")
        if self.varied > self.images_per_task:
            raise ValueError(
                f"varied {self.varied} is more than images_per_task {self.images_per_task}, of whose prompts they are; "
                "lower it"
            )
        return self


class Quick(Frozen):
    """The same in minutes, to see that all of it runs; its numbers say nothing."""

    rounds: float = Field(gt=0, le=1)
    """Share of all rounds."""
    images_per_task: int = Field(ge=2)
    """Judged pictures."""


class Protocol(Frozen):
    """One comparison."""

    name: str
    """The folder is runs/<name>."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
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

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        return check_name(name)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len({*seeds}) < len(seeds):
            raise ValueError(f"{', '.join(map(str, seeds))} has a seed twice; give each once")
        return seeds

    @model_validator(mode="after")
    def _fits_together(self) -> "Protocol":
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is one of the reported seeds; choose another")
        for task in self.judged.averaged:
            if task not in self.tuning.prompts:
                raise ValueError(f"tuning.prompts has no {task}, which judged.averaged has; give its training prompts")
        for task in self.copies:
            check_task(task, "copies")
        check_set(self.set, {}, "set")
        earlier = dict[str, Arm]()
        for name, arm in self.arms.items():
            self._check_arm(name, arm, earlier)
            earlier[name] = arm
        for name, hypothesis in self.hypotheses.items():
            for number, test in enumerate(hypothesis.tests):
                where = f"hypotheses.{name}.tests.{number}"
                for other in test.arms:
                    self._check_judged(other, where)
                for task in test.tasks:
                    if task not in {*self.judged.prompts, AVERAGE}:
                        known = ", ".join([*self.judged.prompts, *([AVERAGE] if test.kind == "difference" else [])])
                        raise ValueError(f"{where}: no judged task {task!r}; known: {known}")
        return self

    def _check_arm(self, name: str, arm: Arm, earlier: dict[str, Arm]) -> None:
        """Whether what it names stands before it, and is what it can be made of."""
        check_name(name, "arms: ")
        if f"{{{name}}}" == PROMPTS:
            raise ValueError(f"arms.{name}: {PROMPTS} is the folder of copies; name the arm otherwise")
        check_set(arm.set, earlier if arm.do in {"train", "record"} else {}, f"arms.{name}.set")
        if any(found == PROMPTS for found in braces(arm.set)) and not self.copies:
            raise ValueError(f"arms.{name}.set: {PROMPTS} is the folder of copies, and there are none; give copies")
        for need in [*arm.of, *arm.by_task.values(), *([arm.rate_of] if arm.rate_of else [])]:
            if need not in earlier:
                raise ValueError(f"arms.{name}: {need} does not stand before it; before it are {_listed(earlier)}")
        allowed = {"merge": {"train", "merge"}, "cosines": {"train"}, "router": JUDGED}.get(arm.do, set[str]())
        for need in [*arm.of, *arm.by_task.values()]:
            if earlier[need].do not in allowed:
                raise ValueError(
                    f"arms.{name}: {need} is do: {earlier[need].do}; {arm.do} takes arms that are "
                    f"{' or '.join(sorted(allowed))}"
                )
        if arm.rate_of and earlier[arm.rate_of].do != "train":
            raise ValueError(f"arms.{name}.rate_of: {arm.rate_of} is do: {earlier[arm.rate_of].do}, which has no rate")
        if arm.do == "router" and arm.by_task.keys() != self.judged.prompts.keys():
            raise ValueError(
                f"arms.{name}.by_task has {', '.join(arm.by_task)}; give an arm for each judged task and no other: "
                f"{', '.join(self.judged.prompts)}"
            )

    def _check_judged(self, name: str, where: str) -> None:
        judged = {name: arm for name, arm in self.arms.items() if arm.do in JUDGED}
        if name not in judged:
            what = (
                f"{name} is do: {self.arms[name].do}, which has no score" if name in self.arms else f"no arm {name!r}"
            )
            raise ValueError(f"{where}: {what}; known: {_listed(judged)}")

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


def check_task(name: str, where: str) -> None:
    """Refuse a task that names no file.

    Raises:
        ValueError: what it is called.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"{where}: task {name!r} names files; call it without / and a first dot")


def _listed(arms: dict[str, Arm]) -> str:
    return ", ".join(arms) or "none"


@cache
def prompts_in(path: str, task: str | None, on_bad: OnBad) -> dict[str, tuple[Prompt, ...]]:
    """All prompts of a file, or of `world/<task>/<split>`, by task, which the file says itself where none is given.

    Each file is read once a process.
    """
    from opd_ray.preflight import locate  # imports torch, which a protocol does not need

    found = locate(path)
    return read_prompts(found if task is None else {task: found}, PREFIX, on_bad=on_bad)


def prompts_of(path: str, task: str) -> tuple[Prompt, ...]:
    """All of a file whose task is known."""
    return prompts_in(path, task, "stop")[task]


def read_protocol(path: Path) -> tuple[Protocol, str]:
    """A protocol, and the sha256 of its file.

    Raises:
        ConfigError: in one line, where it is wrong, what was seen and what is allowed.
    """
    try:
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a protocol") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    data = yaml_of(text, path)
    if not isinstance(data, dict):
        allowed = ", ".join(Protocol.model_fields)
        raise ConfigError(f"{path}: expected a mapping with {allowed}; found {type(data).__name__}")
    try:
        return Protocol.model_validate(data), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems(error)}") from None
