"""The learner's ranks as they are watched: each is asked for a sign of life beside whatever it does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_ray.errors import LearnerLostError
from opd_ray.runtime.handle import Beat, Call, Done, Handle, Ref
from opd_ray.runtime.telling import last_signs, place
from opd_ray.runtime.watch import BEATS

__all__ = ["Ranks"]


@dataclass(slots=True)
class _Rank:
    number: int
    handle: Handle
    beat: Call | None = None
    beat_at: float = -math.inf
    """When it was last asked."""
    pulse: Beat | None = None
    pulse_at: float | None = None
    """When it last answered."""
    gone: Exception | None = None
    """What a request for a sign of life ended with."""


class Ranks:
    """Of one group, from when all of them are up."""

    def __init__(
        self, handles: Sequence[Handle], logs: Path | None, clock: Callable[[], float], beat_timeout_s: float
    ) -> None:
        self.pending: dict[Ref, _Rank] = {}
        """Whose sign of life each outstanding record is."""
        self._ranks = [_Rank(number, handle) for number, handle in enumerate(handles)]
        self._logs, self._clock, self._timeout = logs, clock, beat_timeout_s

    def check(self) -> None:
        """Ask for a sign of life where one is due.

        Raises:
            LearnerLostError: a rank is gone, or gave none for too long: it was stopped, or something holds Python's
                lock for ever.
        """
        now = self._clock()
        for rank in self._ranks:
            name, number = self.name(rank.number), rank.number
            if rank.gone is not None:
                raise LearnerLostError(f"{name} was lost ({rank.gone}){self.last_signs(number)}")
            if rank.beat is not None and now - rank.beat_at > self._timeout:
                raise LearnerLostError(f"{name} gave no sign of life in {self._timeout:.0f} s{self.last_signs(number)}")
            if rank.beat is None and now - rank.beat_at > self._timeout / BEATS:
                rank.beat, rank.beat_at = rank.handle.beat(), now
                if rank.beat is not None:
                    self.pending[rank.beat.done] = rank

    def heard(self, ref: Ref, done: Done) -> None:
        """A sign of life came."""
        rank = self.pending.pop(ref)
        rank.pulse, rank.pulse_at, rank.beat = done.value, self._clock(), None

    def gone(self, ref: Ref, error: Exception) -> None:
        """The rank is gone. Whoever waits for its work hears of it too, and knows more: ``check`` tells it later."""
        self.pending.pop(ref).gone = error

    def name(self, rank: int) -> str:
        """What it is called, and where it ran as far as that is known."""
        return f"learner rank {rank}{place(self._ranks[rank].pulse)}"

    def last_signs(self, rank: int) -> str:
        """Its last sign of life and the end of its log, as the end of a sentence."""
        one = self._ranks[rank]
        return last_signs(self._logs, one.handle.name, one.pulse, one.pulse_at, self._clock())
