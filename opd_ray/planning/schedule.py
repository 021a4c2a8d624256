"""How long a round takes, from the speed of single workers: the arithmetic of the loop, without running it.

A round holds the items i = 0 .. m-1. An item is drawn on one of R rollout workers in d seconds, then marked by its
teacher, on one of T workers in s seconds, and scored at the same time on one of W reward workers in w seconds. The
learner takes items in their order on rank i mod L, u = shared / m seconds each, as soon as they are there, or, where an
update needs all of a round's scores, as soon as all of them are; after the last one come the serial part of the updates
and the publish, p seconds together. Every pool serves in the order of arrival, and an item starts on the worker that is
free first. With F(i) the time at which that worker becomes free:

    drawn(i)   = max(released(r), F_rollout(i)) + d        released(r) = published(r - 1 - staleness)
    marked(i)  = max(drawn(i), F_teacher(i)) + s
    scored(i)  = max(drawn(i), F_reward(i)) + w
    there(i)   = max(marked(i), scored(i))                 of all items the last one's, where the learner waits for all
    learned(i) = max(there(i), learned(i - L), published(r - 1)) + u
    published(r) = max over i of learned(i) + p

These equations hold max and + alone, so ``round_seconds`` works them out item by item. What they leave out is that a
pool gives a busy worker its next item ahead: where fewer than two items a round come to a drawing worker at staleness
>= 1, or teachers of one pool differ much in speed, real rounds can be a tenth longer. Two limits say what they come to:

- staleness >= 1 and enough rounds' worth of work under way: a round takes as long as its slowest role,
  max(m d / R, m_j s_j / T_j, m w / W, ceil(m / L) u + p), each teacher j with its own m_j items: ``limits``.
- staleness 0: nothing is drawn while the learner finishes, so a round is a pipeline that fills and drains. Its longest
  path follows the slowest stage b all the way and every other stage once:
  max over b of [ceil(m_b / workers_b) seconds_b + sum over the other stages of their seconds of one item] + p.
  A learner that waits is no stage of it: its ceil(m / L) u come after the pipeline of the others.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_ray.planning.rates import SHARED, Rates, teacher_role

__all__ = ["ROUNDS_PER_CYCLE", "limits", "round_seconds", "throughput", "warm_up"]

ROUNDS_PER_CYCLE = 12
"""Rounds over which a mean is taken: at staleness >= 1 they need not be alike."""


def limits(rates: Rates, workers: Mapping[str, int]) -> dict[str, float]:
    """Role -> samples a second that it could work off if it never had to wait."""
    found = {role: _rate(rates, count, rates.work(role)) for role, count in workers.items() if role != "learner"}
    ranks = workers["learner"]
    longest = -(-rates.item_count // ranks) * rates.learner.shared / rates.item_count
    seconds = longest + rates.learner.serial + rates.publish + rates.checkpoint
    return found | {"learner": _rate(rates, 1, seconds)}


def _rate(rates: Rates, workers: int, work: float) -> float:
    return rates.samples * workers / work if work > 0 else float("inf")


def throughput(rates: Rates, workers: Mapping[str, int], staleness: int) -> float:
    """Samples a second of a run.

    Args:
        rates: seconds of single workers.
        workers: role -> its workers; ``learner``: ranks; ``teacher`` where one pool serves all teachers.
        staleness: rounds that may be drawn ahead.
    """
    seconds = round_seconds(rates, workers, staleness)
    return rates.samples / seconds if seconds > 0 else float("inf")


def warm_up(staleness: int) -> int:
    """Rounds until the first ones, which find idle workers, are forgotten."""
    return 2 * (staleness + 1)


def round_seconds(rates: Rates, workers: Mapping[str, int], staleness: int) -> float:
    """Mean seconds of a round in a run that has been going on for a while; see the module's equations."""
    timeline = _Timeline(rates, dict(workers), staleness)
    if staleness == 0:  # every round begins with idle workers: all are alike
        return timeline.round()
    for _ in range(warm_up(staleness)):
        timeline.round()
    start = timeline.published[-1]
    for _ in range(ROUNDS_PER_CYCLE):
        timeline.round()
    return (timeline.published[-1] - start) / ROUNDS_PER_CYCLE


@dataclass(slots=True)
class _Timeline:
    """The equations' state: when each worker becomes free."""

    rates: Rates
    workers: dict[str, int]
    staleness: int
    published: list[float] = field(default_factory=list)
    _free: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Role -> a heap of (when it is free, the round whose weights it has)."""

    def round(self) -> float:
        """Work out one more round; when its weights are published."""
        rates, number = self.rates, len(self.published)
        drawn_with = number - 1 - self.staleness
        released = self.published[drawn_with] if drawn_with >= 0 else 0.0
        arrivals = list[float]()
        for name, count in rates.items.items():
            own = teacher_role(name)
            pool = own if own in self.workers else SHARED
            for _ in range(count):
                drawn = self._serve("rollout", released, rates.held("rollout"), max(drawn_with, -1))
                there = self._serve(pool, drawn, rates.held(own)) if rates.marked else drawn
                for role in self.workers.keys() & rates.scoring:
                    there = max(there, self._serve(role, drawn, rates.held(role)))
                arrivals.append(there)
        if not rates.streams:
            arrivals = [max(arrivals)] * len(arrivals)
        ranks = [self.published[-1] if self.published else 0.0] * self.workers["learner"]
        for position, there in enumerate(arrivals):
            rank = position % len(ranks)
            ranks[rank] = max(ranks[rank], there) + rates.learner.shared / len(arrivals)
        self.published.append(max(ranks) + rates.learner.serial + rates.publish + rates.checkpoint)
        return self.published[-1]

    def _serve(self, role: str, ready: float, seconds: float, weights: int = -1) -> float:
        """When the worker that is free first is done with an item; it binds other weights before."""
        free = self._free.get(role)
        if free is None:
            free = self._free[role] = [(0.0, -2)] * self.workers[role]
        since, has = free[0]
        binding = self.rates.bind if role == "rollout" and has != weights else 0.0
        done = max(since, ready) + binding + seconds
        heapq.heapreplace(free, (done, weights))
        return done
