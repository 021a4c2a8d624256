"""Workers of one role: bounded work in flight, least loaded first, the dead replaced by new incarnations."""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_ray.errors import PlacementError, StaleWeightsError, Stopped
from opd_ray.runtime.handle import Backend, Call, Done, Handle, Ref, Weights, WorkerSpec
from opd_ray.runtime.health import Event, Health, State
from opd_ray.types import WeightVersion

__all__ = ["PROBE", "Job", "Output", "Pool", "Worker"]

PROBE = "probe"
"""Books of what is no work of the run: it is counted nowhere."""

MAX_LOSSES = 3
"""Workers of one pool lost one after the other without a single answer, before the run stops."""
MAX_ATTEMPTS = 4
"""Times that one job is run, before the run stops: it may be what kills its workers."""


@dataclass(frozen=True, slots=True)
class Output:
    """Stands for a bulk result of another job among a job's arguments."""

    job: "Job"
    index: int


@dataclass(eq=False, slots=True)
class Job:
    """One method call that some worker of a pool has to answer."""

    pool: "Pool"
    method: str
    args: tuple[Any, ...] | Callable[[], tuple[Any, ...]]
    """Callable where they depend on the records of earlier jobs."""
    bulk: int = 0
    label: str = ""
    after: tuple["Job", ...] = ()
    weights: Weights | None = None
    """A worker binds and proves these before it gets the job."""
    books: str = ""
    """Under what its seconds and forwards are counted; its pool's role where empty."""
    call: Call | None = None
    result: Done | None = None
    attempts: int = 0
    given: tuple[Call | None, ...] = ()
    """What ``after`` had answered when the arguments were taken."""

    @property
    def done(self) -> bool:
        """Answered, and the answer not lost since."""
        return self.result is not None

    def arguments(self) -> tuple[Any, ...]:
        """The arguments, with references in place of other jobs' outputs."""
        args = self.args() if callable(self.args) else self.args
        return tuple(_reference(arg) if isinstance(arg, Output) else arg for arg in args)


def _reference(output: Output) -> Ref:
    assert output.job.call is not None
    return output.job.call.bulk[output.index]


@dataclass(eq=False, slots=True)
class Worker:
    """One incarnation."""

    handle: Handle
    health: Health
    ready: Call
    facts: Any = None
    bound: tuple[WeightVersion, str] | None = None
    """Identity of the weights it has proven."""
    flying: dict[Ref, Job | None] = field(default_factory=dict)
    """Record reference -> job, in the order in which it works through them; None: a bind."""
    since: float = 0.0
    """When it began with the first of them."""
    binding: tuple[WeightVersion, str] | None = None


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
        in_flight: int = 2,
    ) -> None:
        self.backend, self.spec, self.size = backend, spec, size
        self.queue: deque[Job] = deque()
        self.workers: list[Worker] = []
        self.lost: list[str] = []
        """One line for each worker that was lost."""
        self.noted = 0
        """How many of them the log has."""
        self._clock, self._in_flight = clock, in_flight
        self._start_timeout, self._call_timeout = start_timeout_s, call_timeout_s
        self._losses, self._working = 0, False
        self._names = (f"{spec.role}-{number}" for number in itertools.count())

    def fill(self) -> None:
        """Start workers until as many live as are wanted."""
        while sum(worker.health.state is not State.DRAINING for worker in self.workers) < self.size:
            handle = self.backend.start(self.spec, next(self._names))
            self.workers.append(Worker(handle, Health(self._clock), handle.call("ready", bulk=0)))

    def refs(self) -> list[Ref]:
        """The records that this pool waits for."""
        starting = [w.ready.done for w in self.workers if w.health.state is State.STARTING]
        return starting + [ref for worker in self.workers for ref in worker.flying]

    def assign(self) -> None:
        """Hand queued jobs whose inputs are there to healthy workers."""
        for job in list(self.queue):
            if not all(other.done for other in job.after):
                continue
            worker = self._choose(job)
            if worker is None:
                return
            if job.weights is not None and worker.bound != job.weights.identity:
                self._bind(worker, job.weights)
                continue
            self.queue.remove(job)
            job.attempts += 1
            job.given = tuple(other.call for other in job.after)
            job.call = worker.handle.call(job.method, *job.arguments(), bulk=job.bulk)
            self._fly(worker, job.call.done, job)

    def retry(self, job: Job) -> None:
        """Put a job in front of the queue once more; whatever it answered is forgotten.

        Raises:
            Stopped: it was tried often enough.
        """
        job.call = job.result = None
        if job.attempts >= MAX_ATTEMPTS:
            raise Stopped(f"{job.label} was run {job.attempts} times and lost each time; --resume goes on")
        self.queue.appendleft(job)

    def _choose(self, job: Job) -> Worker | None:
        free = [
            worker
            for worker in self.workers
            if worker.health.state is State.HEALTHY
            and len(worker.flying) < self._in_flight
            # Weights are swapped between work items, never under one that is under way.
            and (job.weights is None or worker.bound == job.weights.identity or not worker.flying)
        ]
        proven = [worker for worker in free if job.weights is None or worker.bound == job.weights.identity]
        return min(proven or free, key=lambda worker: len(worker.flying), default=None)

    def _bind(self, worker: Worker, weights: Weights) -> None:
        worker.health.apply(Event.UNPROVEN)
        record = Weights(weights.version, weights.sha256, weights.manifest, None)
        call = worker.handle.call("bind", record, weights.flat, bulk=0)
        worker.binding = weights.identity
        self._fly(worker, call.done, None)

    def _fly(self, worker: Worker, ref: Ref, job: Job | None) -> None:
        if not worker.flying:
            worker.since = self._clock()
        worker.flying[ref] = job

    def _land(self, worker: Worker, ref: Ref) -> Job | None:
        """It answered: it begins with the next one now, and may have new work."""
        job = worker.flying.pop(ref)
        worker.since = self._clock()
        worker.health.apply(Event.PROVEN if job is None else Event.ANSWERED)
        return job

    def finish(self, ref: Ref, result: Done) -> Job | None:
        """Note an answer; returns the job it belongs to, if it is one.

        Raises:
            StaleWeightsError: a worker acknowledged other weights than it was given.
        """
        for worker in self.workers:
            if ref == worker.ready.done and worker.health.state is State.STARTING:
                worker.facts = result.value
                worker.health.apply(Event.READY)
                return None
            if ref in worker.flying:
                if worker.flying[ref] is None:
                    self._check_proof(worker, result)
                job = self._land(worker, ref)
                if job is not None:
                    # Not after a bind: where a job kills every worker, each of them binds first.
                    self._losses, self._working = 0, True
                    job.result = result
                return job
        return None

    def _check_proof(self, worker: Worker, result: Done) -> None:
        ack = result.value
        if (ack.version, ack.sha256) != worker.binding:
            raise StaleWeightsError(f"{worker.handle.name} acknowledged weights {ack.version}, not what it was given")
        worker.bound = worker.binding

    def release(self, ref: Ref) -> Job | None:
        """Forget a call that failed for want of an input; returns its job. The worker is not to blame."""
        for worker in self.workers:
            if ref in worker.flying:
                return self._land(worker, ref)
        return None

    def lose(self, ref: Ref, why: str) -> None:
        """The worker behind a record is gone: put its jobs back in front, and start a successor.

        Raises:
            Stopped: workers of this pool die one after the other.
        """
        worker = next((w for w in self.workers if ref in w.flying or ref == w.ready.done), None)
        if worker is None:
            return
        self.workers.remove(worker)
        worker.health.apply(Event.LOST)
        worker.handle.kill()
        jobs = [job for job in worker.flying.values() if job is not None]
        held = f" while {jobs[0].label}" if jobs and jobs[0].label else ""
        self.lost.append(f"{worker.handle.name} was lost{held} ({why}); {len(jobs)} work items run again")
        self._losses += 1
        if self._losses > MAX_LOSSES:
            where = f"; see {self.spec.logs}/{worker.handle.name}.log" if self.spec.logs else ""
            raise Stopped(
                f"{self._losses} {self.spec.role} workers were lost one after the other, last{held} {why}{where}. "
                "Mend the cause, then go on with --resume"
            )
        for job in jobs[1:]:
            job.attempts -= 1  # it had not begun with these
        for job in reversed(jobs):
            self.retry(job)
        self.fill()

    def check_time(self) -> None:
        """Find workers that do not start or do not answer, and end those that drained.

        Raises:
            PlacementError: a worker did not come up in time, before there was any work.
            Stopped: a successor did not come up in time.
        """
        now = self._clock()
        for worker in list(self.workers):
            if worker.health.state is State.STARTING and worker.health.seconds > self._start_timeout:
                self._give_up(worker)
            waited = now - worker.since if worker.flying else 0.0
            if waited > self._call_timeout:
                self.lose(next(iter(worker.flying)), f"no answer in {self._call_timeout:.0f} s")
            elif waited > self._call_timeout / 2:
                worker.health.apply(Event.LATE)
            elif worker.health.state is State.DRAINING and not worker.flying:
                worker.health.apply(Event.LOST)
                worker.handle.kill()
                self.workers.remove(worker)

    def _give_up(self, worker: Worker) -> None:
        starting = sum(other.health.state is State.STARTING for other in self.workers)
        lack = self.backend.shortage([self.spec] * starting, free=True)
        text = f"{worker.handle.name} did not start in {self._start_timeout:.0f} s; " + (
            lack or f"the cluster has room, so see its log under {self.spec.logs}"
        )
        raise Stopped(f"{text}. Then go on with --resume") if self._working else PlacementError(text)
