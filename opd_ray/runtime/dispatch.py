"""Moves jobs through the pools until they are answered, and again where a worker or an input was lost.

Errors are of three kinds: a lost worker is replaced and its jobs run again; a lost input makes the job that produced it
run again, same seed, same weights; the work's own error goes to whoever waits.
"""

import time
from collections.abc import Callable, Sequence

from opd_ray.errors import InputLostError, RuntimeFault, StaleWeightsError, Stopped, WorkerLostError
from opd_ray.runtime.handle import Backend, Call, Done, Ref
from opd_ray.runtime.pool import PROBE, Job, Pool

__all__ = ["Dispatcher"]

TICK_S = 0.5
LAST_WORDS_S = 10.0
"""Where a learner rank dies, its peers fail in the middle of a reduction and are often heard of first."""


class Dispatcher:
    """The driver's only event loop. It runs while somebody waits for something."""

    def __init__(self, backend: Backend, *, call_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend = backend
        self.pools: list[Pool] = []
        self.seconds: dict[str, float] = {}
        """Busy seconds by role, summed over workers."""
        self.forwards: dict[str, int] = {}
        """Denoiser rows by role, of answers that were used."""
        self.first: dict[str, Callable[[], None]] = {}
        """By role: called once, at its first answer."""
        self.note: Callable[[str], None] = lambda text: None
        """Called with a line about everything unusual."""
        self.tick: Callable[[], None] = lambda: None
        """Called about once a second while waiting: heartbeats, control."""
        self._clock, self._call_timeout, self._ticked = clock, call_timeout_s, clock()

    def submit(self, job: Job) -> Job:
        """Queue a job; it starts when its inputs are there and somebody waits for anything."""
        job.pool.queue.append(job)
        return job

    def wait_ready(self) -> None:
        """Every worker of every pool is up.

        Raises:
            PlacementError: there is no room, or one did not come up in time.
        """
        for pool in self.pools:
            pool.fill()
        self._run(lambda: not any(worker.ready.done in pool.refs() for pool in self.pools for worker in pool.workers))

    def wait(self, jobs: Sequence[Job]) -> None:
        """All these jobs are answered."""
        self._run(lambda: all(job.done for job in jobs))

    def results(self, calls: Sequence[Call], what: str, timeout_s: float | None = None) -> list[Done]:
        """The records of calls outside the pools (learner ranks), while the pools go on.

        Raises:
            Stopped: one of them was lost, or did not answer in time.
        """
        ranks = {call.done: rank for rank, call in enumerate(calls)}
        pending, results = set(ranks), dict[Ref, Done]()
        limit = timeout_s or self._call_timeout
        deadline, broken = self._clock() + limit, None
        while pending and self._clock() <= deadline:
            for ref in pending.intersection(self._pump(list(pending))):
                pending.discard(ref)
                try:
                    results[ref] = self.backend.result(ref)
                except WorkerLostError as error:
                    raise Stopped(f"{what}: learner rank {ranks[ref]} was lost ({error}); --resume goes on") from None
                except RuntimeError as error:
                    broken = broken or error
                    deadline = min(deadline, self._clock() + LAST_WORDS_S)
        if broken is not None:
            raise broken
        if pending:
            late = ", ".join(str(ranks[ref]) for ref in sorted(pending, key=ranks.__getitem__))
            raise Stopped(f"{what}: learner rank {late} did not answer in {limit:.0f} s; --resume goes on")
        return [results[call.done] for call in calls]

    def again(self, jobs: Sequence[Job]) -> None:
        """Their stored results are gone: run them once more.

        Raises:
            Stopped: one of them was run often enough.
        """
        for job in jobs:
            if job.done:
                job.pool.retry(job)

    def blame(self, job: Job, why: str) -> None:
        """Run a job once more whose answer is not what it should be."""
        self.again([job])

    def abandon(self) -> None:
        """Nobody will wait for what is queued or under way: the run ends."""
        for pool in self.pools:
            pool.queue.clear()
            for worker in pool.workers:
                worker.flying.clear()

    def account(self, role: str, done: Done) -> None:
        """Add one answer to the books."""
        if role in self.first:
            self.first.pop(role)()
        self.seconds[role] = self.seconds.get(role, 0.0) + done.seconds
        self.forwards[role] = self.forwards.get(role, 0) + done.forwards

    def _run(self, finished: Callable[[], bool]) -> None:
        while not finished():
            self._pump([])

    def _pump(self, others: list[Ref]) -> list[Ref]:
        """One turn; returns those of ``others`` that are done."""
        for pool in self.pools:
            pool.assign()
        owned = {ref: pool for pool in self.pools for ref in pool.refs()}
        if not owned and not others:
            queued = [job.label for pool in self.pools for job in pool.queue]
            raise RuntimeFault(f"nothing is under way, and yet {len(queued)} jobs wait: {queued[:3]}")
        ready = self.backend.wait([*owned, *others], TICK_S)
        for ref in ready:
            if ref in owned:
                self._settle(owned[ref], ref)
        # After the answers were taken: a driver that slept must not blame its workers.
        for pool in self.pools:
            pool.check_time()
            for text in pool.lost[pool.noted :]:
                self.note(text)
            pool.noted = len(pool.lost)
        if self._clock() - self._ticked >= 1:
            self._ticked = self._clock()
            self.tick()
        return [ref for ref in ready if ref not in owned]

    def _settle(self, pool: Pool, ref: Ref) -> None:
        try:
            result = self.backend.result(ref)
            job = pool.finish(ref, result)
        except InputLostError as error:
            job = pool.release(ref)
            if job is None:
                raise Stopped(f"the published weights are gone ({error}); --resume goes on") from None
            self.note(f"an input of {job.label} is gone ({error}); the item that made it runs again")
            pool.retry(job)
            # Another reader may have had its producer run again by now.
            self.again([other for other, given in zip(job.after, job.given, strict=True) if other.call is given])
        except (WorkerLostError, StaleWeightsError) as error:
            pool.lose(ref, str(error))
        else:
            if job is not None and job.books != PROBE:
                self.account(job.books or pool.spec.role.partition(".")[0], result)
