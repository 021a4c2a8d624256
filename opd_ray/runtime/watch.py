"""When a worker is late, and when it is given up."""

from opd_ray.runtime.health import State
from opd_ray.runtime.jobs import ANYTHING, Job
from opd_ray.runtime.roster import Worker

__all__ = ["Watch"]

PATIENCE = 10.0
"""A call may take so many times as long as the slowest before it."""
LEAST_PATIENCE_S = 60.0
ENOUGH = 3
"""Answers after which it is known how long the next ones may take."""
BEATS = 6
"""Signs of life that a worker is asked for in the time after which it is given up without one."""


class Watch:
    """Limits in seconds, and what answers took until now."""

    def __init__(self, call_timeout_s: float, beat_timeout_s: float) -> None:
        self._call_timeout, self._beat_timeout = call_timeout_s, beat_timeout_s
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}
        """Method and teacher -> answers, seconds of the slowest."""

    def learn(self, job: Job, seconds: float) -> None:
        """An answer took so long."""
        count, slowest = self._seen.get(_kind(job), (0, 0.0))
        self._seen[_kind(job)] = count + 1, max(slowest, seconds)

    def fault(self, worker: Worker, now: float) -> str:
        """Why a worker is to be given up; an empty text where it is not."""
        if worker.flying and now - worker.since > (limit := self._limit(worker)):
            return f"no answer in {limit:.0f} s"
        # A process that was stopped, or that holds Python's lock for ever, answers nothing at all.
        if worker.beat is not None and now - worker.beat_at > self._beat_timeout:
            return f"no sign of life in {self._beat_timeout:.0f} s"
        return ""

    def late(self, worker: Worker, now: float) -> bool:
        """Whether it just became suspect."""
        waited = now - worker.since if worker.flying else 0.0
        return worker.health.state in {State.HEALTHY, State.STALE} and waited > self._limit(worker) / 2

    def due(self, worker: Worker, now: float) -> bool:
        """Whether it is to be asked for a sign of life."""
        return worker.beat is None and worker.up and now - worker.beat_at > self._beat_timeout / BEATS

    def _limit(self, worker: Worker) -> float:
        """How long an answer may take: less than what was configured, once jobs like it have shown what they need."""
        job = worker.first
        # Neither a bind, nor what has to be loaded first, nor work of which no two pieces are alike.
        if job is None or not job.alike or (job.asset != ANYTHING and job.asset not in worker.loaded):
            return self._call_timeout
        count, slowest = self._seen.get(_kind(job), (0, 0.0))
        if count < ENOUGH:
            return self._call_timeout
        return min(self._call_timeout, max(PATIENCE * slowest, LEAST_PATIENCE_S))


def _kind(job: Job) -> tuple[str, str]:
    return job.method, job.asset
