"""Which worker gets a job, and whether preparing another one for it pays."""

from collections import Counter
from collections.abc import Hashable

from opd_ray.runtime.account import Account
from opd_ray.runtime.jobs import ANYTHING, Job, Queue
from opd_ray.runtime.roster import Roster, Worker

__all__ = ["Choice"]


class Choice:
    """A worker is prepared for a job if it has proven the job's weights, or has loaded its teacher."""

    def __init__(self, roster: Roster, queue: Queue, account: Account, in_flight: int) -> None:
        self._roster, self._queue, self._account, self._in_flight = roster, queue, account, in_flight
        self._binding = Counter[Hashable]()
        self.load_seconds: dict[str, float] = {}
        """Teacher -> seconds that it last took to load."""

    def worker(self, job: Job, workers: int) -> Worker | None:
        """An idle one that is prepared, an idle one if preparing it pays, one that is prepared and has a job.

        Args:
            job: what is to be done.
            workers: how many the pool has.
        """
        worker = self._roster.find(job.needs, 0)
        if worker is None and job.needs != ANYTHING and self.wants_idle(job, workers):
            worker = self._roster.find(ANYTHING, 0)
        if job.weights is not None and self._binding[job.weights.identity]:
            return worker  # one that binds them now is idle in a moment, and is better than one that has a job
        for load in range(1, self._in_flight):
            worker = worker or self._roster.find(job.needs, load)
        return worker

    def wants_idle(self, job: Job, workers: int) -> bool:
        """Whether preparing another worker for this job is worth it."""
        if job.weights is not None:
            return self._binding[job.weights.identity] < self._queue.count(job.needs)
        if job.asset == ANYTHING:
            return False
        holders = self._roster.holders(job.asset)
        if holders == 0:
            return True
        if holders == workers:
            return False
        if any(self._roster.holders(asset) == 0 for asset in self._queue.assets()):
            return False  # that one has to be loaded anyway
        waiting = (self._queue.count(job.needs) + holders) * self._account.pace / holders
        return waiting > self.load_seconds.get(job.asset, max(self.load_seconds.values(), default=0.0))

    def binds(self, identity: Hashable, change: int) -> None:
        """One worker more, or less, is about to prove these weights."""
        self._binding[identity] += change
        if not self._binding[identity]:
            del self._binding[identity]
