"""What a round's row of metrics.jsonl says: what was learned, and what every role did with its time."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opd_ray.experience import Round
from opd_ray.learners import UpdateReport
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import LearnerGroup
from opd_ray.runtime.readers import PairsRead
from opd_ray.runtime.usage import Usage
from opd_ray.scoring import Picture

__all__ = ["TimeBooks", "learned", "scored_pictures", "scores_of", "ties_alone", "told_of", "told_of_pairs"]

SHOWN = 3
"""Broken pairs that are named at the end."""


def learned(batch: Round, updates: Sequence[Sequence[UpdateReport]]) -> dict[str, Any]:
    """Losses, metrics by task and step, and scores of a round.

    Args:
        batch: the round.
        updates: a report a rank, of each of its updates.
    """
    last, every = updates[-1], [report for reports in updates for report in reports]
    tasks = _merge([report.tasks for report in every])
    total = sum(report.loss for report in every) / len(updates)
    loss = {"total": total} | {task: s / n for task, (s, n) in tasks.items()}
    row: dict[str, Any] = {
        "round": batch.number,
        "time": time.time(),
        "loss": loss,
        "grad_norm": last[0].grad_norm,
        "lr": last[0].lr,
        "skipped_steps": sum(reports[0].skipped for reports in updates),
    }
    found = [metrics for report in every for steps in report.steps.values() for metrics in steps.values()]
    for metric in dict.fromkeys(name for metrics in found for name in metrics):
        row.setdefault(metric, _steps(every, metric))
    if any("ratio" in metrics for metrics in found):  # before anything was learned: rollout and learner agree so far
        row["first_ratio"] = _steps(updates[0], "ratio")
    scores = {name: sum(values) / len(values) for name, values in scores_of(batch).items()}
    return row | _pairs(batch) | ({"scores": scores} if scores else {})


class TimeBooks:
    """Who waited for whom: a round's worker-seconds by role."""

    def __init__(self, dispatcher: Dispatcher, learner: LearnerGroup) -> None:
        self._dispatcher, self._learner = dispatcher, learner
        self._seen: dict[str, Usage] = {}
        self.close()

    def close(self) -> None:
        """What comes from now on belongs to the next round."""
        self._seen = {pool.spec.role: pool.usage for pool in self._dispatcher.pools}
        self._since = time.perf_counter()

    def round(self, seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Role -> mean workers up, and their worker-seconds at work, on the way, waiting for input and for output.

        Args:
            seconds: the round's own, in all (``round``) and at work by role (``learner``).
        """
        wall = time.perf_counter() - self._since
        found = {}
        for pool in self._dispatcher.pools:
            spent = asdict(pool.usage - self._seen.get(pool.spec.role, Usage()))
            whole = spent.pop("seconds")
            found[pool.spec.role] = spent | {"workers": spent["workers"] / whole if whole else 0.0}
        ranks, busy, waited = len(self._learner.ranks), seconds["learner"], self._learner.waited
        found["learner"] = {
            "workers": float(ranks),
            "busy": busy,
            "input": waited,
            # The rest of the round goes into transport, publishing and the ranks' waiting for one another.
            "transfer": max(ranks * seconds["round"] - busy - waited, 0.0),
            "output": max(ranks * (wall - seconds["round"]), 0.0),
        }
        return found


def _merge(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Sums and counts over ranks."""
    merged: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = merged.get(name, (0.0, 0))
            merged[name] = (before[0] + total, before[1] + count)
    return merged


def _steps(reports: Sequence[UpdateReport], metric: str) -> dict[str, dict[str, float]]:
    """Task -> step -> mean of a metric."""
    tasks = {task: None for report in reports for task in report.steps}
    means: dict[str, dict[str, float]] = {}
    for task in tasks:
        found = _merge(
            [
                {
                    str(step): metrics[metric]
                    for step, metrics in report.steps.get(task, {}).items()
                    if metric in metrics
                }
                for report in reports
            ]
        )
        if found:
            means[task] = {step: found[step][0] / found[step][1] for step in sorted(found, key=int)}
    return means


def _pairs(batch: Round) -> dict[str, Any]:
    """How many pairs were read, and those of them in whose places others stand."""
    found = [job.result.value for job in batch.jobs if job.result and isinstance(job.result.value, PairsRead)]
    faults = [fault for read in found for fault in read.faults]
    counts = {"pairs": {"read": sum(read.pairs for read in found), "broken": len(faults)}} if found else {}
    return counts | ({"broken_pairs": faults} if faults else {})


def ties_alone(row: Mapping[str, Any]) -> bool:
    """Whether a round compared images, and all of them were as good as each other."""
    ties = [share for steps in row.get("ties", {}).values() for share in steps.values()]
    return bool(ties) and min(ties) == 1


def told_of(row: Mapping[str, Any], teacher_of_task: Mapping[str, str], *, tied_before: bool) -> Iterator[str]:
    """What of a round's row a person should know at once.

    Args:
        row: of any round.
        teacher_of_task: names of teachers that are not their task's.
        tied_before: whether an earlier round had ties alone, which is told once.
    """
    number = row["round"]
    if row["skipped_steps"]:
        yield f"round {number + 1}: the fp16 gradient overflowed; the step was skipped, the loss scale halved"
    if ties_alone(row) and not tied_before:
        yield (
            f"round {number + 1}: the images of every prompt have equal rewards (ties 1 in metrics.jsonl): "
            "nothing to learn"
        )
    for task, steps in row.get("gap", {}).items() if number == 0 else ():
        if steps and not any(steps.values()):
            name = teacher_of_task.get(task, task)
            yield f"teacher {name} answers {task} exactly as the student does: it teaches nothing yet"


def told_of_pairs(rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence about the pairs of a whole run that could not be read, from its rows; empty where there was none."""
    found = list[str]()
    for row in rows:
        found += row.get("broken_pairs", [])
    if not found:
        return ""
    distinct = list(dict.fromkeys(found))
    more = f" and {len(distinct) - SHOWN} more in broken_pairs of metrics.jsonl" if len(distinct) > SHOWN else ""
    return (
        f"pairs: {len(distinct)} have broken pictures, and others of their windows stood in for them: "
        f"{'; '.join(distinct[:SHOWN])}{more}"
    )


def scores_of(batch: Round) -> dict[str, list[float]]:
    """Each reward's scores of the pictures it applies to; of several of an image the last, and the first apart."""
    values: dict[str, list[float]] = {}
    for one in batch.collected:
        rows, scored = len(one.item.prompts), one.share().scores
        for name, scores in (scored.scores if scored is not None else {}).items():
            each = max(len(scores) // rows, 1)
            parts = {name: scores[each - 1 :: each]} | ({f"{name}, first step": scores[::each]} if each > 1 else {})
            for label, part in parts.items():
                values.setdefault(label, []).extend(score for score in part if not math.isnan(score))
    return {name: scores for name, scores in values.items() if scores}


def scored_pictures(batch: Round) -> list[Picture]:
    """Every picture that was scored."""
    found = list[Picture]()
    for one in batch.collected:
        item, scored = one.item, one.share().scores
        count = len(next(iter(scored.scores.values()), [])) if scored is not None else 0
        each = count // len(item.prompts)
        found += [
            (item.prompts[place // each], item.samples[place // each], scored, place)
            for place in range(count)
            if scored is not None
        ]
    return found
