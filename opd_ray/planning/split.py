"""How to divide cards, or worker slots, among the roles, and who then holds up whom."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from opd_ray.config import Config, Placement
from opd_ray.errors import PlacementError
from opd_ray.planning.rates import SHARED, LearnerRate, Rates, reward_role, teacher_role
from opd_ray.planning.schedule import limits, throughput

__all__ = ["Demand", "Split", "best_split", "bottleneck", "curve", "gains"]

FASTER = 0.9
"""A role's seconds are multiplied by this to see what hangs on it."""
CLOSE = 0.995
"""Of the best throughput: enough for roles that take no card."""
BISECTIONS = 50


@dataclass(frozen=True, slots=True)
class Demand:
    """What one worker of each role takes of what is divided."""

    unit: str
    """``GPU``, or ``worker slot`` where no role asks for a card."""
    each: Mapping[str, float]
    """Role -> units of one worker. 0: it takes none, and gets as many workers as are of use."""

    @classmethod
    def of(cls, config: Config, rates: Rates) -> "Demand":
        """What the cluster file asks for."""
        cluster = config.cluster
        each = {role: _gpu(_placement(config, role)) for role in rates.roles(shared=cluster.share_teachers)}
        if not any(each.values()):
            return cls("worker slot", dict.fromkeys(each, 1.0))
        return cls("GPU", each)

    def units(self, workers: Mapping[str, int]) -> int:
        """Whole units for so many workers; a part of a card is on one card (first fit, largest first)."""
        whole, rest = 0, list[float]()
        parts = sorted(((self.each[role], count) for role, count in workers.items()), reverse=True)
        for part, count in parts:
            if part >= 1:
                whole += count * math.ceil(part - 1e-9)
            elif part > 0:
                count = _into_rest(rest, part, count)
                on_one = math.floor(1 / part + 1e-9)
                rest += [1 - part * on_one] * (count // on_one)
                rest += [1 - part * (count % on_one)] * (count % on_one > 0)
        return whole + len(rest)


def _into_rest(rest: list[float], part: float, count: int) -> int:
    """Fill what is left of cards that are in use; how many workers found no room."""
    for place, free in enumerate(rest):
        taken = min(count, math.floor(free / part + 1e-9))
        rest[place], count = free - taken * part, count - taken
    return count


def _placement(config: Config, role: str) -> Placement:
    cluster = config.cluster
    kind, _, entry = role.partition(".")
    if kind == reward_role():
        return cluster.of_reward(entry or "default")
    if role.partition(".")[0] == SHARED:
        return cluster.of_teacher(role.removeprefix(teacher_role("")) if role != SHARED else "default")
    return cluster.learner if role == "learner" else cluster.rollout


def _gpu(placement: Placement) -> float:
    return placement.resources.get("gpu", 0.0)


@dataclass(frozen=True, slots=True)
class Split:
    """Workers of each role, and what they are predicted to do."""

    workers: Mapping[str, int]
    units: int
    """Cards, or worker slots, that they take."""
    samples_per_s: float
    bottleneck: str
    """A role, or ``publish``."""


def bottleneck(rates: Rates, workers: Mapping[str, int], staleness: int) -> str:
    """Of which role a small gain in speed gains the run most; ``publish`` where it is publishing and checkpoints."""
    found = {name: throughput(_faster(rates, name), workers, staleness) for name in (*workers, "publish")}
    room = limits(rates, workers)  # decides between equals, as where a round has no slowest role
    return max(found, key=lambda name: (round(found[name], 9), -room.get(name, math.inf)))


def _faster(rates: Rates, name: str) -> Rates:
    learner = rates.learner
    if name == "learner":
        update = {"learner": LearnerRate(serial=learner.serial * FASTER, shared=learner.shared * FASTER)}
        return rates.model_copy(update=update)
    if name == "publish":
        return rates.model_copy(update={"publish": rates.publish * FASTER, "checkpoint": rates.checkpoint * FASTER})

    def scaled(seconds: Mapping[str, float]) -> dict[str, float]:
        names = {role for role in seconds if role == name or (name == SHARED and role.partition(".")[0] == SHARED)}
        return {role: value * (FASTER if role in names else 1) for role, value in seconds.items()}

    seconds, transfer = dict(rates.seconds), dict(rates.transfer)
    if name not in seconds and name.partition(".")[0] == SHARED:  # a pool of its own, at the pace of all teachers
        seconds[name], transfer[name] = seconds.get(SHARED, 0.0), transfer.get(SHARED, 0.0)
    return rates.model_copy(update={"seconds": scaled(seconds), "transfer": scaled(transfer)})


def gains(rates: Rates, workers: Mapping[str, int], staleness: int) -> dict[str, float]:
    """Role -> what one more worker of it would multiply the throughput by."""
    now = throughput(rates, workers, staleness)
    return {
        role: throughput(rates, {**workers, role: count + 1}, staleness) / now
        for role, count in workers.items()
        if role != "learner" or count < rates.item_count
    }


def curve(rates: Rates, demand: Demand, sizes: Iterable[int], staleness: int) -> list[tuple[int, Split]]:
    """The best split of each number of units that holds one worker of every role."""
    found: list[tuple[int, Split]] = []
    for size in sorted(set(sizes)):
        seeds = [split.workers for _, split in found[-1:]]
        split = _Search(rates, demand, size, staleness).run(seeds)
        if split is not None:
            found.append((size, split))
    return found


def best_split(rates: Rates, demand: Demand, total: int, staleness: int) -> Split:
    """The split of so many cards or worker slots with the highest predicted throughput.

    The workers that a throughput x needs of a role, ceil(x seconds / samples), only grow with x, and so do the units
    of all roles together: bisection on x finds the best split where a round takes as long as its slowest role
    (staleness >= 1). From there, and from the split that is best where all roles wait for one another, single workers
    are moved between roles as long as that makes the exact round shorter.

    Raises:
        PlacementError: not even one worker of every role fits.
    """
    split = _Search(rates, demand, total, staleness).run([])
    if split is None:
        least = demand.units(dict.fromkeys(demand.each, 1))
        raise PlacementError(
            f"--gpus {total}: one worker of each role takes {least} {demand.unit}s ("
            f"{', '.join(f'{role} {part:g}' for role, part in demand.each.items())}); give at least {least}"
            + (", or let roles share cards by resources.gpu below 1" if demand.unit == "GPU" else "")
        )
    return split


class _Search:
    def __init__(self, rates: Rates, demand: Demand, total: int, staleness: int) -> None:
        self.rates, self.demand, self.total, self.staleness = rates, demand, total, staleness
        ahead = staleness + 1
        marked = {teacher_role(name): count for name, count in rates.items.items()}
        self.most = {
            role: rates.item_count if role == "learner" else ahead * marked.get(role, rates.item_count)
            for role in demand.each
        }
        """More workers than items can be under way are of no use."""
        self.free = [role for role, part in demand.each.items() if part == 0]
        self._known: dict[tuple[int, ...], float] = {}

    def run(self, seeds: Sequence[Mapping[str, int]]) -> Split | None:
        starts = [*seeds, *(start for start in (self._balanced(), self._square_roots()) if start is not None)]
        if not starts:
            return None
        best = max((self._improve(dict(start)) for start in starts), key=self._value)
        best = self._trim(best)
        paid = {role: count for role, count in best.items() if role not in self.free}
        name = bottleneck(self.rates, best, self.staleness)
        return Split(best, self.demand.units(paid | dict.fromkeys(self.free, 0)), self._value(best), name)

    def _fits(self, workers: Mapping[str, int]) -> bool:
        within = all(1 <= count <= self.most[role] for role, count in workers.items())
        return within and self.demand.units(workers) <= self.total

    def _value(self, workers: Mapping[str, int]) -> float:
        key = tuple(workers[role] for role in self.most)
        if key not in self._known:
            self._known[key] = throughput(self.rates, workers, self.staleness)
        return self._known[key]

    def _balanced(self) -> dict[str, int] | None:
        """By bisection: the highest throughput of the slowest role."""
        low, high = 0.0, min(limits(self.rates, self.most).values())
        best = {role: self.most[role] if role in self.free else 1 for role in self.most}
        if not self._fits(best):
            return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2 if math.isfinite(high) else max(2 * low, 1.0)
            workers = {role: self._needed(role, middle) for role in self.most}
            if self._fits(workers):
                low, best = middle, workers
            else:
                high = middle
        return best

    def _needed(self, role: str, rate: float) -> int:
        if role in self.free:
            return self.most[role]
        if role == "learner":
            return next((n for n in range(1, self.most[role] + 1) if self._of_learner(n) >= rate), self.most[role] + 1)
        return max(math.ceil(rate * self.rates.work(role) / self.rates.samples - 1e-9), 1)

    def _of_learner(self, ranks: int) -> float:
        return limits(self.rates, {"learner": ranks})["learner"]

    def _square_roots(self) -> dict[str, int] | None:
        """Where times add up, the sum of work / workers is least with workers in proportion to the root of work."""
        weights = {
            role: math.sqrt(self._divisible(role) / max(self.demand.each[role], 1e-9))
            for role in self.most
            if role not in self.free
        }
        best = {role: self.most[role] if role in self.free else 1 for role in self.most}
        if not self._fits(best):
            return None
        low, high = 0.0, float(self.total) / max(sum(weights.values()), 1e-9) * 4
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            workers = best | {
                role: min(max(math.floor(middle * weight), 1), self.most[role]) for role, weight in weights.items()
            }
            low, high = (middle, high) if self._fits(workers) else (low, middle)
        found = {role: min(max(math.floor(low * weight), 1), self.most[role]) for role, weight in weights.items()}
        return best | found if self._fits(best | found) else best

    def _divisible(self, role: str) -> float:
        return self.rates.learner.shared if role == "learner" else self.rates.work(role)

    def _improve(self, workers: dict[str, int]) -> dict[str, int]:
        while True:
            better = max(self._moves(workers), key=self._value, default=workers)
            if self._value(better) <= self._value(workers) * (1 + 1e-9):
                return workers
            workers = better

    def _moves(self, workers: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """One role gets one more, or as many as make it faster; one other role pays where nothing is left."""
        for role, count in workers.items():
            if role in self.free:
                continue
            for more in {count + 1, self._next_step(role, count)}:
                grown = {**workers, role: more}
                if more > self.most[role]:
                    continue
                if self._fits(grown):
                    yield grown
                    continue
                for donor in workers:
                    paid = self._pay(grown, donor) if donor not in (role, *self.free) else None
                    if paid is not None:
                        yield paid
                        yield self._filled(paid, role)

    def _filled(self, workers: Mapping[str, int], role: str) -> dict[str, int]:
        """A card that was paid may have room for more of the workers that it was paid for."""
        filled = dict(workers)
        while self._fits(more := {**filled, role: filled[role] + 1}):
            filled = more
        return filled

    def _next_step(self, role: str, count: int) -> int:
        """The next number of workers of which the busiest has less to do."""
        items = self.most[role] if role == "learner" else self.most[role] // (self.staleness + 1)
        rounds = math.ceil(items / count)
        return math.ceil(items / (rounds - 1)) if rounds > 1 else count + 1

    def _pay(self, workers: Mapping[str, int], donor: str) -> dict[str, int] | None:
        paid = dict(workers)
        while paid[donor] > 1:
            paid[donor] -= 1
            if self._fits(paid):
                return paid
        return None

    def _trim(self, workers: dict[str, int]) -> dict[str, int]:
        """Take away what is of no use: of roles that take no card what the best pace does not need, of others all."""
        best = self._value(workers)
        for role in workers:
            self._trim_role(workers, role, best * (CLOSE if role in self.free else 1 - 1e-9))
        return workers

    def _trim_role(self, workers: dict[str, int], role: str, enough: float) -> None:
        workers[role] = _least(workers[role], lambda count: self._value({**workers, role: count}) >= enough)


def _least(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest number from 1 on that is enough, where ``most`` is, and more is never worse."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
