"""What a worker's record must look like before anything is built on it: another process may answer anything.

Numbers (NaN) are in the arrays, which the driver never sees; whoever reads them next checks those.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from opd_ray.runtime.hosts import Drawn
from opd_ray.storage.packing import AnswerRecord, Manifest
from opd_ray.types import Scored, WeightVersion, WorkItem

__all__ = ["drawn_for", "marked_for", "scored_for"]

Check = Callable[[Any], str]
"""A record -> what is wrong with it, or an empty text."""


def drawn_for(item: WorkItem, version: WeightVersion, states: range, *, velocities: bool = False) -> Check:
    """The record of a drawing of these states of an item, with weights of this version; with its velocities, too."""

    def check(record: Any) -> str:
        if not isinstance(record, Drawn):
            return f"a {type(record).__name__}, expected a drawing"
        trajectory = record.trajectory
        if trajectory.weights != version:
            return f"weights {trajectory.weights}, expected {version}"
        if trajectory.item != item:
            return f"a drawing of {trajectory.item}"
        rows, steps = len(item.prompts), len(states) - (states[0] == 0)
        wrong = _shape(trajectory.manifest, "latents", (rows, len(states)))
        return wrong or (_shape(trajectory.manifest, "velocities", (rows, steps)) if velocities else "")

    return check


def marked_for(item: WorkItem, teacher: str, states: range) -> Check:
    """The record of a teacher's answer at the trained ones of these states."""
    steps = tuple(step for step in item.steps if step in states)

    def check(record: Any) -> str:
        if not isinstance(record, AnswerRecord):
            return f"a {type(record).__name__}, expected a teacher's answer"
        if (record.teacher, record.steps) != (teacher, steps):
            return f"steps {record.steps} of {record.teacher}, expected {steps} of {teacher}"
        return _shape(record.manifest, "velocity", (len(item.prompts), len(steps)))

    return check


def scored_for(count: int, rewards: Sequence[str]) -> Check:
    """The record of these rewards' scores of so many pictures; NaN is for those that one does not apply to."""

    def check(record: Any) -> str:
        if not isinstance(record, Scored):
            return f"a {type(record).__name__}, expected scores by reward"
        if sorted(record.scores) != sorted(rewards):
            return f"scores of {', '.join(map(str, record.scores)) or 'no reward'}, expected {', '.join(rewards)}"
        found: Any = record.scores
        for name, scores in found.items():
            if not isinstance(scores, Sequence) or len(scores) != count:
                return f"{scores!r} of reward {name}, expected {count} numbers"
            if any(not isinstance(score, float) or math.isinf(score) for score in scores):
                return f"{scores!r} of reward {name}, expected finite numbers or NaN"
        return ""

    return check


def _shape(manifest: Manifest, name: str, first: tuple[int, ...]) -> str:
    found = next((entry.shape for entry in manifest.entries if entry.name == name), None)
    if found is None or found[: len(first)] != first or len(found) != 5:
        return f"{name} of shape {found}, expected {first} and then C, H, W"
    return ""
