"""Means with intervals, by a paired bootstrap over prompts."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["gap_closed", "mean"]

RESAMPLES = 2000
LEVEL = (2.5, 97.5)

Floats = npt.NDArray[np.float64]


def mean(scores: Sequence[float], seed: int = 0) -> dict[str, float | None]:
    """Mean, 95 % bootstrap interval and count of scores that apply (not NaN); None where there are none."""
    values = np.asarray(scores, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "low": None, "high": None, "n": 0}
    means = values[_rows(len(values), seed)].mean(axis=1)
    low, high = np.percentile(means, LEVEL)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def gap_closed(
    base: Sequence[float], teacher: Sequence[float], student: Sequence[float], seed: int = 0
) -> dict[str, float] | None:
    """(student - base) / (teacher - base) with its 95 % interval; None where the teacher is no better than base.

    The same prompts and first noise stand behind all three, so they are resampled together.
    """
    rows = np.stack([np.asarray(values, dtype=np.float64) for values in (base, teacher, student)])
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    if not rows.shape[1]:
        return None
    start, goal, got = rows.mean(axis=1)
    if goal <= start:
        return None
    picked = rows[:, _rows(rows.shape[1], seed)].mean(axis=2)
    gaps = picked[1] - picked[0]
    usable = gaps > 0
    if not usable.any():
        return None
    low, high = np.percentile((picked[2] - picked[0])[usable] / gaps[usable], LEVEL)
    return {"value": float((got - start) / (goal - start)), "low": float(low), "high": float(high)}


def _rows(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
