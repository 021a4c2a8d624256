"""Workers of one role: bounded work in flight, least loaded first, the dead replaced by new incarnations."""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_ray.errors import PlacementError, Stopped
from opd_ray.runtime.handle import Backend, Call, Done, Handle, Ref, Weights, WorkerSpec
from opd_ray.runtime.health import Event, Health, State
from opd_ray.types import WeightVersion

__all__ = ["Job", "Output", "Pool", "Worker"]

MAX_LOSSES = 3
"""Workers of one pool lost one after the other without a single answer, before the run stops."""


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
    call: Call | None = None
    result: Done | None = None
    attempts: int = 0

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
    flying: dict[Ref, tuple[Job | None, float]] = field(default_factory=dict)
    """Record reference -> (job, start); None: a bind."""
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
        """One line for each worker that was lost, for the log."""
        self._clock, self._in_flight = clock, in_flight
        self._start_timeout, self._call_timeout = start_timeout_s, call_timeout_s
        self._losses = 0
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
            job.call = worker.handle.call(job.method, *job.arguments(), bulk=job.bulk)
            worker.flying[job.call.done] = (job, self._clock())

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
        worker.flying[call.done] = (None, self._clock())

    def finish(self, ref: Ref, result: Done) -> Job | None:
        """Note an answer; returns the job it belongs to, if it is one."""
        for worker in self.workers:
            if ref == worker.ready.done and worker.health.state is State.STARTING:
                worker.facts = result.value
                worker.health.apply(Event.READY)
                return None
            if ref in worker.flying:
                job, _ = worker.flying.pop(ref)
                self._losses = 0
                if job is None:
                    worker.bound = worker.binding
                    worker.health.apply(Event.PROVEN)
                    return None
                worker.health.apply(Event.ANSWERED)
                job.result = result
                return job
        return None

    def release(self, ref: Ref) -> Job | None:
        """Forget a call that failed for want of an input; returns its job. The worker is not to blame."""
        for worker in self.workers:
            if ref in worker.flying:
                job, _ = worker.flying.pop(ref)
                return job
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
        jobs = [job for job, _ in worker.flying.values() if job is not None]
        for job in reversed(jobs):
            job.call = None
            self.queue.appendleft(job)
        self.lost.append(f"{worker.handle.name} was lost ({why}); {len(jobs)} work items run again")
        self._losses += 1
        if self._losses > MAX_LOSSES:
            where = f"; see {self.spec.logs}/{worker.handle.name}.log" if self.spec.logs else ""
            raise Stopped(
                f"{self._losses} {self.spec.role} workers were lost one after the other, last {why}{where}. "
                "Mend the cause, then go on with --resume"
            )
        self.fill()

    def check_time(self) -> None:
        """Find workers that do not start or do not answer, and end those that drained.

        Raises:
            PlacementError: a worker did not come up in time.
        """
        now = self._clock()
        for worker in list(self.workers):
            if worker.health.state is State.STARTING and worker.health.seconds > self._start_timeout:
                lack = self.backend.shortage([self.spec] * self.size)
                raise PlacementError(
                    f"{worker.handle.name} did not start in {self._start_timeout:.0f} s; "
                    + (lack or f"the cluster has room, so see its log under {self.spec.logs}")
                )
            oldest = min((start for _, start in worker.flying.values()), default=now)
            if now - oldest > self._call_timeout:
                self.lose(next(iter(worker.flying)), f"no answer in {self._call_timeout:.0f} s")
            elif now - oldest > self._call_timeout / 2:
                worker.health.apply(Event.LATE)
            if worker.health.state is State.DRAINING and not worker.flying:
                worker.health.apply(Event.LOST)
                worker.handle.kill()
                self.workers.remove(worker)
