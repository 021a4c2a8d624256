"""What the pools are given: method calls that wait for others' results, and the queue in front of a pool's workers."""

import heapq
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opd_ray.runtime.handle import Call, Done, Ref, Weights

if TYPE_CHECKING:
    from opd_ray.runtime.pool import Pool

__all__ = ["ANYTHING", "MAX_KILLED", "MAX_RUNS", "PROBE", "Job", "Output", "Queue"]

PROBE = "probe"
"""Books of what is no work of the run: it is counted nowhere."""

MAX_KILLED = 3
"""Workers that are lost while at one job, before it is run no more: it may be what kills them."""
MAX_RUNS = 6
"""Times that one job is run for whatever reason, before the run stops."""

ANYTHING = ""
"""What a job asks of a worker that any worker has."""


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
    asset: str = ANYTHING
    """What a worker has to have loaded for it, and loads where it has not: a teacher's name."""
    alike: bool = True
    """Whether it takes about as long as others of its method and teacher."""
    books: str = ""
    """Under what its seconds and forwards are counted; its pool's role where empty."""
    check: Callable[[Any], str] | None = None
    """What is wrong with a record, or an empty text: it comes from another process and may be anything."""
    call: Call | None = None
    result: Done | None = None
    error: Exception | None = None
    """The work's own, for whoever waits for it."""
    by: str = ""
    """The worker that has it, or answered it."""
    otherwise: Callable[[str], Any] | None = None
    """What stands for its answer where it is run no more, by the reason; the run stops where None."""
    max_killed: int = MAX_KILLED
    attempts: int = 0
    killed: int = 0
    """Workers lost while they were at it, or for what they answered."""
    given: tuple[Call | None, ...] = ()
    """What ``after`` had answered when the arguments were taken."""
    order: int = 0
    """When it was submitted; it keeps its place when it runs again."""
    dropped: bool = False
    """Nobody waits for it any more."""
    readers: list["Job"] = field(default_factory=list)
    """Those that wait for it."""

    @property
    def done(self) -> bool:
        """Answered, and the answer not lost since."""
        return self.result is not None

    def failure(self) -> Exception | None:
        """Its own error, or that of a job without whose result it never runs."""
        errors = (other.failure() for other in self.after if not other.done)
        return self.error or next((error for error in errors if error is not None), None)

    @property
    def needs(self) -> Hashable:
        """What a worker has to be prepared for: proven weights or a loaded teacher."""
        return self.weights.identity if self.weights is not None else self.asset

    def exhausted(self, log: str) -> tuple[str, str] | None:
        """Why it is run no more and what to do, or None; ``log`` ends a sentence with where its last worker's is."""
        if self.killed >= self.max_killed:
            return (
                f"{self.label}: {self.killed} workers were lost one after the other while they were at it, last "
                f"{self.by}{log}",
                ". Take out what it reads, or mend the cause; then go on with --resume",
            )
        if self.attempts >= MAX_RUNS + self.max_killed - MAX_KILLED:
            return f"{self.label} was run {self.attempts} times and lost each time", "; --resume goes on"
        return None

    def arguments(self) -> tuple[Any, ...]:
        """The arguments, with references in place of other jobs' outputs."""
        args = self.args() if callable(self.args) else self.args
        return tuple(_reference(arg) if isinstance(arg, Output) else arg for arg in args)


def _reference(output: Output) -> Ref:
    assert output.job.call is not None
    return output.job.call.bulk[output.index]


class Queue:
    """Jobs without a worker: those that could run, by what they need and in the order of submission, and the others."""

    def __init__(self) -> None:
        self.blocked: dict[Job, None] = {}
        """They wait for other jobs' results."""
        self._ready: dict[Hashable, list[tuple[int, Job]]] = {}
        self.ready = 0
        """How many could run."""

    def __len__(self) -> int:
        return self.ready + len(self.blocked)

    def __iter__(self) -> Iterator[Job]:
        """All of them, in order."""
        jobs = [*self.blocked, *(job for heap in self._ready.values() for _, job in heap)]
        return iter(sorted(jobs, key=lambda job: job.order))

    def put(self, job: Job) -> None:
        """Add a job; it becomes ready when what it reads is there."""
        missing = [other for other in job.after if not other.done]
        for other in missing:
            other.readers.append(job)
        if missing:
            self.blocked[job] = None
        else:
            heapq.heappush(self._ready.setdefault(job.needs, []), (job.order, job))
            self.ready += 1

    def wake(self, job: Job) -> None:
        """Something that it reads is there now."""
        if job in self.blocked and all(other.done for other in job.after):
            del self.blocked[job]
            self.put(job)

    def heads(self) -> list[Job]:
        """The first ready job of each kind of need, oldest first."""
        return [job for _, job in sorted(heap[0] for heap in self._ready.values())]

    def assets(self) -> Iterator[str]:
        """What ready jobs need to be loaded, each once."""
        return (need for need in self._ready if isinstance(need, str) and need != ANYTHING)

    def behind(self, job: Job) -> Job | None:
        """The ready job after the first one of its kind was taken."""
        heap = self._ready.get(job.needs)
        return heap[0][1] if heap else None

    def count(self, needs: Hashable) -> int:
        """Ready jobs of one kind of need."""
        return len(self._ready.get(needs, ()))

    def take(self, job: Job) -> None:
        """Remove the first ready job of its kind."""
        heap = self._ready[job.needs]
        heapq.heappop(heap)
        self.ready -= 1
        if not heap:
            del self._ready[job.needs]

    def clear(self) -> None:
        """Nobody waits for any of them."""
        self.blocked.clear()
        self._ready.clear()
        self.ready = 0
