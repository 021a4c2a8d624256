"""Workers of one role: bounded work in flight, the prepared and least loaded first, the dead replaced.

Every incarnation of a worker is a new one, with a name of its own. The pool grows and shrinks while it runs.
"""

import itertools
from collections.abc import Callable

from opd_ray.errors import PlacementError, StaleWeightsError, Stopped
from opd_ray.runtime.account import Account
from opd_ray.runtime.choice import Choice
from opd_ray.runtime.handle import Backend, Done, Ref, Weights, WorkerSpec
from opd_ray.runtime.health import Event, Health, State
from opd_ray.runtime.jobs import ANYTHING, Job, Queue
from opd_ray.runtime.roster import Roster, Worker
from opd_ray.runtime.telling import describe, lost_worker, where
from opd_ray.runtime.transport import ObjectStore, Transport
from opd_ray.runtime.usage import PoolStatus, Usage
from opd_ray.runtime.watch import Watch

__all__ = ["MAX_STRIKES", "Pool"]

MAX_STRIKES = 3
"""Incarnations of one worker that are lost before their first answer, before the run stops."""
SLOW = 1.5
"""A worker that is so many times slower than its pool has one job at a time: others may take the next one sooner."""


class Pool:
    """The workers of one role and the queue in front of them."""

    def __init__(
        self,
        backend: Backend,
        spec: WorkerSpec,
        size: int,
        *,
        clock: Callable[[], float],
        start_timeout_s: float,
        call_timeout_s: float,
        beat_timeout_s: float = 60.0,
        in_flight: int = 2,
        teachers: tuple[str, ...] = (),
        transport: Transport | None = None,
    ) -> None:
        self.backend, self.spec, self.size = backend, spec, size
        self.teachers = teachers
        """The teachers that it serves."""
        self.queue = Queue()
        self.workers: list[Worker] = []
        self.pending: dict[Ref, Worker] = {}
        """Whose answer each outstanding record is."""
        self.lost: list[str] = []
        """One line for each worker that was lost."""
        self.noted = 0
        """How many of them the log has."""
        self.remarks: list[str] = []
        """Lines for the log that it does not have yet: workers that found no room."""
        self.account = Account(clock, self.queue)
        self._clock, self._in_flight = clock, in_flight
        self._transport = transport or ObjectStore()
        self._start_timeout, self._watch = start_timeout_s, Watch(call_timeout_s, beat_timeout_s)
        self._names = (f"{spec.role}-{number}" for number in itertools.count())
        self._roster = Roster()
        self._choice = Choice(self._roster, self.queue, self.account, in_flight)
        """Teacher -> seconds that it last took to load."""
        self._paused: float | None = None

    def fill(self) -> None:
        """Start workers until as many live as are wanted."""
        for _ in range(self.size - self._staying()):
            self._start()

    def resize(self, size: int) -> None:
        """Change how many are wanted: new ones load and prove first, surplus ones finish what they hold and go."""
        self.size = size
        for _ in range(size - self._staying()):
            self._start(extra=True)
        surplus = self._staying() - size
        staying = [worker for worker in self.workers if worker.health.state is not State.DRAINING]
        for worker in sorted(staying, key=lambda worker: (worker.up, len(worker.flying)))[: max(surplus, 0)]:
            worker.health.apply(Event.DRAIN)
            self._settle(worker)

    def _staying(self) -> int:
        return sum(worker.health.state is not State.DRAINING for worker in self.workers)

    def _start(self, strikes: int = 0, *, extra: bool = False) -> None:
        handle = self.backend.start(self.spec, next(self._names))
        worker = Worker(
            handle, Health(self._clock), handle.call("ready", bulk=0), strikes, extra, slots=self._in_flight
        )
        self.workers.append(worker)
        self.pending[worker.ready.done] = worker

    def put(self, job: Job) -> None:
        """Queue a job."""
        self.account.advance()
        self.queue.put(job)

    def wake(self, job: Job) -> None:
        """Something that it reads is there now."""
        self.account.advance()
        self.queue.wake(job)

    def assign(self) -> None:
        """Hand queued jobs whose inputs are there to healthy workers, oldest first."""
        heads = self.queue.heads() if self.queue.ready else []
        while heads:
            job = heads.pop(0)
            if not all(other.done for other in job.after):  # one of them was lost since
                self.queue.take(job)
                self.queue.put(job)
            else:
                worker = self._choice.worker(job, len(self.workers))
                if worker is None and self._choice.wants_idle(job, len(self.workers)):
                    return  # whoever is free next is for this one
                if worker is None:
                    continue
                if job.weights is not None and worker.bound != job.weights.identity:
                    self._bind(worker, job.weights)
                    heads.insert(0, job)
                    continue
                self.queue.take(job)
                self._give(worker, job)
            if (following := self.queue.behind(job)) is not None:
                heads.append(following)
                heads.sort(key=lambda job: job.order)

    def _give(self, worker: Worker, job: Job) -> None:
        job.attempts += 1
        job.given = tuple(other.call for other in job.after)
        job.by = worker.handle.name
        if job.asset != ANYTHING:
            self._roster.hold(worker, worker.holds | {job.asset})
        self.account.begin(worker)
        job.call = worker.handle.call(job.method, *job.arguments(), bulk=job.bulk)
        self._fly(worker, job.call.done, job)

    def _bind(self, worker: Worker, weights: Weights) -> None:
        self.account.begin(worker)
        worker.health.apply(Event.UNPROVEN)
        worker.binding = weights.identity
        self._choice.binds(worker.binding, 1)
        self._fly(worker, self._transport.deliver(weights, worker.handle).done, None)

    def _fly(self, worker: Worker, ref: Ref, job: Job | None) -> None:
        worker.flying[ref] = job
        self.pending[ref] = worker
        self._roster.place(worker)

    def retry(self, job: Job) -> None:
        """Queue a job once more, at its old place; whatever it answered is forgotten.

        Raises:
            Stopped: it was tried often enough.
        """
        job.call = job.result = job.error = None
        if job.dropped:
            return
        if why := job.exhausted(where(self.spec, job.by)):
            if job.otherwise is None:
                raise Stopped("".join(why))
            job.result = Done(job.otherwise(why[0]), 0.0, 0)
            self.remarks.append(f"{why[0]}. It is given up, and the run goes on without")
            return
        self.put(job)

    def abandon(self) -> None:
        """Nobody waits for what is queued or under way any more."""
        for job in [*self.queue, *(job for worker in self.workers for job in worker.flying.values() if job)]:
            job.dropped = True
        self.queue.clear()

    def finish(self, ref: Ref, result: Done) -> Job | None:
        """Note an answer; returns the job it belongs to, if it is one that somebody waits for.

        Raises:
            StaleWeightsError: a worker acknowledged other weights than it was given, or answered what cannot be.
        """
        worker = self.pending[ref]
        if worker.beat is not None and ref == worker.beat.done:
            worker.pulse, worker.pulse_at, worker.beat = result.value, self._clock(), None
            del self.pending[ref]
            return None
        if ref == worker.ready.done:
            del self.pending[ref]
            worker.facts, worker.extra, worker.loaded = result.value, False, frozenset(result.holds or ())
            self._roster.hold(worker, worker.loaded)
            worker.health.apply(Event.READY)
            self._settle(worker)
            self._ask(worker, self._clock())  # at once: whatever happens to it, somebody knows where it ran
            return None
        job = worker.flying[ref]
        if job is None:
            self._check_proof(worker, result)
        elif job.check is not None and (wrong := job.check(result.value)):
            raise StaleWeightsError(f"{worker.handle.name} answered {job.label} with {wrong}")
        work = result.seconds - result.loading if job is not None else 0.0
        self._land(worker, ref, work, answered=job is not None)
        if job is not None:
            self._learn(worker, job, result)
        self._settle(worker)
        if job is None or job.dropped:
            return None
        job.result = result
        return job

    def _check_proof(self, worker: Worker, result: Done) -> None:
        ack = result.value
        if (getattr(ack, "version", None), getattr(ack, "sha256", None)) != worker.binding:
            raise StaleWeightsError(f"{worker.handle.name} acknowledged weights {ack}, not what it was given")
        worker.bound = worker.binding

    def _learn(self, worker: Worker, job: Job, result: Done) -> None:
        """What an answer tells of the worker."""
        worker.answers += 1
        self._watch.learn(job, result.seconds)
        work = result.seconds - result.loading
        worker.pace = work if worker.answers == 1 else 0.75 * worker.pace + 0.25 * work
        if result.loading:
            self._choice.load_seconds[job.asset] = result.loading
        if result.holds is not None:
            coming = {other.asset for other in worker.flying.values() if other is not None and other.asset}
            worker.loaded = frozenset(result.holds)
            self._roster.hold(worker, worker.loaded | coming)
        worker.slots = 1 if worker.pace > SLOW * self.account.pace else self._in_flight

    def job_of(self, ref: Ref) -> Job | None:
        """The job that an outstanding record answers; None where it is a start, a bind or a sign of life."""
        return self.pending[ref].flying.get(ref)

    def binds(self, ref: Ref) -> bool:
        """Whether a record is that of a bind."""
        return ref in self.pending[ref].flying and self.job_of(ref) is None

    def bound_in_vain(self, ref: Ref) -> bool:
        """Whether no job needs the weights of a bind any longer."""
        return not self.queue.count(self.pending[ref].binding)

    def release(self, ref: Ref) -> Job | None:
        """Forget a call that failed and leaves its worker as it was; returns its job, if it has one."""
        worker = self.pending[ref]
        job = self._land(worker, ref, 0.0, answered=False)
        self._settle(worker)
        return job

    def _land(self, worker: Worker, ref: Ref, seconds: float, *, answered: bool) -> Job | None:
        """It answered: it begins with the next one now."""
        self.account.end(worker, seconds, answered=answered)
        del self.pending[ref]
        job = worker.flying.pop(ref)
        if job is None and worker.binding is not None:
            self._choice.binds(worker.binding, -1)
        worker.since = self._clock()
        worker.health.apply(Event.PROVEN if job is None else Event.ANSWERED)
        return job

    def _settle(self, worker: Worker) -> None:
        """Its state, load or preparation changed."""
        self.account.settle(worker)
        self._roster.place(worker)
        self._end_drained(worker)

    def lose(self, ref: Ref, why: str) -> None:
        """The worker behind a record is gone.

        Raises:
            Stopped: see ``condemn``.
        """
        if ref in self.pending:
            self.condemn(self.pending[ref], why)

    def condemn(self, worker: Worker, why: str) -> None:
        """End a worker: its jobs are queued again, and a successor starts.

        Raises:
            Stopped: its predecessors went the same way before their first answer, or its job kills its workers.
        """
        state, at_work = worker.health.state, bool(worker.flying)
        jobs = [job for job in worker.flying.values() if job is not None and not job.dropped]
        self.lost.append(lost_worker(self.spec, worker, state, jobs, why, self._clock()))
        self._forget(worker)
        spared = bool(jobs) and jobs[0].otherwise is not None  # whatever it is that kills them is given up in time
        strikes = 0 if worker.answers else worker.strikes + (state is State.STARTING or (at_work and not spared))
        if strikes >= MAX_STRIKES and worker.extra:
            self._withdraw(f"{strikes} new {self.spec.role} workers were lost before they were up")
        elif strikes >= MAX_STRIKES:
            raise Stopped(
                f"{strikes} {self.spec.role} workers were lost one after the other before their first answer; "
                f"{self.lost[-1]}. Mend the cause, then go on with --resume"
            )
        if jobs:
            jobs[0].killed += 1
        for job in jobs[1:]:
            job.attempts -= 1  # it had not begun with these
        for job in jobs:
            self.retry(job)
        if self._staying() < self.size:
            self._start(strikes, extra=worker.extra)

    def _forget(self, worker: Worker) -> None:
        worker.health.apply(Event.LOST)
        self._roster.remove(worker)
        self._roster.hold(worker, frozenset())
        self.workers.remove(worker)
        if worker.binding is not None and None in worker.flying.values():
            self._choice.binds(worker.binding, -1)
        for ref in [ref for ref, other in self.pending.items() if other is worker]:
            del self.pending[ref]
        worker.flying.clear()
        self.account.settle(worker)
        worker.handle.kill()

    def _end_drained(self, worker: Worker) -> None:
        if worker.health.state is State.DRAINING and not worker.flying:
            self._forget(worker)

    def named(self, name: str) -> Worker | None:
        """The worker of that name, if it still lives."""
        return next((worker for worker in self.workers if worker.handle.name == name), None)

    def check_time(self) -> None:
        """Find workers that do not start, do not answer or give no sign of life.

        Raises:
            PlacementError: a worker did not come up in time, before there was any work.
            Stopped: none of the pool's workers came up in time.
        """
        now = self._clock()
        for worker in list(self.workers):
            if worker.health.state is State.STARTING and worker.health.seconds > self._start_timeout:
                self._give_up(worker)
            elif why := self._watch.fault(worker, now):
                self.condemn(worker, why)
            else:
                self._ask(worker, now)

    def _ask(self, worker: Worker, now: float) -> None:
        """For a sign of life where one is due, and for its stacks where it is late."""
        late = self._watch.late(worker, now)
        if late:
            worker.health.apply(Event.LATE)
            self._roster.place(worker)
        if late or self._watch.due(worker, now):
            call = worker.handle.beat(stack=late)
            if call is not None and worker.beat is None:
                worker.beat, worker.beat_at = call, now
                self.pending[call.done] = worker

    def _give_up(self, worker: Worker) -> None:
        """A worker did not start in time: one that was asked for in addition is given up, a successor is waited for."""
        starting = sum(other.health.state is State.STARTING for other in self.workers)
        lack = self.backend.shortage([self.spec] * starting, free=True)
        text = f"{worker.handle.name} did not start in {self._start_timeout:.0f} s; " + (
            lack or f"the cluster has room, so see its log under {self.spec.logs}"
        )
        if worker.extra:
            self._forget(worker)
            self._withdraw(text)
            return
        if self.account.answers and any(other.up for other in self.workers):
            if lack is None:
                self.condemn(worker, f"it did not start in {self._start_timeout:.0f} s")
                return
            worker.health.since = self._clock()
            self.remarks.append(f"{text}. It is waited for; the others do its work")
            return
        raise Stopped(f"{text}. Then go on with --resume") if self.account.answers else PlacementError(text)

    def _withdraw(self, why: str) -> None:
        """One worker less is wanted than was asked for."""
        self.size = max(self.size - 1, 1)
        self.remarks.append(f"{why}. The request is withdrawn; {self.spec.role} goes on with {self.size}")

    def paused(self) -> tuple[float, str] | None:
        """Since when there is work and no worker to do it, and why; None where there is one."""
        if not self.queue.ready or any(worker.up for worker in self.workers):
            self._paused = None
            return None
        if self._paused is None:
            self._paused = self._clock()
        return (
            self._clock() - self._paused,
            "its last worker is gone, and a successor starts" if self.lost else "its workers start",
        )

    @property
    def usage(self) -> Usage:
        """What its workers did with their time until now."""
        return self.account.usage

    def describe(self) -> PoolStatus:
        """For whoever watches."""
        return describe(self, self._clock())
