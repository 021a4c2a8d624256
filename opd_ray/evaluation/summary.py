"""What is made of an evaluation's rows: means with intervals, GenEval's tags, wins of one model over another."""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from opd_ray.evaluation.parts import ERROR, SCORE, score_of
from opd_ray.evaluation.statistics import mean_by_prompt, mean_of_tags, wins

__all__ = ["failures", "summary"]

Row = Mapping[str, Any]
LISTED = 20
"""Failures in a summary; the table of pictures has all of them."""


def summary(rows: Sequence[Row], rewards: Sequence[str]) -> dict[str, Any]:
    """Scores by model, task and reward; by tag where prompts have one; and wins of each model over each other.

    A picture that a reward failed on is left out and counted (``failed``), one that it does not apply to too
    (``does_not_apply``). Pictures of one prompt text are resampled together.
    """
    models, tasks = _values(rows, "model"), _values(rows, "task")
    cells = {
        (model, task, reward): [row for row in rows if row["model"] == model and row["task"] == task]
        for model in models
        for task in tasks
        for reward in rewards
    }
    cells = {key: own for key, own in cells.items() if any(_tried(row, key[2]) for row in own)}
    return {
        "scores": _nested(cells, _mean),
        "tags": _nested({key: own for key, own in cells.items() if any(row["tag"] for row in own)}, _tags),
        "wins": [
            found
            for (model, other), task, reward in itertools.product(itertools.combinations(models, 2), tasks, rewards)
            if (model, task, reward) in cells and (other, task, reward) in cells
            for found in [_wins(cells[model, task, reward], cells[other, task, reward], reward)]
            if found["n"]
        ],
        "failures": failures(rows, rewards)[:LISTED],
    }


def failures(rows: Sequence[Row], rewards: Sequence[str]) -> list[dict[str, Any]]:
    """Each picture that a reward failed on, and why."""
    known = ("model", "task", "prompt", "sample", "file")
    return [
        {"reward": reward, **{name: row[name] for name in known}, "error": row[ERROR + reward]}
        for row in rows
        for reward in rewards
        if row[ERROR + reward] is not None
    ]


def _values(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _tried(row: Row, reward: str) -> bool:
    """Whether there is anything to tell of a picture: a score or a failure."""
    return row[SCORE + reward] is not None or row[ERROR + reward] is not None


def _nested(
    cells: Mapping[tuple[str, str, str], Sequence[Row]], of: Callable[[Sequence[Row], str], dict[str, Any]]
) -> dict[str, Any]:
    """Model -> task -> reward."""
    found: dict[str, Any] = {}
    for (model, task, reward), rows in cells.items():
        found.setdefault(model, {}).setdefault(task, {})[reward] = of(rows, reward)
    return found


def _columns(rows: Sequence[Row], reward: str) -> tuple[list[float], list[Hashable]]:
    return [score_of(row, reward) for row in rows], [row["prompt"] for row in rows]


def _mean(rows: Sequence[Row], reward: str) -> dict[str, Any]:
    failed = sum(row[ERROR + reward] is not None for row in rows)
    told = mean_by_prompt(*_columns(rows, reward))
    return {**told, "failed": failed, "does_not_apply": len(rows) - failed - int(told["n"] or 0)}


def _tags(rows: Sequence[Row], reward: str) -> dict[str, Any]:
    """Each tag's mean, and the mean of these, as GenEval's official overall score is made."""
    by_tag = {tag: [row for row in rows if row["tag"] == tag] for tag in _values(rows, "tag") if tag}
    overall = mean_of_tags({tag: _columns(own, reward) for tag, own in by_tag.items()})
    return {"overall": overall, "by_tag": {tag: _mean(own, reward) for tag, own in by_tag.items()}}


def _wins(ours: Sequence[Row], theirs: Sequence[Row], reward: str) -> dict[str, Any]:
    """Of the first model over the second, at pictures of the same prompt and sample."""
    other = {(row["prompt_id"], row["sample"]): score_of(row, reward) for row in theirs}
    values, prompts = _columns(ours, reward)
    against = [other.get((row["prompt_id"], row["sample"]), math.nan) for row in ours]
    who = {"model": ours[0]["model"], "over": theirs[0]["model"], "task": ours[0]["task"], "reward": reward}
    return who | wins(values, against, prompts)
