"""A run on a simulated clock: the real pools and dispatcher, workers that take their seconds, and nothing else."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.planning.rates import SHARED, Rates, teacher_role
from opd_ray.planning.simulated import Seconds, SimulatedBackend
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Call, Handle, Weights, WorkerSpec
from opd_ray.runtime.jobs import Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.types import WeightVersion

__all__ = ["Simulated", "simulate"]

FOREVER = 1e9


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulated run took."""

    published: tuple[float, ...]
    """When each round's weights were there, in seconds."""
    samples: int
    """Of a round."""
    waited: float
    """Seconds in which the learner waited for items, over all rounds."""

    def throughput(self, skipped: int) -> float:
        """Samples a second after the first rounds."""
        rounds = len(self.published) - skipped
        start = self.published[skipped - 1] if skipped else 0.0
        return rounds * self.samples / (self.published[-1] - start)


def simulate(
    rates: Rates,
    workers: Mapping[str, int],
    staleness: int,
    *,
    rounds: int,
    spread: float = 0.0,
    seed: int = 0,
    failures: Mapping[str, float] | None = None,
) -> Simulated:
    """Run rounds with so many workers, structured as the training loop is.

    Args:
        rates: seconds of single workers.
        workers: role -> workers; ``learner``: ranks; ``teacher`` where one pool serves all teachers.
        staleness: rounds that may be drawn ahead.
        rounds: to run.
        spread: each call takes between (1 - spread) and (1 + spread) times its seconds.
        seed: of these times.
        failures: worker's name -> the second at which it dies.
    """
    backend = SimulatedBackend(_seconds(rates), spread=spread, seed=seed, failures=failures)
    return _Simulation(rates, workers, backend).run(staleness, rounds)


def _seconds(rates: Rates) -> Seconds:
    each = rates.learner.shared / rates.item_count
    fixed = {
        "draw": rates.held("rollout"),
        "bind": rates.bind,
        "accumulate": each,
        "update": rates.learner.serial,
        "publish": rates.publish + rates.checkpoint,
    }

    def seconds(role: str, method: str, args: tuple[Any, ...]) -> float:
        if method == "score":
            return rates.held(role if role in rates.scoring else teacher_role(args[0]))
        return fixed.get(method, 0.0)

    return seconds


class _Simulation:
    def __init__(self, rates: Rates, workers: Mapping[str, int], backend: SimulatedBackend) -> None:
        self.rates, self.backend = rates, backend
        self.dispatcher = Dispatcher(backend, call_timeout_s=FOREVER, clock=backend.clock)
        self.pools = {role: self._pool(role, count) for role, count in workers.items() if role != "learner"}
        ranks = [_spec("learner") for _ in range(workers["learner"])]
        self.ranks: list[Handle] = backend.start_group(ranks, FOREVER)
        self.version, self.waited = 0, 0.0

    def _pool(self, role: str, count: int) -> Pool:
        clock = self.backend.clock
        pool = Pool(self.backend, _spec(role), count, clock=clock, start_timeout_s=FOREVER, call_timeout_s=FOREVER)
        self.dispatcher.pools.append(pool)
        return pool

    def run(self, staleness: int, rounds: int) -> Simulated:
        self.dispatcher.wait_ready()
        weights, start = self._weights(), self.backend.now
        ahead: deque[list[tuple[Job, ...]]] = deque()
        published, collected = list[float](), 0
        while len(published) < rounds:
            while len(ahead) <= staleness and collected < rounds:
                ahead.append(self._collect(weights))
                collected += 1
            self._train(ahead.popleft())
            weights = self._weights()
            published.append(self.backend.now - start)
        self.backend.close()
        return Simulated(tuple(published), self.rates.samples, self.waited)

    def _collect(self, weights: Weights) -> list[tuple[Job, ...]]:
        return [self._item(name, weights) for name, count in self.rates.items.items() for _ in range(count)]

    def _item(self, teacher: str, weights: Weights) -> tuple[Job, ...]:
        submit = self.dispatcher.submit
        draw = submit(Job(self.pools["rollout"], "draw", (), 1, "drawing", weights=weights))
        jobs = [draw]
        pool = self.pools.get(teacher_role(teacher), self.pools.get(SHARED))
        if pool is not None:
            jobs.append(submit(Job(pool, "score", (teacher, Output(draw, 0)), 1, "marking", after=(draw,))))
        for role in self.rates.scoring:
            if role in self.pools:
                jobs.append(submit(Job(self.pools[role], "score", (Output(draw, 0),), 0, "scoring", after=(draw,))))
        return tuple(jobs)

    def _train(self, items: Sequence[tuple[Job, ...]]) -> None:
        """Each item goes to its rank as soon as it and all before it are there; all at once where the learner waits."""
        calls = list[Call]()
        if not self.rates.streams:
            before = self.backend.now
            self.dispatcher.wait([job for jobs in items for job in jobs])
            self.waited += self.backend.now - before
        for position, jobs in enumerate(items):
            before = self.backend.now
            self.dispatcher.wait(jobs)
            self.waited += self.backend.now - before
            calls.append(self.ranks[position % len(self.ranks)].call("accumulate", bulk=0))
        self.dispatcher.results(calls, "accumulating", FOREVER)
        self.dispatcher.results([rank.call("update", bulk=0) for rank in self.ranks], "updating", FOREVER)

    def _weights(self) -> Weights:
        # The first ones are no part of a round.
        call = self.ranks[0].call("publish" if self.version else "ready", bulk=1)
        self.dispatcher.results([call], "publishing", FOREVER)
        self.version += 1
        return Weights(WeightVersion(0, 0, self.version), f"sha-{self.version}", (call.bulk[0],))


def _spec(role: str) -> WorkerSpec:
    return WorkerSpec(role, object, 1, {})
