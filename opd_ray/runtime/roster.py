"""Which workers may be given work, found in constant time however many there are."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from opd_ray.runtime.handle import Beat, Call, Handle, Ref
from opd_ray.runtime.health import Health, State
from opd_ray.runtime.jobs import ANYTHING, Job
from opd_ray.types import WeightVersion

__all__ = ["Roster", "Worker"]

UP = frozenset({State.STALE, State.HEALTHY, State.SUSPECT})
"""States of a worker that came up and is to stay."""


@dataclass(eq=False, slots=True)
class Worker:
    """One incarnation."""

    handle: Handle
    health: Health
    ready: Call
    strikes: int = 0
    """How many of its predecessors, one after the other, were lost before their first answer."""
    extra: bool = False
    """Started because more were asked for, not in the place of another."""
    facts: Any = None
    bound: tuple[WeightVersion, str] | None = None
    """Identity of the weights it has proven."""
    binding: tuple[WeightVersion, str] | None = None
    holds: frozenset[str] = frozenset()
    """Teachers that it has loaded, or is loading."""
    loaded: frozenset[str] = frozenset()
    """Those of them that it said it has."""
    flying: dict[Ref, Job | None] = field(default_factory=dict)
    """Record reference -> job, in the order in which it works through them; None: a bind."""
    since: float = 0.0
    """When it began with the first of them."""
    answers: int = 0
    pace: float = 0.0
    """Seconds of its answers, averaged over about the last four."""
    slots: int = 2
    """Jobs that it may have at once."""
    beat: Call | None = None
    beat_at: float = -math.inf
    """When it was last asked for a sign of life."""
    pulse: Beat | None = None
    pulse_at: float | None = None
    """When it last gave one."""
    slot: tuple[tuple[Hashable, ...], int] | None = None
    """Where the roster has it."""

    @property
    def up(self) -> bool:
        """It has come up, and stays."""
        return self.health.state in UP

    @property
    def starting(self) -> bool:
        """It has not come up yet."""
        return self.health.state is State.STARTING

    @property
    def first(self) -> Job | None:
        """What it works on."""
        return next(iter(self.flying.values()), None)


class Roster:
    """Workers with room for a job, by what they are prepared for and by how much they have."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[Hashable, int], dict[Worker, None]] = {}
        self._holders: dict[str, set[Worker]] = {}

    def place(self, worker: Worker) -> None:
        """Note a worker's new state, load or preparation."""
        self.remove(worker)
        load = len(worker.flying)
        if worker.health.state is not State.HEALTHY or load >= worker.slots:
            return
        needs: tuple[Hashable, ...] = (ANYTHING, *worker.holds)
        if worker.bound is not None:
            needs += (worker.bound,)
        for need in needs:
            self._rooms.setdefault((need, load), {})[worker] = None
        worker.slot = (needs, load)

    def remove(self, worker: Worker) -> None:
        """It gets no work."""
        if worker.slot is None:
            return
        needs, load = worker.slot
        for need in needs:
            room = self._rooms[need, load]
            del room[worker]
            if not room:
                del self._rooms[need, load]
        worker.slot = None

    def hold(self, worker: Worker, teachers: frozenset[str]) -> None:
        """Note what a worker has loaded, or is about to."""
        for teacher in worker.holds - teachers:
            self._holders[teacher].discard(worker)
        for teacher in teachers - worker.holds:
            self._holders.setdefault(teacher, set()).add(worker)
        worker.holds = teachers

    def holders(self, teacher: str) -> int:
        """How many workers have loaded it."""
        return len(self._holders.get(teacher, ()))

    def find(self, need: Hashable, load: int) -> Worker | None:
        """A worker prepared for something that has so many jobs."""
        return next(iter(self._rooms.get((need, load), ())), None)
