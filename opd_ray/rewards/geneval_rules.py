"""GenEval's rules: from the objects found in a picture to its official, strict and partial score. Knows no model.

Source: GenEval (arXiv 2310.11513; djghosh13/geneval, evaluation/evaluate_images.py) for `official`, Flow-GRPO
(arXiv 2505.05470; yifan123/reward-server) for `strict` and `partial`.

A row of the prompt file says `tag`, `include` and perhaps `exclude`: what has to be there, how often, in which colour
and where beside an earlier demand's objects; and how often something must not be there.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.errors import PromptError

__all__ = [
    "COLOURS",
    "Box",
    "Demand",
    "Found",
    "Objects",
    "Paint",
    "Wanted",
    "keep",
    "official",
    "partial",
    "relations",
    "strict",
]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence that an object has to exceed; the second one for the tag `counting`."""
MAX_OBJECTS = 16
"""Of each class, the most confident ones."""
MARGIN = 0.1
"""Share of both objects' size by which they have to stand apart for a relation."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


@dataclass(frozen=True, eq=False)
class Found:
    """An object in a picture; no two are equal."""

    box: Box
    confidence: float
    mask: npt.NDArray[np.bool_] | None = None
    """[H, W]; None where the whole box counts."""


Objects = Mapping[str, Sequence[Found]]
"""Class -> its objects, the most confident first."""
Paint = Callable[[str, Sequence[Found]], Sequence[str]]
"""(class, objects) -> the colour of each."""


@dataclass(frozen=True)
class Demand:
    """Something that has to be there, or must not."""

    name: str
    count: int
    colour: str | None = None
    relation: tuple[str, int] | None = None
    """Where it has to be, and beside the objects of which earlier demand."""


@dataclass(frozen=True)
class Wanted:
    """What one prompt asks for."""

    include: tuple[Demand, ...]
    exclude: tuple[Demand, ...] = ()
    counting: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any], prompt: str) -> "Wanted | None":
        """From a row of the prompt file; None where it has no `include`, so that GenEval does not apply.

        Args:
            row: `include` and `exclude` are lists, or such lists as JSON; a field that is missing may also be null.
            prompt: for messages.

        Raises:
            PromptError: a field that GenEval does not know.
        """
        try:
            include = tuple(_demand(entry, i) for i, entry in enumerate(_listed(row, "include")))
            exclude = tuple(_demand(entry, 0) for entry in _listed(row, "exclude"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise PromptError(f"the GenEval columns of prompt {prompt!r} cannot be used: {said}") from error
        return cls(include, exclude, row.get("tag") == "counting") if include else None

    @property
    def names(self) -> set[str]:
        """The classes that are asked for."""
        return {demand.name for demand in (*self.include, *self.exclude)}


def keep(objects: Objects, wanted: Wanted) -> dict[str, list[Found]]:
    """The objects that count: confident enough, at most 16 a class, the most confident first (ties as they came)."""
    threshold = COUNTING_THRESHOLD if wanted.counting else THRESHOLD
    ordered = {name: sorted(found, key=lambda one: -one.confidence) for name, found in objects.items()}
    return {name: [one for one in found if one.confidence > threshold][:MAX_OBJECTS] for name, found in ordered.items()}


def official(wanted: Wanted, objects: Objects, paint: Paint) -> float:
    """1 if enough of everything is there, as asked, and nothing that is excluded; else 0.

    Of each class the `count` most confident objects are looked at; every one of them has to have the colour, and to
    stand in the relation to every one of the target's.
    """
    groups: list[Sequence[Found] | None] = []
    for demand in wanted.include:
        found = objects.get(demand.name, ())[: demand.count]
        groups.append(found if len(found) == demand.count and _as_asked(demand, found, groups, paint) else None)
    excluded = any(len(objects.get(demand.name, ())) >= demand.count for demand in wanted.exclude)
    return float(None not in groups and not excluded)


def strict(wanted: Wanted, objects: Objects, paint: Paint) -> float:
    """1 if exactly as many of everything are there, all of them as asked; else 0. `exclude` has nothing to add."""
    groups: list[Sequence[Found] | None] = []
    for demand in wanted.include:
        found = objects.get(demand.name, ())
        groups.append(found if len(found) == demand.count and _as_asked(demand, found, groups, paint) else None)
    return float(None not in groups)


def partial(wanted: Wanted, objects: Objects, paint: Paint) -> float:
    """The mean of components: at most 1, and below 0 where far too many are there (one of 16 asked for once: -14).

    Each demand gives 1 - |count - found| / count; then, if it asks for a colour or a relation, 0 where the count is
    wrong, else 1 - |count - of that colour| / count, and, where that is 1, whether all stand in the relation, 1 or 0.
    Flow-GRPO's server adds 1 to its list also after the 0 of a wrong relation; here a wrong one is 0.
    """
    marks: list[float] = []
    groups: list[Sequence[Found] | None] = []
    for demand in wanted.include:
        found = objects.get(demand.name, ())
        counted = len(found) == demand.count
        matched = counted
        marks.append(_closeness(len(found), demand.count))
        if not counted and (demand.colour or demand.relation):
            marks.append(0.0)
        if counted and demand.colour:
            marks.append(_closeness(list(paint(demand.name, found)).count(demand.colour), demand.count))
            matched = marks[-1] == 1
        if matched and demand.relation:
            matched = _placed(demand.relation, found, groups)
            marks.append(float(matched))
        groups.append(found if matched else None)
    return math.fsum(marks) / len(marks)


def relations(one: Box, other: Box) -> set[str]:
    """Where `one` is, seen from `other`: one or two of the four relations, or none where they are too close.

    Each axis of the distance between their middles is shortened by a tenth of the sum of both sizes, and has to be more
    than half of the unshortened distance.
    """
    first, second = np.asarray(one, float).reshape(2, 2), np.asarray(other, float).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    apart = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


def _as_asked(demand: Demand, found: Sequence[Found], groups: Sequence[Sequence[Found] | None], paint: Paint) -> bool:
    """Whether all of these have the colour and the place that is asked for."""
    if demand.colour and any(colour != demand.colour for colour in paint(demand.name, found)):
        return False
    return not demand.relation or _placed(demand.relation, found, groups)


def _placed(relation: tuple[str, int], found: Sequence[Found], groups: Sequence[Sequence[Found] | None]) -> bool:
    """Whether all of these stand so to all of the target's; not if the target is not there as asked."""
    name, target = relation
    others = groups[target]
    return others is not None and all(name in relations(one.box, other.box) for one in found for other in others)


def _closeness(found: int, count: int) -> float:
    return 1 - abs(count - found) / count


def _listed(row: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A column: a list, null, or either as JSON."""
    value = row.get(key)
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is {value!r}, not a list")
    return value


def _demand(entry: Mapping[str, Any], index: int) -> Demand:
    count, colour, position = entry["count"], entry.get("color"), entry.get("position")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count is {count!r}; it has to be a whole number from 1 on")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"color {colour!r} is unknown; known: {', '.join(COLOURS)}")
    if position is None:
        return Demand(str(entry["class"]), count, colour)
    name, target = position[0], int(position[1])
    if name not in RELATIONS:
        raise ValueError(f"position {name!r} is unknown; known: {', '.join(RELATIONS)}")
    if not 0 <= target < index:
        raise ValueError(f"position points at include[{target}]; it has to be an earlier entry")
    return Demand(str(entry["class"]), count, colour, (name, target))
