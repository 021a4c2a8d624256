"""A backend in memory. Workers do their calls one after the other; time passes in ``wait`` alone."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_ray.actors import Ack
from opd_ray.errors import InputLostError, StaleWeightsError, WorkerLostError
from opd_ray.runtime.handle import Beat, Call, Done, Ref, Weights, WorkerSpec
from opd_ray.types import WeightVersion

START_S = 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StoredRef:
    """A name of a result; what it holds is in the store, or was lost."""


@dataclass
class Request:
    method: str
    args: tuple[Any, ...]
    call: Call
    ends: float | None = None


class FakeHandle:
    def __init__(self, backend: "FakeBackend", spec: WorkerSpec, name: str) -> None:
        self.backend, self.spec, self.name = backend, spec, name
        self.host: Any = None
        self.requests: deque[Request] = deque()
        self.most = 0
        self.dead = False
        self.free_at = backend.clock() + START_S

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        call = Call(tuple(StoredRef() for _ in range(bulk)), StoredRef())
        if self.dead:
            self.backend.outcomes[call.done] = WorkerLostError(f"{self.name} is dead")
        else:
            assert method != "bind" or not self.requests, "weights are swapped on idle workers alone"
            self.requests.append(Request(method, args, call))
            self.most = max(self.most, sum(r.method != "ready" for r in self.requests))
        return call

    def beat(self, *, stack=False):
        if not self.backend.beats:
            return None
        if stack:
            self.backend.stacks.append(self.name)
        call = Call((), StoredRef())
        if self.dead:
            self.backend.outcomes[call.done] = WorkerLostError(f"{self.name} died")
        elif self.name not in self.backend.frozen:
            self.backend.outcomes[call.done] = Done(Beat("here", 1, 100.0), 0.0, 0)
        return call

    def kill(self) -> None:
        self.backend.killed.append(self.name)
        self.die()

    def die(self) -> None:
        self.dead = True
        for request in self.requests:
            self.backend.outcomes[request.call.done] = WorkerLostError(f"{self.name} died")
        self.requests.clear()

    def begin(self) -> float | None:
        """When the first request ends; None where that never happens."""
        if not self.requests or self.dead or self.name in self.backend.never_start:
            return None
        request = self.requests[0]
        if request.ends is None:
            if (self.name, request.method) in self.backend.hanging:
                return None
            self.backend.begun.append((self.name, request.method, request.args))
            seconds = self.backend.seconds.get(request.method, 0.0)
            request.ends = max(self.backend.clock(), self.free_at) + seconds
        return request.ends

    def end(self) -> None:
        request = self.requests.popleft()
        self.free_at = self.backend.clock()
        try:
            args = [self.backend.fetch(arg) for arg in request.args]
            self.host = self.host or self.spec.factory()
            results = getattr(self.host, request.method)(*args)
        except Exception as error:
            self.backend.outcomes[request.call.done] = error
            return
        *flats, done = results if isinstance(results, tuple) else (results,)
        self.backend.store.update(zip(request.call.bulk, flats, strict=True))
        self.backend.outcomes[request.call.done] = done


@dataclass
class FakeBackend:
    """What goes wrong is said before or while it runs."""

    clock: Clock = field(default_factory=Clock)
    seconds: dict[str, float] = field(default_factory=dict)
    """Method -> how long it takes."""
    never_start: set[str] = field(default_factory=set)
    hanging: set[tuple[str, str]] = field(default_factory=set)
    """(worker, method) that is never answered."""
    beats: bool = False
    """Whether workers give signs of life; those in ``frozen`` do not."""
    frozen: set[str] = field(default_factory=set)
    stacks: list[str] = field(default_factory=list)
    lack: str | None = None
    handles: dict[str, FakeHandle] = field(default_factory=dict)
    store: dict[Ref, Any] = field(default_factory=dict)
    outcomes: dict[Ref, Done | Exception] = field(default_factory=dict)
    killed: list[str] = field(default_factory=list)
    begun: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    asked: list[tuple[int, bool]] = field(default_factory=list)
    before_wait: Callable[[], None] = lambda: None

    def start(self, spec: WorkerSpec, name: str) -> FakeHandle:
        assert name not in self.handles, "every incarnation has a name of its own"
        self.handles[name] = FakeHandle(self, spec, name)
        return self.handles[name]

    def start_group(self, specs: Sequence[WorkerSpec], timeout_s: float, idle=lambda: None) -> list[FakeHandle]:
        return [self.start(spec, f"{spec.role}-{rank}") for rank, spec in enumerate(specs)]

    def shortage(self, specs: Sequence[WorkerSpec], *, free: bool = False) -> str | None:
        self.asked.append((len(specs), free))
        return self.lack

    def end_group(self, handles: Sequence[FakeHandle]) -> None:
        for handle in handles:
            handle.kill()

    def object_store(self) -> None:
        return None

    def fetch(self, arg: Any) -> Any:
        if not isinstance(arg, StoredRef):
            return arg
        if arg not in self.store:
            raise InputLostError("object is gone")
        return self.store[arg]

    def lose(self, ref: Ref) -> None:
        del self.store[ref]

    def wait(self, refs: Sequence[Ref], timeout_s: float) -> list[Ref]:
        self.before_wait()
        until = self.clock() + timeout_s
        while not (ready := [ref for ref in refs if ref in self.outcomes]):
            ends = {handle: end for handle in self.handles.values() if (end := handle.begin()) is not None}
            first = min(ends, key=ends.__getitem__, default=None)
            if first is None or ends[first] > until:
                self.clock.now = until
                return []
            self.clock.now = max(self.clock.now, ends[first])
            first.end()
        return ready

    def result(self, ref: Ref) -> Done:
        outcome = self.outcomes[ref]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        for handle in self.handles.values():
            handle.kill()


class Painter:
    """Draws a number once it has proven its weights."""

    def __init__(self) -> None:
        self.bound: Any = None

    def ready(self) -> Done:
        return Done("up", 0.0, 0)

    def bind(self, weights: Weights, flat: str) -> Done:
        assert not weights.flats and flat == f"bytes of {weights.sha256}"
        self.bound = weights.identity
        return Done(Ack(weights.version, 1, weights.sha256), 0.0, 0)

    def draw(self, number: int, version: WeightVersion, sha256: str) -> tuple[str, Done]:
        if self.bound != (version, sha256):
            raise StaleWeightsError(f"bound is {self.bound}")
        return f"picture {number} by {sha256}", Done(number, 2.0, 3)


class Critic:
    def ready(self) -> Done:
        return Done({"critic": "facts"}, 0.0, 0)

    def score(self, number: int, picture: str) -> tuple[str, Done]:
        return f"mark of {picture}", Done(number, 1.0, 1)

    def fail(self) -> Done:
        raise ZeroDivisionError("own")


def weights(backend: FakeBackend, version: int) -> Weights:
    flat, sha256 = StoredRef(), f"sha-{version}"
    backend.store[flat] = f"bytes of {sha256}"
    return Weights(WeightVersion(0, 0, version), sha256, (flat,))
