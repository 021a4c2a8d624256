"""Who scores pictures, and what is made of scores that failed or say nothing: failures are set aside, never numbers."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from opd_ray.answers import scored_for
from opd_ray.errors import TooManyFailedError
from opd_ray.metrics import MetricsLog
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.jobs import MAX_KILLED, Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.types import Prompt, Scored

__all__ = ["FAILURES", "Judges", "Panel", "Picture", "Watch", "a_few", "flat", "merged"]

FAILURES = "failures.jsonl"
"""Of a run folder: a row for each score that failed."""

Picture = tuple[Prompt, int, Scored, int]
"""Its prompt, its sample, the scores that it is among, and its place there."""
FEW = 8
MANY = 8
"""Pictures from which on one number for all of them is no chance."""
SAME_ROUNDS = 3
"""So many rounds in which a reward gave one number to all pictures are told of."""


@dataclass(frozen=True)
class Panel:
    """Workers that hold the same rewards."""

    pool: Pool
    rewards: tuple[str, ...]
    retries: int = 2
    max_failed: float = 0.05


class Judges:
    """The pools that score pictures: one for each reward with workers of its own, and one for all others."""

    def __init__(self, dispatcher: Dispatcher, panels: Sequence[Panel]) -> None:
        self.panels = tuple(panels)
        self._dispatcher = dispatcher

    @cached_property
    def proofs(self) -> dict[str, str]:
        """Reward -> how it proved itself before anything counted: to be asked for once all workers are up."""
        return {name: proof for panel in self.panels for name, proof in panel.pool.workers[0].facts.items()}

    @property
    def limits(self) -> dict[str, float]:
        """Reward -> share of pictures that it may fail on."""
        return {name: panel.max_failed for panel in self.panels for name in panel.rewards}

    def score(
        self, prompts: Sequence[Prompt], manifest: Callable[[], Any], images: Output, label: str, books: str = ""
    ) -> tuple[Job, ...]:
        """A job a pool, behind the one that draws.

        Args:
            prompts: one a picture.
            manifest: what the drawing's record says of its pictures, once it is there.
            images: the pictures.
            label: what is scored, in messages.
            books: of ``Job``.
        """
        return tuple(
            self._dispatcher.submit(
                Job(
                    panel.pool,
                    "score",
                    lambda: (prompts, manifest(), images),
                    0,
                    label,
                    after=(images.job,),
                    books=books,
                    check=scored_for(len(prompts), panel.rewards),
                    max_killed=max(panel.retries + 1, MAX_KILLED),  # fewer may be anybody's fault
                    otherwise=_Failed(panel.rewards, len(prompts)),
                )
            )
            for panel in self.panels
        )


@dataclass(frozen=True, slots=True)
class _Failed:
    """What stands for the scores of pictures on which one worker after the other was lost."""

    rewards: tuple[str, ...]
    count: int

    def __call__(self, why: str) -> Scored:
        return Scored(
            {name: [math.nan] * self.count for name in self.rewards},
            {name: dict.fromkeys(range(self.count), why) for name in self.rewards},
        )


def a_few(*sets: Sequence[Prompt]) -> list[Prompt]:
    """Some of each set, evenly spaced: a reward that is asked for numbers alone has to apply to one of them."""
    return [one[index * len(one) // min(FEW, len(one))] for one in sets for index in range(min(FEW, len(one)))]


def merged(jobs: Iterable[Job]) -> Scored:
    """The scores of all pools."""
    found = Scored({}, {})
    for job in jobs:
        assert job.result is not None
        found.scores.update(job.result.value.scores)
        found.errors.update(job.result.value.errors)
    return found


def flat(values: Mapping[str, Sequence[float]], where: str) -> list[str]:
    """A sentence for each reward that gave one number to all of many pictures.

    Args:
        values: reward -> its numbers; NaN does not count.
        where: of what, for the sentence.
    """
    found = []
    for name, numbers in values.items():
        told = [number for number in numbers if not math.isnan(number)]
        if len(told) >= MANY and min(told) == max(told):
            found.append(
                f"reward {name} gave {told[0]:.6g} to each of {len(told)} pictures of {where}: it tells nothing apart"
            )
    return found


@dataclass(slots=True)
class Watch:
    """What of a run's scores a person has to know: failures, and rewards that stopped telling pictures apart."""

    limits: Mapping[str, float]
    """Reward -> share of a round's or an evaluation's pictures, of those that it applies to, on which it may fail."""
    log: MetricsLog
    """Gets a row for each failure."""
    note: Callable[[str], None]
    round: int = 0
    """The one that is under way."""
    _same: dict[str, int] = field(default_factory=dict)
    _silent: dict[str, int] = field(default_factory=dict)
    """Reward that has scored before -> the last rounds of which it scored no picture."""

    def set_aside(self, rows: Sequence[Picture], where: str, **about: Any) -> dict[str, int]:
        """List what failed, and say so; returns how often, by reward.

        Args:
            rows: the pictures of a round or of an evaluation.
            where: which, for messages.
            about: goes into every row of the list.

        Raises:
            TooManyFailedError: a reward failed on more than it may.
        """
        found: list[dict[str, Any]] = [
            {"reward": name, "prompt": prompt.text, "id": prompt.id, "sample": sample, "error": errors[place]}
            for prompt, sample, scored, place in rows
            for name, errors in scored.errors.items()
            if place in errors
        ]
        for one in found:
            self.log.append({"round": self.round} | about | one)
        if found:
            self.note(
                f"{len(found)} scores of {where} failed and are set aside ({FAILURES} lists them); the last: "
                f"reward {found[-1]['reward']}, {found[-1]['error']}"
            )
        for name, limit in self.limits.items():
            failed = [row for row in found if row["reward"] == name]
            silent = sum(math.isnan(scored.scores[name][place]) for *_, scored, place in rows) - len(failed)
            if len(failed) > limit * (len(rows) - silent):
                raise TooManyFailedError(
                    f"reward {name} failed on {len(failed)} of {len(rows) - silent} pictures of {where}, more than "
                    f"max_failed {limit:g} allows; last error: {failed[-1]['error']}. Mend it, then go on with --resume"
                )
        return dict(Counter(row["reward"] for row in found))

    def same(self, values: Mapping[str, Sequence[float]]) -> list[str]:
        """Say which rewards have just given one number, or none, to all pictures of several rounds.

        Args:
            values: reward -> its numbers in a round; not there where it scored nothing.

        Returns:
            The sentences.
        """
        told = []
        for name in self._silent | dict.fromkeys(values, 0):
            self._silent[name] = 0 if name in values else self._silent[name] + 1
            if self._silent[name] == SAME_ROUNDS:
                told.append(
                    f"reward {name} scored no picture of the last {SAME_ROUNDS} rounds, and did before: it answers "
                    "NaN, which means that it does not apply, or fails; nothing is learned from it"
                )
        for name, numbers in values.items():
            alike = len(numbers) > 1 and min(numbers) == max(numbers)
            self._same[name] = self._same.get(name, 0) + 1 if alike else 0
            if self._same[name] == SAME_ROUNDS:
                told.append(
                    f"reward {name} gave {numbers[0]:.6g} to every picture of the last {SAME_ROUNDS} rounds: it tells "
                    "nothing apart, so nothing can be learned from it"
                )
        for text in told:
            self.note(text)
        return told
