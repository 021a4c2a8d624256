"""What is told of a pool: how it stands, and of a worker that was lost all that the driver knows, in one line."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ray.runtime.handle import Beat, WorkerSpec
from opd_ray.runtime.health import State
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.roster import Worker
from opd_ray.runtime.usage import PoolStatus

if TYPE_CHECKING:
    from opd_ray.runtime.pool import Pool

__all__ = ["describe", "last_signs", "lost_worker", "place", "where"]

LINES = 6
CHARACTERS = 200
READ_BYTES = 16384
FRAMES = 4
THREAD = re.compile(r"(Current thread|Thread) 0x\w+ .*\(most recent call first\):")
AT_REST = re.compile(r"<no Python frame>|/threading\.py|/ray/_private/|/runtime/process\.py.* in beat$")


def lost_worker(spec: WorkerSpec, worker: Worker, state: State, jobs: Sequence[Job], why: str, now: float) -> str:
    """Which worker, where it ran, at which item and in which phase, why, its last sign of life and last words."""
    name = worker.handle.name
    held = f" while {jobs[0].label}" if jobs and jobs[0].label else ""
    phase = "" if jobs else f" while {_phase(worker, state)}"
    text = f"{name}{place(worker.pulse)} was lost{held or phase} ({why}); {len(jobs)} work items run again"
    logs = None if spec.ship and worker.pulse is None else spec.logs  # there may be an older attempt's
    return text + last_signs(logs, name, worker.pulse, worker.pulse_at, now)


def place(pulse: Beat | None) -> str:
    """Where a worker ran, behind its name, as far as it is known."""
    return f" (node {pulse.node}, pid {pulse.pid})" if pulse is not None else ""


def last_signs(logs: Path | None, name: str, pulse: Beat | None, pulse_at: float | None, now: float) -> str:
    """A worker's last sign of life and last words, as the end of a sentence."""
    text = ""
    if pulse is not None and pulse_at is not None:
        text += f"; last heartbeat {max(now - pulse_at, 0.0):.0f} s before, with {pulse.memory_mb:.0f} MB"
        if pulse.gpu_memory_mb:
            text += f" and {pulse.gpu_memory_mb:.0f} MB of its card"
    away = pulse.away if pulse is not None else ""
    if away:
        text += f"; its log is {away}/{name}.log there"
    elif lines := last_lines(logs, name):
        text += f"; last in {name}.log: {' | '.join(lines)}"
    return text


def _phase(worker: Worker, state: State) -> str:
    """What a worker without work was about."""
    if None in worker.flying.values():
        return "binding weights"
    return "idle" if state is State.HEALTHY else state.value


def where(spec: WorkerSpec, name: str) -> str:
    """Where its log is, as the end of a sentence."""
    if spec.logs is None:
        return ""
    return f"; see {name}.log, in {spec.logs} or on its node" if spec.ship else f"; see {spec.logs}/{name}.log"


def last_lines(logs: Path | None, name: str) -> list[str]:
    """The end of a worker's log; nothing where there is none, or where it lies on another machine."""
    if logs is None:
        return []
    try:
        with (logs / f"{name}.log").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - READ_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip()[:CHARACTERS] for line in _worth_telling(lines) if line.strip()][-LINES:]


def _worth_telling(lines: Sequence[str]) -> list[str]:
    """Where stacks were written: of each thread at work no more than its innermost frames, nothing of the others."""
    told, frames = list[str](), -1
    for line in lines:
        if THREAD.match(line):
            frames = 0
        elif frames < 0 or not line.startswith("  "):
            frames = frames if not line.strip() else -1
            told.append(line)
        else:
            frames = FRAMES if frames == 0 and AT_REST.search(line) else frames + 1
            if frames <= FRAMES and not AT_REST.search(line):
                told.append(line)
    return told


def describe(pool: "Pool", now: float) -> PoolStatus:
    """How a pool stands."""
    states = Counter(worker.health.state for worker in pool.workers)
    ages = [now - worker.pulse_at for worker in pool.workers if worker.pulse_at is not None]
    pulses = [worker.pulse.memory_mb for worker in pool.workers if worker.pulse is not None]
    bound = Counter(str(worker.bound[0]) for worker in pool.workers if worker.bound is not None)
    return PoolStatus(
        role=pool.spec.role,
        wanted=pool.size,
        starting=states[State.STARTING],
        healthy=states[State.HEALTHY],
        suspect=states[State.SUSPECT],
        draining=states[State.DRAINING],
        stale=states[State.STALE],
        queue=len(pool.queue),
        in_flight=sum(len(worker.flying) for worker in pool.workers),
        answers=pool.account.answers,
        weights=bound.most_common(1)[0][0] if bound else None,
        heartbeat_age=max(ages, default=None),
        memory_mb=max(pulses, default=None),
        lost=len(pool.lost),
        teachers=pool.teachers,
    )
