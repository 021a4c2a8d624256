"""Means with intervals, by a paired bootstrap over prompts."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["gap_closed", "mean", "mean_by_prompt", "mean_of_tags", "wins"]

RESAMPLES = 2000
FEWEST = 2
"""Prompts below which there is no interval: resampling one prompt gives it again, which says nothing about others."""
BLOCK = 200
"""Resamples at a time: tens of thousands of prompts fit into memory too."""
LEVEL = (2.5, 97.5)

Floats = npt.NDArray[np.float64]


def mean(scores: Sequence[float], seed: int = 0) -> dict[str, float | None]:
    """Mean, 95 % bootstrap interval and count of scores that apply (not NaN).

    The mean is None where there are none, the interval where there is but one.
    """
    values = np.asarray(scores, dtype=np.float64)
    values = values[~np.isnan(values)]
    means = values[_rows(len(values), seed)].mean(axis=1) if len(values) >= FEWEST else np.empty(0)
    return _told(float(values.mean()) if len(values) else None, means, len(values))


def gap_closed(
    base: Sequence[float], teacher: Sequence[float], student: Sequence[float], seed: int = 0
) -> dict[str, float | None] | None:
    """(student - base) / (teacher - base) with its 95 % interval; None where the teacher is no better than base.

    The same prompts and first noise stand behind all three, so they are resampled together; one alone has no interval.
    """
    rows = np.stack([np.asarray(values, dtype=np.float64) for values in (base, teacher, student)])
    rows = rows[:, ~np.isnan(rows).any(axis=0)]
    if not rows.shape[1]:
        return None
    start, goal, got = rows.mean(axis=1)
    if goal <= start:
        return None
    value = float((got - start) / (goal - start))
    if rows.shape[1] < FEWEST:
        return {"value": value, "low": None, "high": None}
    picked = rows[:, _rows(rows.shape[1], seed)].mean(axis=2)
    gaps = picked[1] - picked[0]
    usable = gaps > 0
    if not usable.any():
        return None
    low, high = np.percentile((picked[2] - picked[0])[usable] / gaps[usable], LEVEL)
    return {"value": value, "low": float(low), "high": float(high)}


def mean_by_prompt(scores: Sequence[float], prompts: Sequence[Hashable], seed: int = 0) -> dict[str, float | None]:
    """As ``mean``, of several pictures of each prompt: prompts are resampled, with all of their pictures.

    Pictures of one prompt are no independent evidence about the model: an interval that took them so would be too
    narrow by up to the root of their number. There is none where all are of one prompt.

    Args:
        scores: one a picture, NaN where there is none.
        prompts: whose picture each is.
        seed: of the resampling.
    """
    values, means = _resampled(scores, prompts, seed)
    return _told(float(np.mean(values)), means, len(values)) if len(values) else _told(None, means, 0)


def mean_of_tags(
    tags: Mapping[str, tuple[Sequence[float], Sequence[Hashable]]], seed: int = 0
) -> dict[str, float | None]:
    """The mean of the tags' means, each tag as much as another: GenEval's overall score (arXiv 2310.11513, Section 4).

    Args:
        tags: of each its scores and their prompts, as ``mean_by_prompt``; prompts are resampled within their tag.
        seed: of the resampling.

    Returns:
        Value, interval and number of pictures; None where one of the tags has no score, and no interval where one of
        them has but one prompt.
    """
    found = [_resampled(scores, prompts, seed + number) for number, (scores, prompts) in enumerate(tags.values())]
    count = sum(len(values) for values, _ in found)
    if not found or not all(len(values) for values, _ in found):
        return _told(None, np.empty(0), count)
    value = float(np.mean([np.mean(values) for values, _ in found]))
    known = all(len(means) for _, means in found)
    return _told(value, np.mean([means for _, means in found], axis=0) if known else np.empty(0), count)


def wins(
    ours: Sequence[float], theirs: Sequence[float], prompts: Sequence[Hashable], seed: int = 0
) -> dict[str, float | None]:
    """How often the first of two models is better at the same prompts and first noises; a tie is half a win.

    Args:
        ours: one score a picture, NaN where there is none; such pictures are left out.
        theirs: of the other model's picture of the same prompt and sample.
        prompts: whose picture each is; they are resampled.
        seed: of the resampling.

    Returns:
        Value in [0, 1], its 95 % interval, the number of pictures that both have a score of, and of ties among them.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
    outcome = np.where(first > second, 1.0, np.where(first == second, 0.5, 0.0))
    outcome[np.isnan(first) | np.isnan(second)] = np.nan
    return mean_by_prompt(outcome.tolist(), prompts, seed) | {"ties": int((outcome == 0.5).sum())}


def _resampled(scores: Sequence[float], prompts: Sequence[Hashable], seed: int) -> tuple[Floats, Floats]:
    """The scores that are there, and the means of bootstrap samples of their prompts; none of too few prompts."""
    values = np.asarray(scores, dtype=np.float64)
    there = ~np.isnan(values)
    values, means = values[there], np.empty(0)
    if len(values):
        numbers: dict[Hashable, int] = {}
        groups = [numbers.setdefault(prompt, len(numbers)) for prompt, kept in zip(prompts, there, strict=True) if kept]
        sums, counts = np.bincount(groups, values), np.bincount(groups)
        rng, parts = np.random.default_rng(seed), [means]
        for _ in range(0, RESAMPLES if len(sums) >= FEWEST else 0, BLOCK):
            rows = rng.integers(0, len(sums), (BLOCK, len(sums)))
            parts.append(sums[rows].sum(axis=1) / counts[rows].sum(axis=1))
        means = np.concatenate(parts)
    return values, means


def _told(value: float | None, means: Floats, count: int) -> dict[str, float | None]:
    low, high = np.percentile(means, LEVEL).tolist() if len(means) else (None, None)
    return {"value": value, "low": low, "high": high, "n": count}


def _rows(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
