"""A backend without processes and without time: events in a heap, and a clock that jumps from one to the next.

It runs the real pools and dispatcher, so what they decide is theirs, and what a decision costs is all that takes time.
No event costs more with more workers.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_ray.actors import Ack
from opd_ray.errors import WorkerLostError
from opd_ray.runtime.handle import Call, Done, Handle, Ref, Store, WorkerSpec

__all__ = ["Seconds", "SimulatedBackend", "SimulatedHandle"]

Seconds = Callable[[str, str, tuple[Any, ...]], float]
"""Role, method and arguments -> how long the call takes."""


@dataclass(eq=False, slots=True)
class _Result:
    """Stands for a stored result."""

    outcome: Done | Exception | None = None


@dataclass(eq=False, slots=True)
class SimulatedHandle:
    """One worker: it does its calls one after the other."""

    backend: "SimulatedBackend"
    role: str
    name: str
    up: bool = False
    dead: bool = False
    _calls: deque[tuple[str, tuple[Any, ...], _Result]] = field(default_factory=deque)

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        """Queue it behind what the worker has."""
        done = _Result()
        if self.dead:
            self.backend._answer(done, WorkerLostError(f"{self.name} is dead"))
        else:
            self._calls.append((method, args, done))
            if self.up and len(self._calls) == 1:
                self._begin()
        return Call(tuple(_Result() for _ in range(bulk)), done)

    def beat(self, *, stack: bool = False) -> Call | None:
        """There is no process to ask."""
        return None

    def kill(self) -> None:
        """It is gone, and so is what it was asked for."""
        self.dead = True
        while self._calls:
            self.backend._answer(self._calls.popleft()[2], WorkerLostError(f"{self.name} died"))

    def start(self) -> None:
        """It is up."""
        self.up = True
        if self._calls and not self.dead:
            self._begin()

    def _begin(self) -> None:
        method, args, done = self._calls[0]
        seconds = self.backend.draw_seconds(self.role, method, args)
        self.backend.after(seconds, lambda: self._end(done, seconds))

    def _end(self, done: _Result, seconds: float) -> None:
        if self.dead:
            return
        method, args, _ = self._calls.popleft()
        self.backend._answer(done, Done(_value(self.name, method, args), seconds, 0))
        if self._calls:
            self._begin()


class SimulatedBackend:
    """Workers that take a given time and answer nothing of interest.

    Args:
        seconds: how long each call takes.
        start_s: from a worker's start until it answers.
        spread: each duration is drawn between (1 - spread) and (1 + spread) times its own.
        seed: of these draws.
        failures: worker's name -> when it dies.
    """

    def __init__(
        self,
        seconds: Seconds,
        *,
        start_s: float = 0.0,
        spread: float = 0.0,
        seed: int = 0,
        failures: Mapping[str, float] | None = None,
    ) -> None:
        self.now = 0.0
        """Seconds since the beginning; moves in ``wait`` alone."""
        self._seconds, self._start_s, self._spread = seconds, start_s, spread
        self._failures, self._random = dict(failures or {}), random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._answered: dict[_Result, None] = {}
        """Answers that nobody has taken yet."""

    def clock(self) -> float:
        """For pools and the dispatcher."""
        return self.now

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def draw_seconds(self, role: str, method: str, args: tuple[Any, ...]) -> float:
        """Of one call."""
        seconds = self._seconds(role, method, args)
        return seconds * self._random.uniform(1 - self._spread, 1 + self._spread) if self._spread else seconds

    def start(self, spec: WorkerSpec, name: str) -> SimulatedHandle:
        """A worker that is up after ``start_s``."""
        handle = SimulatedHandle(self, spec.role, name)
        self.after(self._start_s, handle.start)
        if name in self._failures:
            self.after(max(self._failures[name] - self.now, 0.0), handle.kill)
        return handle

    def start_group(
        self, specs: Sequence[WorkerSpec], timeout_s: float, idle: Callable[[], None] = lambda: None
    ) -> list[Handle]:
        """Workers named by their place."""
        return [self.start(spec, f"{spec.role}-{rank}") for rank, spec in enumerate(specs)]

    def end_group(self, handles: Sequence[Handle]) -> None:
        """They are gone."""
        for handle in handles:
            handle.kill()

    def object_store(self) -> Store | None:
        """There is none."""
        return None

    def shortage(self, specs: Sequence[WorkerSpec], *, free: bool = False) -> str | None:
        """There is room for any number."""
        return None

    def wait(self, refs: Collection[Ref], timeout_s: float) -> list[Ref]:
        """Go on to the next event that answers one of them, or let the time pass."""
        known = frozenset(refs) if isinstance(refs, list | tuple) else refs
        until = self.now + timeout_s
        while not (ready := [ref for ref in self._answered if ref in known]):
            if not self._events or self._events[0][0] > until:
                self.now = until
                return []
            self.now = self._events[0][0]
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
        return ready

    def result(self, ref: Ref) -> Done:
        """What was answered; taken once.

        Raises:
            WorkerLostError: its worker died.
        """
        self._answered.pop(ref, None)
        if isinstance(ref.outcome, Exception):
            raise ref.outcome
        assert ref.outcome is not None
        done: Done = ref.outcome
        return done

    def close(self) -> None:
        """Nothing more happens."""
        self._events.clear()

    def _answer(self, ref: _Result, outcome: Done | Exception) -> None:
        ref.outcome = outcome
        self._answered[ref] = None


def _value(name: str, method: str, args: tuple[Any, ...]) -> Any:
    """A bind is acknowledged as a worker does that took what it was given; else the worker's name."""
    return Ack(args[0].version, 1, args[0].sha256) if method == "bind" else name
