"""What a backend offers, and the small records that cross it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a worker that computes nothing imports no torch
    from opd_ray.types import WeightVersion

__all__ = ["Backend", "Beat", "Call", "Done", "Handle", "RankFacts", "Ref", "Store", "Weights", "WorkerSpec"]

Ref = Any
"""A stored result: the array itself (local) or a ``ray.ObjectRef``. The driver never looks inside."""


@dataclass(frozen=True, slots=True)
class Done:
    """The small record that every method of a host returns, beside its bulk results."""

    value: Any
    seconds: float
    forwards: int
    """Rows that went through a denoiser; a guided row counts twice."""
    holds: tuple[str, ...] | None = None
    """What the worker has loaded now, where its work may need one of several things: names of teachers."""
    loading: float = 0.0
    """The part of the seconds that went into loading one of them."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's sign of life; it is given beside whatever the worker is doing."""

    node: str
    pid: int
    memory_mb: float
    """Resident memory of its process."""
    gpu_memory_mb: float = 0.0
    away: str = ""
    """Where on its node its log is, if not in the run folder."""


@dataclass(frozen=True, slots=True)
class Store:
    """The object store over all nodes."""

    used: int
    """Bytes."""
    spilled: int
    """Bytes written to disk for want of room, since this backend was made."""
    smallest: int
    """Capacity in bytes of the node that has the least."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request under way: references to its bulk results and to its record."""

    bulk: tuple[Ref, ...]
    done: Ref


@dataclass(frozen=True, slots=True)
class Weights:
    """Published weights: references to the arrays, which say themselves what they hold, and their identity."""

    version: "WeightVersion"
    sha256: str
    flats: tuple[Ref, ...] = ()
    checksum: str = ""
    """``opd_ray.digest.checksum``: what a receiver's bound parameters have to give."""

    @property
    def identity(self) -> tuple["WeightVersion", str]:
        """What a worker has to have proven before it draws with them."""
        return self.version, self.sha256


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to make a worker of one role."""

    role: str
    factory: Callable[[], Any]
    """Makes the host inside the worker."""
    threads: int
    resources: dict[str, float]
    """Of Ray: cpu, gpu, custom ones."""
    logs: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Of Ray: packages, image, variables of these workers alone."""
    nonce: tuple[Path, str] | None = None
    """A file of the run folder and its content: a worker that does not find it sees another folder than the driver."""
    ship: bool = False
    """It may see another folder: then its log stays on its node, and nothing of the run's is written there."""
    home: bool = False
    """On the driver's node, and nowhere else."""
    stack_after_s: float = 0.0
    """So long after its last sign of life a wedged worker writes all its stacks into its log; 0: never."""


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a learner rank says of itself when it is up."""

    precision: str
    """What it computes in."""
    buckets: int = 1
    """Arrays in which it publishes weights."""


class Handle(Protocol):
    """One incarnation of a worker."""

    name: str

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        """Start a method that returns ``bulk`` arrays and a ``Done``."""
        ...

    def beat(self, *, stack: bool = False) -> Call | None:
        """Ask for a sign of life, a ``Done`` with a ``Beat``; None where there is no other process.

        Args:
            stack: it also writes the stacks of all its threads into its log.
        """
        ...

    def kill(self) -> None:
        """End the worker at once."""
        ...


class Backend(Protocol):
    """Where workers live."""

    def start(self, spec: WorkerSpec, name: str) -> Handle:
        """Begin to start a worker; whether it came up shows in its first call."""
        ...

    def start_group(
        self, specs: Sequence[WorkerSpec], timeout_s: float, idle: Callable[[], None] = lambda: None
    ) -> list[Handle]:
        """Start workers that are placed together or not at all.

        Args:
            specs: a worker each.
            timeout_s: how long a place may be waited for.
            idle: called about once a second while it is.

        Raises:
            PlacementError: asked, free and missing.
        """
        ...

    def shortage(self, specs: Sequence[WorkerSpec], *, free: bool = False) -> str | None:
        """What the cluster lacks for these workers, or None.

        Args:
            specs: a worker each.
            free: compare with what is not in use, rather than with all there is.
        """
        ...

    def end_group(self, handles: Sequence[Handle]) -> None:
        """End workers that ``start_group`` gave, and give back their place."""
        ...

    def object_store(self) -> Store | None:
        """Of the object store; None where there is none."""
        ...

    def wait(self, refs: Collection[Ref], timeout_s: float) -> list[Ref]:
        """Those that are done, after at most ``timeout_s``."""
        ...

    def result(self, ref: Ref) -> Done:
        """The record of a finished call.

        Raises:
            WorkerLostError: the worker died.
            InputLostError: an argument is gone from the object store.
            Exception: the method's own error.
        """
        ...

    def close(self) -> None:
        """End every worker that this backend started."""
        ...
