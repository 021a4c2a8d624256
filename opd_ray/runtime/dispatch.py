"""Moves jobs through the pools until they are answered, and again where a worker or an input was lost.

Errors are of three kinds: a lost worker is replaced and its jobs run again; a lost input makes the job that produced it
run again, same seed, same weights; the work's own error goes to whoever waits. A worker whose answer turns out to be
no possible one counts as lost.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from opd_ray.errors import (
    BadInputError,
    InputLostError,
    LearnerLostError,
    RuntimeFault,
    StaleWeightsError,
    Stopped,
    WorkerLostError,
)
from opd_ray.runtime.handle import Backend, Call, Done, Handle, Ref
from opd_ray.runtime.jobs import PROBE, Job
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.ranks import Ranks
from opd_ray.runtime.telling import last_signs

__all__ = ["Dispatcher"]

WAIT_S = 0.5
"""A turn ends after so long without an answer."""
TICK_S = 1.0
LAST_WORDS_S = 10.0
"""Where a learner rank dies, its peers fail in the middle of a reduction and are often heard of first."""


class _Waited(Collection[Ref]):
    """All that is waited for. It is not copied: a backend may need no more than to ask what belongs to it."""

    def __init__(self, others: Sequence[Ref], pools: Sequence[Collection[Ref]]) -> None:
        self._parts = [others, *pools]

    def __contains__(self, ref: object) -> bool:
        return any(ref in part for part in self._parts)

    def __iter__(self) -> Iterator[Ref]:
        return itertools.chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


class Dispatcher:
    """The driver's only event loop. It runs while somebody waits for something."""

    def __init__(
        self,
        backend: Backend,
        *,
        call_timeout_s: float,
        pause_timeout_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.pools: list[Pool] = []
        self.ranks: Ranks | None = None
        """The learner's, while they are up and watched."""
        self.seconds: dict[str, float] = {}
        """Busy seconds by role, summed over workers."""
        self.forwards: dict[str, int] = {}
        """Denoiser rows by role, of answers that were used."""
        self.first: dict[str, Callable[[], None]] = {}
        """By role: called once, at its first answer."""
        self.logs: Path | None = None
        """Where workers write what they have to say."""
        self.note: Callable[[str], None] = lambda text: None
        """Called with a line about everything unusual."""
        self.tick: Callable[[], None] = lambda: None
        """Called about once a second while waiting: heartbeats, control."""
        self._clock, self._call_timeout, self._ticked = clock, call_timeout_s, clock()
        self._pause_timeout, self._told_pause = pause_timeout_s, False
        self._submitted, self._failures = 0, 0

    def submit(self, job: Job) -> Job:
        """Queue a job; it starts when its inputs are there and somebody waits for anything."""
        self._submitted += 1
        job.order = self._submitted
        job.pool.put(job)
        return job

    def wait_ready(self) -> None:
        """Every worker of every pool is up.

        Raises:
            PlacementError: there is no room, or one did not come up in time.
        """
        for pool in self.pools:
            pool.fill()
        self._run(lambda: not any(worker.starting for pool in self.pools for worker in pool.workers))

    def wait(self, jobs: Sequence[Job]) -> None:
        """All these jobs are answered.

        Raises:
            Exception: one of them, or of those whose results they read, ended with an error of its own.
        """
        while left := [job for job in jobs if not job.done]:
            self._raise_of(left)
            failed = self._failures
            # What was answered is looked at once, not at every turn; then again, since answers can be lost.
            while left and self._failures == failed:
                if left[-1].done:
                    left.pop()
                else:
                    self._pump([])

    def _raise_of(self, jobs: Sequence[Job]) -> None:
        """The work's own error goes to whoever waits for it."""
        if not self._failures:
            return
        for job in jobs:
            if (error := job.failure()) is not None:
                raise error

    def results(
        self,
        calls: Sequence[Call],
        what: str,
        timeout_s: float | None = None,
        *,
        ranks: Sequence[int] = (),
        reads: bool = False,
    ) -> list[Done]:
        """The records of calls outside the pools (learner ranks), while the pools go on.

        Args:
            calls: requests under way.
            what: they are for, in errors.
            timeout_s: how long they may take; as other calls where it is not given.
            ranks: of each call; the calls' own numbers where it is not given.
            reads: whether they read stored objects, which may be gone: then that error is the caller's.

        Raises:
            LearnerLostError: one of them was lost, or did not answer in time.
        """
        rank_of = {call.done: ranks[number] if ranks else number for number, call in enumerate(calls)}
        pending, results = set(rank_of), dict[Ref, Done]()
        limit = timeout_s or self._call_timeout
        deadline, broken = self._clock() + limit, None
        while pending and self._clock() <= deadline:
            answered = pending.intersection(self._pump(list(pending)))
            for ref in filter(answered.__contains__, rank_of):  # in order: a call may fail because one before it did
                pending.discard(ref)
                try:
                    results[ref] = self.backend.result(ref)
                except InputLostError as error:
                    if reads:
                        raise
                    raise LearnerLostError(
                        f"{what}: the record of learner rank {rank_of[ref]} is gone ({error})"
                    ) from None
                except WorkerLostError as error:
                    raise LearnerLostError(
                        f"{what}: {self._named(rank_of[ref])} was lost ({error}){self._last_words(rank_of[ref])}"
                    ) from None
                except RuntimeError as error:
                    broken = broken or error
                    deadline = min(deadline, self._clock() + LAST_WORDS_S)
        if broken is not None:
            raise broken
        if pending:
            late = sorted({rank_of[ref] for ref in pending})
            names = ", ".join(map(self._named, late))
            raise LearnerLostError(f"{what}: {names} did not answer in {limit:.0f} s{self._last_words(late[0])}")
        return [results[call.done] for call in calls]

    def _named(self, rank: int) -> str:
        return self.ranks.name(rank) if self.ranks is not None else f"learner rank {rank}"

    def _last_words(self, rank: int) -> str:
        if self.ranks is not None:
            return self.ranks.last_signs(rank)
        return last_signs(self.logs, f"learner-{rank}", None, None, self._clock())

    def watch(self, ranks: Sequence[Handle], beat_timeout_s: float) -> None:
        """The learner's ranks are up: from now on they are asked for signs of life."""
        self.ranks = Ranks(ranks, self.logs, self._clock, beat_timeout_s)

    def again(self, jobs: Sequence[Job]) -> None:
        """Their stored results are gone: run them once more.

        Raises:
            Stopped: one of them was run often enough.
        """
        for job in jobs:
            if job.done:
                job.pool.retry(job)

    def blame(self, job: Job, why: str) -> None:
        """A job's answer is no possible one: whoever gave it is replaced, and it runs once more.

        Raises:
            Stopped: it was run often enough.
        """
        job.killed += 1
        worker = job.pool.named(job.by)
        if worker is not None:
            job.pool.condemn(worker, f"its answer to {job.label} cannot be: {why}")
        self.again([job])

    def abandon(self) -> None:
        """Nobody will wait for what is queued or under way: the run ends, or begins again from a checkpoint."""
        for pool in self.pools:
            pool.abandon()

    def account(self, role: str, done: Done) -> None:
        """Add one answer to the books."""
        if role in self.first:
            self.first.pop(role)()
        self.seconds[role] = self.seconds.get(role, 0.0) + done.seconds
        self.forwards[role] = self.forwards.get(role, 0) + done.forwards

    def paused(self) -> tuple[str, float, str] | None:
        """The role without which nothing goes on, for how many seconds, and why."""
        for pool in self.pools:
            if (found := pool.paused()) is not None:
                return pool.spec.role, *found
        return None

    def _run(self, finished: Callable[[], bool]) -> None:
        while not finished():
            self._pump([])

    def _pump(self, others: list[Ref]) -> list[Ref]:
        """One turn; returns those of ``others`` that are done."""
        for pool in self.pools:
            pool.assign()
        beats = self.ranks.pending if self.ranks is not None else {}
        waited = _Waited(others, [beats, *(pool.pending for pool in self.pools)])
        if not waited:
            queued = [job.label for pool in self.pools for job in pool.queue]
            raise RuntimeFault(f"nothing is under way, and yet {len(queued)} jobs wait: {queued[:3]}")
        ready = self.backend.wait(waited, WAIT_S)
        start = self._clock()
        mine = []
        for ref in ready:
            owner = next((pool for pool in self.pools if ref in pool.pending), None)
            if owner is not None:
                self._settle(owner, ref)
            elif ref in beats:
                self._beat(ref)
            else:
                mine.append(ref)
        now = self._clock()
        if now - self._ticked >= TICK_S:
            self._ticked = now
            # After the answers, unless taking them took long: a driver that slept must not blame its workers.
            if now - start < TICK_S:
                self._supervise()
            self.tick()
        self._tell()
        return mine

    def _beat(self, ref: Ref) -> None:
        """A learner rank gave a sign of life, or cannot any longer."""
        assert self.ranks is not None
        try:
            self.ranks.heard(ref, self.backend.result(ref))
        except (WorkerLostError, InputLostError) as error:
            self.ranks.gone(ref, error)

    def _supervise(self) -> None:
        """Who is late, and whether anybody is left to do the work.

        Raises:
            Stopped: a role has had no worker for too long.
            LearnerLostError: a rank is gone, or gives no sign of life.
        """
        if self.ranks is not None:
            self.ranks.check()
        for pool in self.pools:
            pool.check_time()
        stuck = self.paused()
        if stuck is None:
            self._told_pause = False
            return
        role, seconds, why = stuck
        if seconds > self._pause_timeout:
            raise Stopped(f"waited {seconds:.0f} s for a worker of {role} ({why}); --resume goes on")
        if seconds >= 1 and not self._told_pause:
            self._told_pause = True
            self.note(f"waiting for {role}: {why}")

    def _tell(self) -> None:
        for pool in self.pools:
            for text in [*pool.lost[pool.noted :], *pool.remarks]:
                self.note(text)
            pool.noted = len(pool.lost)
            pool.remarks.clear()

    def _settle(self, pool: Pool, ref: Ref) -> None:
        try:
            result = self.backend.result(ref)
            job = pool.finish(ref, result)
        except InputLostError as error:
            self._input_lost(pool, ref, error)
        except BadInputError as error:
            self._input_bad(pool.release(ref), error)
        except (WorkerLostError, StaleWeightsError) as error:
            pool.lose(ref, str(error))
        except Exception as error:  # the work's own
            if pool.job_of(ref) is not None:
                self._failed(pool.release(ref), error)
            elif pool.account.answers:  # a start, a bind or a sign of life: the others go on
                pool.lose(ref, f"{type(error).__name__}: {error}")
            else:
                raise
        else:
            if job is not None:
                if job.books != PROBE:
                    self.account(job.books or pool.spec.role.partition(".")[0], result)
                for reader in job.readers:
                    reader.pool.wake(reader)
                job.readers.clear()

    def _failed(self, job: Job | None, error: Exception) -> None:
        if job is not None and not job.dropped:
            job.error, self._failures = error, self._failures + 1

    def _input_bad(self, job: Job | None, error: BadInputError) -> None:
        """Whoever made a reader's last input is to blame, unless another reader has told of it before."""
        if job is None or job.dropped:
            return
        producer, given = job.after[-1], job.given[-1]
        if producer.call is given:
            self.blame(producer, str(error))
        job.pool.retry(job)

    def _input_lost(self, pool: Pool, ref: Ref, error: InputLostError) -> None:
        job = pool.job_of(ref)
        if job is None and not pool.binds(ref):
            pool.lose(ref, f"its record is gone: {error}")  # with the node that it was on
            return
        in_vain = job is None and pool.bound_in_vain(ref)
        pool.release(ref)
        if job is None and not in_vain:
            raise LearnerLostError(f"the published weights are gone ({error})")
        if job is None or job.dropped:
            return
        if not job.after:
            self._failed(job, LearnerLostError(f"what {job.label} was to take from the learner is gone ({error})"))
            return
        self.note(f"an input of {job.label} is gone ({error}); the item that made it runs again")
        # Another reader may have had its producer run again by now.
        self.again([other for other, given in zip(job.after, job.given, strict=True) if other.call is given])
        job.pool.retry(job)
