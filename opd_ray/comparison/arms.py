"""Arms of a protocol: what each is made by, and what it names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from opd_ray.config.section import Frozen

__all__ = ["PROMPTS", "REFERENCE", "Arm", "Merging", "braces", "check_name", "check_set"]

PROMPTS = "{prompts}"
REFERENCE = re.compile(r"\{(?!prompts\})([a-z0-9_]+)(:next)?\}")
NAME = re.compile(r"[a-z0-9_]+")
KEYS = {
    "train": ("recipe", "rounds", "set", "rate_of", "curve"),
    "record": ("recipe", "rounds", "set"),
    "merge": ("of", "merge"),
    "base": (),
    "router": ("by_task",),
    "cosines": ("of", "set"),
}
"""What is done -> the keys that are about it."""
NEEDS = {"train": "recipe", "record": "recipe", "merge": "of", "router": "by_task", "cosines": "of"}
OWN = {
    "name": "the arm's",
    "seed": "seeds",
    "rounds": "rounds of the arm",
    "optimizer.lr": "tuning.rates",
    "evaluation.images_per_task": "judged.images_per_task",
    "cluster.runtime": "local, always",
}
"""Keys of recipes that a comparison sets itself, and from what."""


class Merging(Frozen):
    """How LoRAs are merged, as `opd-ray merge` does it."""

    method: Literal["mean", "ties"] = "mean"
    """mean: of the products B A, exact. ties: TIES-Merging."""
    scale: float = 1.0
    """Strength of the merge; of mean, 3 is the sum of three."""
    density: float = Field(0.2, gt=0, le=1)
    """Share of each LoRA's numbers that ties keeps."""
    rank: int | None = Field(None, ge=1)
    """Largest rank of a module; the sum of the LoRAs' where not given."""

    @field_validator("scale")
    @classmethod
    def _scales(cls, scale: float) -> float:
        if scale == 0:
            raise ValueError("expected a number other than 0, got 0")
        return scale


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
    """Of train: points at which it is judged on the way; at most its rounds."""
    merge: Merging = Merging()
    """Of merge: how."""
    of: tuple[str, ...] = ()
    """Arms that are merged; or the arm whose gradients are compared."""
    by_task: dict[str, str] = {}
    """Of router: task -> arm."""

    @model_validator(mode="after")
    def _complete(self) -> "Arm":
        needed, takes = NEEDS.get(self.do), KEYS[self.do]
        if needed is not None and not getattr(self, needed):
            raise ValueError(f"do: {self.do} needs {needed}")
        for key, field in type(self).model_fields.items():
            if key not in {"says", "group", "do", *takes} and getattr(self, key) != field.default:
                raise ValueError(f"do: {self.do} takes no {key}; it takes {', '.join(takes) or 'says and group alone'}")
        if self.do == "merge" and len(self.of) < 2:
            raise ValueError(f"of: do: merge needs two arms or more, got {', '.join(self.of)}")
        if self.do == "cosines" and len(self.of) > 1:
            raise ValueError(f"of: do: cosines needs one arm, got {', '.join(self.of)}")
        if self.curve > self.rounds:
            raise ValueError(f"curve {self.curve} is more points than rounds {self.rounds}; lower it")
        return self

    @property
    def needs(self) -> tuple[tuple[str, bool], ...]:
        """Arms that have to be there, and whether with the next seed."""
        named = [(name, False) for name in (*self.of, *self.by_task.values())]
        found = (REFERENCE.fullmatch(one) for one in braces(self.set))
        return tuple(dict.fromkeys([*named, *((one[1], bool(one[2])) for one in found if one)]))


def braces(value: Any) -> Iterator[str]:
    """Everything in braces in the strings of a value."""
    if isinstance(value, str):
        yield from re.findall(r"\{[^{}]*\}", value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for one in inside:
        yield from braces(one)


def check_name(name: str, where: str = "") -> str:
    """A name of folders.

    Raises:
        ValueError: it is none.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}expected lower-case letters, digits and _, got {name!r}")
    return name


def check_set(values: Mapping[str, Any], earlier: Mapping[str, Arm], where: str) -> None:
    """Refuse keys that are the protocol's own, and what stands in braces and is no folder.

    Args:
        values: keys of a recipe and their values.
        earlier: arms that may be named.
        where: for messages.

    Raises:
        ValueError: which.
    """
    for key in values:
        if key in OWN:
            raise ValueError(f"{where}.{key}: the protocol says it ({OWN[key]}); take it out")
    folders = [name for name, arm in earlier.items() if arm.do in {"train", "record", "merge"}]
    for found in braces(values):
        named = REFERENCE.fullmatch(found)
        if found == PROMPTS or (named and named[1] in folders):
            continue
        raise ValueError(
            f"{where}: {found} names no arm with a folder that stands before it; there are "
            f"{', '.join(f'{{{name}}}' for name in folders) or 'none'}, and {PROMPTS} of copies"
        )
