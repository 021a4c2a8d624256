"""Moves jobs through the pools until they are answered, and again where a worker or an input was lost.

Errors are of three kinds: a lost worker is replaced and its jobs run again; a lost input makes the job that produced it
run again, same seed, same weights; the work's own error goes to whoever waits.
"""

import time
from collections.abc import Callable, Sequence

from opd_ray.errors import InputLostError, StaleWeightsError, Stopped, WorkerLostError
from opd_ray.runtime.handle import Backend, Call, Done, Ref
from opd_ray.runtime.pool import Job, Output, Pool

__all__ = ["Dispatcher"]

MAX_ATTEMPTS = 4
TICK_S = 0.5


class Dispatcher:
    """The driver's only event loop. It runs while somebody waits for something."""

    def __init__(self, backend: Backend, *, call_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend = backend
        self.pools: list[Pool] = []
        self.seconds: dict[str, float] = {}
        """Busy seconds by role, summed over workers."""
        self.forwards: dict[str, int] = {}
        """Denoiser rows by role, of answers that were used."""
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
        pending = {call.done for call in calls}
        results: dict[Ref, Done] = {}
        deadline = self._clock() + (timeout_s or self._call_timeout)

        def finished(ready: Sequence[Ref]) -> None:
            for ref in pending.intersection(ready):
                results[ref] = self.backend.result(ref)  # a lost input or the work's own error goes to the caller
                pending.discard(ref)

        while pending:
            if self._clock() > deadline:
                raise Stopped(f"{what} did not answer in {timeout_s or self._call_timeout:.0f} s; --resume goes on")
            try:
                finished(self._pump(list(pending)))
            except WorkerLostError as error:
                raise Stopped(f"{what}: a learner rank was lost ({error}); --resume goes on") from None
        return [results[call.done] for call in calls]

    def again(self, jobs: Sequence[Job]) -> None:
        """Their stored results are gone: run them once more."""
        for job in jobs:
            if job.done:
                job.result = job.call = None
                if job.attempts >= MAX_ATTEMPTS:
                    raise Stopped(f"{job.label} was lost {job.attempts} times; --resume goes on")
                job.pool.queue.appendleft(job)

    def account(self, role: str, done: Done) -> None:
        """Add one answer to the books."""
        self.seconds[role] = self.seconds.get(role, 0.0) + done.seconds
        self.forwards[role] = self.forwards.get(role, 0) + done.forwards

    def _run(self, finished: Callable[[], bool]) -> None:
        while not finished():
            self._pump([])

    def _pump(self, others: list[Ref]) -> list[Ref]:
        """One turn; returns those of ``others`` that are done."""
        for pool in self.pools:
            pool.check_time()
            pool.assign()
        owned = {ref: pool for pool in self.pools for ref in pool.refs()}
        ready = self.backend.wait([*owned, *others], TICK_S)
        for ref in ready:
            if ref in owned:
                self._settle(owned[ref], ref)
        if self._clock() - self._ticked >= 1:
            self._ticked = self._clock()
            self.tick()
        return [ref for ref in ready if ref not in owned]

    def _settle(self, pool: Pool, ref: Ref) -> None:
        try:
            result = self.backend.result(ref)
        except InputLostError as error:
            job = pool.release(ref)
            if job is None:
                raise Stopped(f"the published weights are gone ({error}); --resume goes on") from None
            self.note(f"an input of {job.label} is gone ({error}); the item that made it runs again")
            job.call = None
            self.again([output.job for output in _inputs(job)])
            pool.queue.appendleft(job)
        except (WorkerLostError, StaleWeightsError) as error:
            pool.lose(ref, str(error))
            self.note(pool.lost[-1])
        else:
            job = pool.finish(ref, result)
            if job is not None:
                self.account(pool.spec.role.partition(".")[0], result)


def _inputs(job: Job) -> list[Output]:
    args = job.args() if callable(job.args) else job.args
    return [arg for arg in args if isinstance(arg, Output)]
