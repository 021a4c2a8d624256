"""Hypotheses of a protocol: what is expected, and the tests that decide it."""

from typing import Literal

from pydantic import Field, model_validator

from opd_ray.config.section import Frozen

__all__ = ["AVERAGE", "Hypothesis", "Test"]

AVERAGE = "average"
NEEDS = {"difference": ("to",), "ratio": ("specialists",), "uneven": ("specialists", "easiest", "base")}
"""Kind -> keys without which it tests nothing."""
OPTIONAL = {"difference": ("score",)}


class Test(Frozen):
    """One thing that has to be so for a hypothesis to hold."""

    kind: Literal["difference", "ratio", "uneven"]
    """difference: of - to, in a score. ratio: of / to, of each task. uneven: the share of the specialists' gain that
    ``of`` has in its easiest task, less its mean share in the others."""
    of: str
    """An arm."""
    to: tuple[str, ...] = ()
    """Of difference: arms, each of which has to be beaten."""
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

    @model_validator(mode="after")
    def _complete(self) -> "Test":
        needs = NEEDS[self.kind]
        takes = ("kind", "of", *needs, *OPTIONAL.get(self.kind, ()), "at_least")
        for key in needs:
            if not getattr(self, key):
                raise ValueError(f"kind: {self.kind} needs {key}, without which it tests nothing")
        for key in type(self).model_fields:
            if key in self.model_fields_set and key not in takes:
                raise ValueError(f"kind: {self.kind} takes no {key}; it takes {', '.join(takes)}")
        if self.kind == "uneven":
            known = ", ".join(self.specialists)
            if self.easiest not in self.specialists:
                raise ValueError(f"easiest: no task {self.easiest!r} among specialists; known: {known}")
            if len(self.specialists) < 2:
                raise ValueError(f"specialists has {known} alone; kind: uneven compares the easiest with others")
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.of, *self.to, *self.specialists.values(), *([self.base] if self.base else []))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Whose scores it takes; ``average`` may be among them for a difference alone."""
        return (self.score,) if self.kind == "difference" else tuple(self.specialists)


class Hypothesis(Frozen):
    """What is expected: it holds where all tests do, and fails where one fails."""

    says: str
    """In words."""
    tests: tuple[Test, ...] = Field(min_length=1)
    """What it is decided by."""
