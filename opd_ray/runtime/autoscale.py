"""When a role gets more workers, and when fewer: a pure function of what its pool counted, without Ray or a clock."""

from dataclasses import dataclass, field

from opd_ray.config import Autoscale
from opd_ray.runtime.usage import Usage

__all__ = ["Autoscaler"]

WINDOW_S = 30.0
"""Wall seconds that are looked at together, at least."""
WINDOW_ANSWERS = 20
"""And so many answers: fewer say nothing."""
WORKER_ANSWERS = 3
"""And so many for each worker: they tell their busy time when they answer."""
COOLDOWN_WINDOWS = 2
"""After a change the effect has to show first."""
CALM_WINDOWS = 2
"""So many quiet windows in a row before a worker goes: one may be chance."""
CALM = 0.25
"""Quiet: work waited for less than this part of the target."""
FULL = 0.8
"""The remaining workers must be able to do the same work in this share of their time."""
SATURATED = 0.8
"""From this busy share on a queue says that more than one worker is missing."""
SMALLER = 0.75
"""Below this part of the load at which a number of workers was too few, it may be enough."""
HOLD_S = 3600.0
"""So long a number of workers that was too few is not tried again at that load; twice as long after each vain trial."""
BACKOFF_S = 120.0
"""How long a growth that found no room is not asked for again; twice as long after each time."""
BACKOFF_LIMIT_S = 3600.0


@dataclass(slots=True)
class Autoscaler:
    """The size of one role. All its times are wall seconds of that role's usage."""

    limits: Autoscale
    _asked: int = 0
    """The size that was last wished for, by it or by a person; 0 before the first look."""
    _start: Usage = field(default_factory=Usage)
    _cooldown: int = 0
    """Windows that pass without a change."""
    _calm: int = 0
    _last: int = 0
    """By how many workers it changed last; 0 where there was no room for them."""
    _too_few: int = 0
    _load: float = 0.0
    """Workers kept busy, on average, when ``_too_few`` were found too few."""
    _held_until: float = 0.0
    _hold: float = HOLD_S
    _no_room_until: float = 0.0
    _backoff: float = BACKOFF_S

    def decide(self, size: int, usage: Usage, *, settled: bool) -> int:
        """The wanted size; to be called about once a second.

        Args:
            size: what the pool aims at now.
            usage: what it has counted.
            settled: no worker starts or drains.
        """
        if not self._asked:
            self._asked, self._start = size, usage
        if size < self._asked:  # nobody but the pool itself took it back: there was no room
            self._no_room_until = usage.seconds + self._backoff
            self._backoff = min(2 * self._backoff, BACKOFF_LIMIT_S)
            self.aim(size, usage)
            self._last = 0
        if not settled:
            self._start, self._calm = usage, 0
            return size
        window = usage - self._start
        if window.seconds < WINDOW_S or window.answers < max(WINDOW_ANSWERS, WORKER_ANSWERS * size):
            return size
        self._start = usage
        if self._last > 0:
            self._backoff = BACKOFF_S  # they found room and are at work
        wanted = self._judge(size, window, usage.seconds)
        if wanted != size:
            self.aim(wanted, usage)
        return wanted

    def aim(self, size: int, usage: Usage) -> None:
        """Note a new size, whoever wants it, and let it show what it does."""
        self._last = size - self._asked if self._asked else 0
        self._asked, self._start = size, usage
        self._cooldown, self._calm = COOLDOWN_WINDOWS, 0

    def _judge(self, size: int, window: Usage, now: float) -> int:
        queued, load = window.queued / window.seconds, window.busy / window.seconds
        self._calm = self._calm + 1 if queued < CALM * self.limits.target else 0
        if self._cooldown:
            self._cooldown -= 1
            return size
        if queued > self.limits.target:
            return self._grown(size, window, queued, load, now)
        held = size - 1 <= self._too_few and now < self._held_until and load > SMALLER * self._load
        if self._calm >= CALM_WINDOWS and size > self.limits.min and load <= FULL * (size - 1) and not held:
            return size - 1
        return size

    def _grown(self, size: int, window: Usage, queued: float, load: float, now: float) -> int:
        more = 1
        if window.busy >= SATURATED * window.workers:
            more = max(1, round(size * queued))
        wanted = min(size + more, self.limits.max)
        if wanted <= size or now < self._no_room_until:
            return size
        if self._last < 0 and size <= self._too_few:
            self._hold *= 2
        self._too_few, self._load, self._held_until = size, load, now + self._hold
        return wanted
