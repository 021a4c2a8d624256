"""Whether a hypothesis holds: intervals over seeds and prompts together.

A bootstrap of two levels: seeds are drawn again with their number, and prompts within their task with theirs, the same
ones for all arms, since these share seeds, prompts and first noises. With three seeds the spread between seeds is known
poorly: where it is large, an interval of 95 % covers the truth 84 times of 100, and where it is small, 99 times. Each
seed's own number stands beside it.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.comparison.hypotheses import AVERAGE, Hypothesis, Test

__all__ = ["Finding", "Scores", "Verdict", "decide"]

RESAMPLES = 4000
LEVEL = (2.5, 97.5)
ROUNDING = 1e-9
"""Of equal sums that are taken in other orders."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and the same of each bootstrap sample and of each seed."""

    value: float
    drawn: Floats
    by_seed: Floats

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.drawn - other.drawn, self.by_seed - other.by_seed)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(np.divide(self.value, other.value))
            return Estimate(value, self.drawn / other.drawn, self.by_seed / other.by_seed)


def _mean(of: Sequence[Estimate]) -> Estimate:
    return Estimate(
        float(np.mean([one.value for one in of])),
        np.mean([one.drawn for one in of], axis=0),
        np.mean([one.by_seed for one in of], axis=0),
    )


class Scores:
    """What arms scored: arm -> seed -> task -> one number a prompt."""

    def __init__(
        self, found: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]], averaged: Sequence[str]
    ) -> None:
        self.found, self.averaged = found, tuple(averaged)

    def seeds(self, arms: Sequence[str]) -> tuple[int, ...]:
        """Those that all of these arms have."""
        each = [set(self.found.get(arm, {})) for arm in arms]
        return tuple(sorted(set.intersection(*each))) if each else ()

    def estimate(self, arm: str, score: str, seeds: Sequence[int]) -> Estimate:
        """Of a task, or the mean of the averaged ones.

        Every arm is resampled alike: the same seeds, and the same prompts of a task.
        """
        if score == AVERAGE:
            return _mean([self.estimate(arm, task, seeds) for task in self.averaged])
        values = np.asarray([self.found[arm][seed][score] for seed in seeds], dtype=np.float64)
        values = values[:, ~np.isnan(values).any(axis=0)]  # which prompts a score applies to is the same for all
        of_seeds, of_prompts = _counts("seeds", len(seeds)), _counts(score, values.shape[1])
        drawn = np.einsum("bs,sp,bp->b", of_seeds, values, of_prompts, optimize=True) / values.size
        return Estimate(float(values.mean()), drawn, values.mean(axis=1))


@cache
def _counts(of: str, count: int) -> Floats:
    """How often each of so many seeds, or prompts of a task, is drawn in each sample."""
    rows = np.random.default_rng([zlib.crc32(of.encode()), count]).integers(0, count, (RESAMPLES, count))
    found = np.zeros((RESAMPLES, count))
    np.add.at(found, (np.arange(RESAMPLES)[:, None], rows), 1.0)
    return found


@dataclass(frozen=True, slots=True)
class Finding:
    """One test's number."""

    says: str
    value: float | None
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    at_least: float
    seeds: int
    """That are in, of ``of_seeds``."""
    of_seeds: int

    @property
    def verdict(self) -> str:
        """One of holds, fails and undecided; before all seeds are in, that."""
        if self.seeds < self.of_seeds:
            return f"{self.seeds} of {self.of_seeds} seeds"
        if self.low is None or self.high is None:
            return "undecided"
        if self.low >= self.at_least - ROUNDING:
            return "holds"
        return "fails" if self.high < self.at_least - ROUNDING else "undecided"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hypothesis and what came out."""

    name: str
    says: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """That all findings hold, or that one fails; nothing where seeds are missing, or nothing was found."""
        if not self.findings:
            return "undecided"
        if any(finding.seeds < finding.of_seeds for finding in self.findings):
            return "unfinished"
        all_of = [finding.verdict for finding in self.findings]
        return next((one for one in ("fails", "undecided") if one in all_of), "holds")

    def told(self) -> dict[str, Any]:
        """As JSON."""
        findings = [asdict(one) | {"verdict": one.verdict} for one in self.findings]
        return {"says": self.says, "verdict": self.verdict, "findings": findings}


def decide(name: str, hypothesis: Hypothesis, scores: Scores, seeds: Sequence[int]) -> Verdict:
    """From all its tests, once all these seeds are in."""
    findings = [finding for test in hypothesis.tests for finding in _findings(test, scores, len(seeds))]
    return Verdict(name, hypothesis.says, tuple(findings))


def _findings(test: Test, scores: Scores, of_seeds: int) -> Iterator[Finding]:
    for says, arms, make in _measured(test, scores):
        seeds = scores.seeds(arms)
        yield _finding(says, make(seeds) if seeds else None, test.at_least, len(seeds), of_seeds)


def _measured(test: Test, scores: Scores) -> Iterator[tuple[str, Sequence[str], Callable[[Sequence[int]], Estimate]]]:
    """What is measured, of which arms, and how with their seeds."""
    if test.kind == "difference":
        for other in test.to:
            make = partial(_difference, scores, test.of, other, test.score)
            yield f"{test.of} - {other}, {test.score}", (test.of, other), make
    elif test.kind == "ratio":
        for task, other in test.specialists.items():
            yield f"{test.of} / {other}, {task}", (test.of, other), partial(_ratio, scores, test.of, other, task)
    else:
        assert test.base is not None
        says = f"{test.of}: share of the gain in {test.easiest} less that in the others"
        yield says, (test.of, test.base, *test.specialists.values()), partial(_uneven, test, scores)


def _difference(scores: Scores, of: str, to: str, score: str, seeds: Sequence[int]) -> Estimate:
    return scores.estimate(of, score, seeds) - scores.estimate(to, score, seeds)


def _ratio(scores: Scores, of: str, to: str, score: str, seeds: Sequence[int]) -> Estimate:
    return scores.estimate(of, score, seeds) / scores.estimate(to, score, seeds)


def _uneven(test: Test, scores: Scores, seeds: Sequence[int]) -> Estimate:
    gains = {task: _gain(test, task, scores, seeds) for task in test.specialists}
    assert test.easiest is not None
    easiest = gains.pop(test.easiest)
    return easiest - _mean([*gains.values()])


def _gain(test: Test, task: str, scores: Scores, seeds: Sequence[int]) -> Estimate:
    """(of - base) / (specialist - base)."""
    assert test.base is not None
    base = scores.estimate(test.base, task, seeds)
    own = scores.estimate(test.specialists[task], task, seeds) - base
    return (scores.estimate(test.of, task, seeds) - base) / own


def _finding(says: str, made: Estimate | None, at_least: float, seeds: int, of_seeds: int) -> Finding:
    if made is None or not np.isfinite([made.value, *made.by_seed, *made.drawn]).all():  # a share of no gain, too
        return Finding(says, None, None, None, (), at_least, seeds, of_seeds)
    low, high = np.percentile(made.drawn, LEVEL).tolist()
    return Finding(says, made.value, low, high, tuple(made.by_seed.tolist()), at_least, seeds, of_seeds)
