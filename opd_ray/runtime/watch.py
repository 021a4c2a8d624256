"""When a worker is late, and when it is given up."""

from dataclasses import dataclass

from opd_ray.runtime.health import State
from opd_ray.runtime.roster import Worker

__all__ = ["Watch"]

PATIENCE = 10.0
"""A call may take so many times as long as the slowest before it."""
LEAST_PATIENCE_S = 60.0
BEATS = 6
"""Signs of life that a worker is asked for in the time after which it is given up without one."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Limits in seconds."""

    call_timeout_s: float
    beat_timeout_s: float

    def fault(self, worker: Worker, now: float, slowest: float) -> str:
        """Why a worker is to be given up; an empty text where it is not."""
        if worker.flying and now - worker.since > (limit := self._limit(worker, slowest)):
            return f"no answer in {limit:.0f} s"
        # A process that was stopped, or that holds Python's lock for ever, answers nothing at all.
        if worker.beat is not None and now - worker.beat_at > self.beat_timeout_s:
            return f"no sign of life in {self.beat_timeout_s:.0f} s"
        return ""

    def late(self, worker: Worker, now: float, slowest: float) -> bool:
        """Whether it just became suspect."""
        waited = now - worker.since if worker.flying else 0.0
        return worker.health.state in {State.HEALTHY, State.STALE} and waited > self._limit(worker, slowest) / 2

    def due(self, worker: Worker, now: float) -> bool:
        """Whether it is to be asked for a sign of life."""
        return worker.beat is None and worker.up and now - worker.beat_at > self.beat_timeout_s / BEATS

    def _limit(self, worker: Worker, slowest: float) -> float:
        """How long an answer may take: less than what was configured, once the worker has shown what it needs."""
        if worker.answers < 3:
            return self.call_timeout_s
        return min(self.call_timeout_s, max(PATIENCE * slowest, LEAST_PATIENCE_S))
