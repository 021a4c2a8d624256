"""A worker's life as a pure state machine: no Ray, no clock of its own."""

from collections.abc import Callable
from enum import StrEnum

__all__ = ["Event", "Health", "State"]


class State(StrEnum):
    """Where a worker is in its life. Only a healthy one gets work."""

    STARTING = "starting"
    STALE = "stale"
    """Its weights are not proven."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """A call takes too long; it keeps what it has and gets nothing new."""
    DRAINING = "draining"
    """Finishes what it holds, then goes."""
    DEAD = "dead"


class Event(StrEnum):
    """What can happen to it."""

    READY = "ready"
    UNPROVEN = "unproven"
    PROVEN = "proven"
    LATE = "late"
    ANSWERED = "answered"
    DRAIN = "drain"
    LOST = "lost"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.READY): State.HEALTHY,
    (State.HEALTHY, Event.UNPROVEN): State.STALE,
    (State.STALE, Event.PROVEN): State.HEALTHY,
    (State.STALE, Event.LATE): State.SUSPECT,
    (State.HEALTHY, Event.LATE): State.SUSPECT,
    (State.SUSPECT, Event.ANSWERED): State.HEALTHY,
    (State.SUSPECT, Event.PROVEN): State.HEALTHY,
    (State.STARTING, Event.DRAIN): State.DRAINING,
    (State.STALE, Event.DRAIN): State.DRAINING,
    (State.HEALTHY, Event.DRAIN): State.DRAINING,
    (State.SUSPECT, Event.DRAIN): State.DRAINING,
}


class Health:
    """State of one incarnation of a worker. A dead worker never comes back: its successor is another one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.state = State.STARTING
        self.since = clock()

    def apply(self, event: Event) -> None:
        """Move on; an event that means nothing in this state is ignored, and any state can be lost."""
        new = State.DEAD if event is Event.LOST else TRANSITIONS.get((self.state, event), self.state)
        if new is not self.state:
            self.state, self.since = new, self._clock()

    @property
    def seconds(self) -> float:
        """Time in this state."""
        return self._clock() - self.since
