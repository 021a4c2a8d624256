"""Fixed-time rounds through the real loop, dispatcher, pools and learner group; and what they could take at best."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from fixed_time import Learner, Piece, Rollout, Teacher

from opd_ray import loop
from opd_ray.experience import Round
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import Collected, LearnerGroup
from opd_ray.runtime.handle import Weights, WorkerSpec
from opd_ray.runtime.jobs import Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.types import Prompt, WorkItem

__all__ = ["Line", "Times", "Workers", "backend", "cut", "middle"]

START_S, CALL_S = 300.0, 120.0
SMALL = {"cpu": 0.01}
"""They sleep: no core is theirs."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one item in each role, and of what comes once a round."""

    draw: float
    mark: float
    take: float
    update: float = 0.0

    def scaled(self, by: float) -> "Times":
        """The same line, faster or slower."""
        return Times(self.draw * by, self.mark * by, self.take * by, self.update * by)


@dataclass(frozen=True, slots=True)
class Workers:
    """How many of each role."""

    rollout: int
    teacher: int
    learner: int

    def __str__(self) -> str:
        return f"{self.rollout} + {self.teacher} + {self.learner}"

    @property
    def all(self) -> int:
        return self.rollout + self.teacher + self.learner

    def bounds(self, times: Times, items: int) -> dict[str, float]:
        """Role -> seconds that it needs for a round of so many items when it never waits."""
        return {
            "rollout": items * times.draw / self.rollout,
            "teacher": items * times.mark / self.teacher,
            "learner": -(-items // self.learner) * times.take + times.update,
        }

    def alone(self, times: Times, items: int) -> float:
        """Seconds of a round on its own, from the publish before it to its own, without any cost of the system."""
        drawing, marking = [0.0] * self.rollout, [0.0] * self.teacher
        ranks = [0.0] * self.learner
        drawn = sorted(_serve(drawing, 0.0, times.draw) for _ in range(items))
        marked = [_serve(marking, at, times.mark) for at in drawn]
        for position, at in enumerate(marked):  # in order
            rank = position % self.learner
            ranks[rank] = max(ranks[rank], at) + times.take
        return max(ranks) + times.update


def _serve(free: list[float], at: float, seconds: float) -> float:
    """When the worker that is free first has done something that came at ``at``."""
    first = min(range(len(free)), key=free.__getitem__)
    free[first] = max(free[first], at) + seconds
    return free[first]


def cut(round: int, mix: Mapping[str, int]) -> tuple[WorkItem, ...]:
    """A round with so many items of each task, spread evenly over it."""
    order = sorted((index / count, task, index) for task, count in mix.items() for index in range(count))
    prompt = Prompt("p", "a red cube", "a")
    return tuple(
        WorkItem(round, task, index, position, (replace(prompt, task=task),), (0,), (0,))
        for position, (_, task, index) in enumerate(order)
    )


class Line:
    """Stands for a run: what ``opd_ray.loop.rounds`` drives, and the source of its experience."""

    def __init__(
        self,
        backend: Any,
        workers: Workers,
        times: Times,
        mix: Mapping[str, int],
        *,
        teacher: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``mix``: task -> items of a round; ``teacher``: more for its hosts."""
        self.backend, self.mix, self.items, self.clock = backend, dict(mix), sum(mix.values()), clock
        self.max_staleness, self.round, self.rounds = 0, 0, 0
        self.algorithm = SimpleNamespace(updates_per_round=1)
        self.dispatcher = Dispatcher(backend, call_timeout_s=CALL_S, clock=clock)
        self.notes: list[str] = []
        self.dispatcher.note = self.notes.append
        self.ends: list[float] = []
        self.answered = 0
        """Marks that reached the learner."""
        spec = WorkerSpec("learner", partial(Learner, times.take, times.update), 1, SMALL)
        self.learner = LearnerGroup(self.dispatcher, [spec] * workers.learner, attempt=0, start_timeout_s=START_S)
        self.rollout = self._pool("rollout", partial(Rollout, times.draw), workers.rollout)
        host = partial(Teacher, times.mark, **(teacher or {}))
        self.teacher = self._pool("teacher", host, workers.teacher)
        self.dispatcher.wait_ready()
        self.learner.wait_ready()
        self.source = self

    def _pool(self, role: str, factory: Any, size: int) -> Pool:
        spec = WorkerSpec(role, factory, 1, SMALL)
        pool = Pool(self.backend, spec, size, clock=self.clock, start_timeout_s=START_S, call_timeout_s=CALL_S)
        self.dispatcher.pools.append(pool)
        return pool

    def collect(self, round: int, weights: Weights) -> Round:
        """Queue every item's draw, and behind it its mark."""
        items = cut(round, self.mix)
        return Round(round, weights.version, items, tuple(self._item(item, weights) for item in items))

    def _item(self, item: WorkItem, weights: Weights) -> Collected:
        args = (item, weights.version, weights.sha256)
        draw = self.dispatcher.submit(Job(self.rollout, "draw", args, 1, f"drawing {item}", weights=weights))
        mark = self.mark(item, (draw,))
        return Collected(item, lambda: Piece(item), {"trajectory": (draw,), "answer": (mark,)}, (draw, mark))

    def mark(self, item: WorkItem, after: tuple[Job, ...] = ()) -> Job:
        """Queue a mark."""
        args = (item, item.task, *(Output(job, 0) for job in after))
        job = Job(self.teacher, "score", args, 1, f"marking {item}", after=after, asset=item.task)
        return self.dispatcher.submit(job)

    @contextmanager
    def arrivals(self, batch: Round) -> Iterator[Iterator[Collected]]:
        """As a run does it."""
        yield self._arriving(batch)

    def _arriving(self, batch: Round) -> Iterator[Collected]:
        for one in batch.collected:
            self.dispatcher.wait(one.jobs)
            self.answered += 1
            yield one

    def finish_round(self, batch: Round, updates: Sequence[Any], weights: Weights) -> None:
        """Note when it ended."""
        self.ends.append(self.clock())
        self.round = batch.number + 1

    def run(self, rounds: int, *, staleness: int) -> list[float]:
        """Seconds of each round but the first two and the last: those have workers that fill and run dry."""
        self.max_staleness, self.rounds, self.ends = staleness, self.round + rounds, []
        loop.rounds(self)  # type: ignore[arg-type]
        return [after - before for before, after in itertools.pairwise(self.ends)][1:-1]

    def close(self) -> None:
        """End its workers; none of them has imported torch."""
        handles = [worker.handle for pool in self.dispatcher.pools for worker in pool.workers] + self.learner.ranks
        calls = [handle.call("imported", bulk=0) for handle in handles]
        found = [done.value for done in self.dispatcher.results(calls, "looking at what was imported")]
        assert not any(found), "a fixed-time worker has imported torch"
        for pool in self.dispatcher.pools:
            for worker in pool.workers:
                worker.handle.kill()
        self.backend.end_group(self.learner.ranks)


@contextmanager
def backend(object_store_mb: int = 500) -> Iterator[RayBackend]:
    """A Ray of our own."""
    one = RayBackend(object_store_mb=object_store_mb)
    try:
        yield one
    finally:
        one.close()


def middle(found: Sequence[float], form: str = ".2f") -> str:
    """Median with spread."""
    return f"{statistics.median(found):{form}} ({min(found):{form}} to {max(found):{form}})"
