"""What a role's workers did with their time: cumulative worker-seconds, of which readers take differences."""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

__all__ = ["Measured", "Meter", "PoolStatus", "Usage"]

METER_S = 10.0
"""Wall time over which shares and rates are taken, where there is enough work in it."""
METER_ANSWERS = 5
"""Workers tell their busy time with an answer: fewer answers than these say little."""
METER_LIMIT_S = 120.0
"""No older than this, however little there was."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one pool, since it was made. Idle time has a reason: nothing has come yet, or nobody takes more."""

    seconds: float = 0.0
    """Wall time."""
    workers: float = 0.0
    """Worker-seconds of those that were up."""
    busy: float = 0.0
    """Worker-seconds at work, as the workers themselves measured."""
    transfer: float = 0.0
    """Worker-seconds between a request and its answer in which no work was done: transport, Ray, loading inputs."""
    input: float = 0.0
    """Worker-seconds without a request while jobs of this role wait for what other roles have to make first."""
    output: float = 0.0
    """Worker-seconds without a request and without any job: whoever takes the results has to ask for more first."""
    queued: float = 0.0
    """Wall seconds in which at least one job could have run and found no free worker."""
    answers: int = 0

    def __sub__(self, earlier: "Usage") -> "Usage":
        """What came after ``earlier``."""
        return Usage(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Of one role's pool at one moment. From ``wanted`` to ``stale`` it counts workers."""

    role: str
    wanted: int
    starting: int = 0
    healthy: int = 0
    suspect: int = 0
    draining: int = 0
    stale: int = 0
    """Up, with weights that are not proven yet."""
    queue: int = 0
    """Jobs not yet given to a worker."""
    in_flight: int = 0
    """Jobs that workers hold."""
    answers: int = 0
    """Since the pool was made."""
    weights: str | None = None
    """The version that most workers have proven; None where a role draws with none."""
    heartbeat_age: float | None = None
    """Seconds since the last sign of life of the worker that was silent longest."""
    memory_mb: float | None = None
    """Of its largest worker."""
    lost: int = 0
    """Workers lost since the pool was made."""
    teachers: tuple[str, ...] = ()
    """That its workers hold."""


class Measured(Protocol):
    """What is read of a pool."""

    @property
    def usage(self) -> Usage: ...

    def describe(self) -> PoolStatus:
        """How it stands."""
        ...


class Meter:
    """Turns what pools count up into shares and rates of the last seconds, for ``status.json``."""

    def __init__(self, pools: Mapping[str, Measured]) -> None:
        """``pools``: by role."""
        self._pools = pools
        self._seen: dict[str, deque[Usage]] = {role: deque([pool.usage]) for role, pool in pools.items()}

    def roles(self) -> list[dict[str, Any]]:
        """One row for each role, as plain JSON data; to be called about once a second.

        Returns:
            The fields of ``PoolStatus``, ``busy`` (share of the workers' time, 0 to 1) and ``rate`` (answers a
            minute); these two are None before any time has passed.
        """
        return [self._row(role, pool) for role, pool in self._pools.items()]

    def _row(self, role: str, pool: Measured) -> dict[str, Any]:
        seen, now = self._seen[role], pool.usage
        while len(seen) > 1 and _enough(now - seen[1]):
            seen.popleft()
        recent = now - seen[0]
        seen.append(now)
        status = asdict(pool.describe())
        status["teachers"] = list(status["teachers"])
        # What a long job was busy comes all at once when it ends.
        busy = min(recent.busy / recent.workers, 1.0) if recent.workers > 0 else None
        rate = 60 * recent.answers / recent.seconds if recent.seconds > 0 else None
        return status | {"busy": _rounded(busy), "rate": _rounded(rate)}


def _enough(recent: Usage) -> bool:
    return recent.seconds >= METER_LIMIT_S or (recent.seconds >= METER_S and recent.answers >= METER_ANSWERS)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
