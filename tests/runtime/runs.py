"""Whole runs for tests, with something done to them on the way."""

import io
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.experimental import get_object_locations
from rich.console import Console

from opd_ray.build import build
from opd_ray.config import Config
from opd_ray.errors import Stopped
from opd_ray.learners import UpdateReport
from opd_ray.loop import train
from opd_ray.metrics import rows
from opd_ray.report.live import Live
from opd_ray.run import Run

LOOPBACK = "127.0.0.1"


def same(one: "Outcome", other: "Outcome") -> bool:
    """Bits and numbers, but for what depends on time and place."""
    told = ("round", "loss", "gap", "grad_norm", "lr", "forwards", "staleness")
    assert [{name: row.get(name) for name in told} for row in one.rows] == [
        {name: row.get(name) for name in told} for row in other.rows
    ]
    assert one.result["ema_sha256"] == other.result["ema_sha256"]
    return bool(one.result["student_sha256"] == other.result["student_sha256"])


def metric(report: UpdateReport, name: str) -> list[float]:
    """Of one update, the mean of each task's each step."""
    return [s / n for steps in report.steps.values() for metrics in steps.values() for s, n in [metrics[name]]]


class Watcher(Live):
    """A live view that says nothing to anybody, and calls back after each round."""

    def __init__(self, total: int) -> None:
        super().__init__(total, "test", console=Console(file=io.StringIO()))
        self.notes: list[str] = []
        self.after_round: Callable[[], None] = lambda: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round(self, row: Mapping[str, Any]) -> None:
        self.after_round()


@dataclass
class Outcome:
    """What a run left."""

    rows: list[dict[str, Any]]
    notes: list[str]
    pids: list[int]
    result: dict[str, Any] = field(default_factory=dict)
    error: Stopped | None = None


def go(
    config: Config, folder: Path, *, resume: bool = False, watch: Callable[[Run, Watcher], None] | None = None
) -> Outcome:
    """Train to the end or to a stop, as the command does."""
    live = Watcher(config.rounds)
    outcome = Outcome([], live.notes, [])
    with build(config, folder, live, resume=resume) as run:
        if config.cluster.runtime == "ray":
            outcome.pids += map(pid_of, handles(run))
        if watch is not None:
            watch(run, live)
        try:
            train(run)
            outcome.result = run.finish()
        except Stopped as error:
            run.stop(str(error))
            outcome.error = error
    outcome.rows += rows(folder / "metrics.jsonl")
    return outcome


def handles(run: Run) -> list[Any]:
    """Of every worker that lives now."""
    return [*run.learner.ranks, *(worker.handle for pool in run.dispatcher.pools for worker in pool.workers)]


def pid_of(handle: Any) -> int:
    """The process behind a Ray handle."""
    return ray.get(handle._actor.__ray_call__.remote(lambda process: os.getpid()), timeout=60)


def nowhere(refs: Sequence[Any], within_s: float = 10.0) -> list[Any]:
    """References without a location in the object store. Ray notes a location a little after the answer."""
    deadline = time.monotonic() + within_s
    while True:
        locations = get_object_locations(list(refs))
        left = [ref for ref in refs if not locations.get(ref, {}).get("node_ids")]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def alive(pids: Sequence[int], within_s: float = 30.0) -> list[int]:
    """Those that have not ended after a while."""
    deadline = time.monotonic() + within_s
    while (left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


class Killer:
    """Kills one worker of each named role, in a given round, while that worker has work."""

    def __init__(self, run: Run, rounds: Mapping[str, int]) -> None:
        self.run, self.rounds, self.killed = run, dict(rounds), list[str]()
        self.pids: dict[str, int] = {}
        self.everybody: list[int] = []
        self.meet_successors()
        backend = run.dispatcher.backend
        self.wait, backend.wait = backend.wait, self.strike  # type: ignore[method-assign]

    def meet_successors(self) -> None:
        """Learn the processes of all workers that live now."""
        workers = [worker.handle for pool in self.run.dispatcher.pools for worker in pool.workers]
        self.pids = {handle.name: pid_of(handle) for handle in workers}
        self.everybody += self.pids.values()

    def strike(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        for pool in self.run.dispatcher.pools:
            busy = [
                worker
                for worker in pool.workers
                if worker.handle.name in self.pids and any(job is not None for job in worker.flying.values())
            ]
            if busy and self.rounds.get(pool.spec.role) == self.run.round:
                del self.rounds[pool.spec.role]
                os.kill(self.pids[busy[0].handle.name], signal.SIGKILL)
                self.killed.append(busy[0].handle.name)
        return self.wait(refs, timeout_s)


def tensors_in(value: Any) -> list[str]:
    """Where a record holds a tensor or an array."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [type(value).__name__]
    if is_dataclass(value) and not isinstance(value, type):
        return [found for part in fields(value) for found in tensors_in(getattr(value, part.name))]
    if isinstance(value, Mapping):
        return [found for part in value.values() for found in tensors_in(part)]
    if isinstance(value, list | tuple | set):
        return [found for part in value for found in tensors_in(part)]
    return []


def listeners(pid: int) -> list[str]:
    """Addresses on which a process listens for TCP; none where it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return _listeners(pid)
    return []


def _listeners(pid: int) -> list[str]:
    sockets = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            for line in file.readlines()[1:]:
                parts = line.split()
                if parts[3] == "0A":
                    sockets[parts[9]] = parts[1].rpartition(":")[0]
    found = []
    for link in os.scandir(f"/proc/{pid}/fd"):
        try:
            name = os.readlink(link.path)
        except OSError:
            continue
        if name.startswith("socket:[") and name[8:-1] in sockets:
            address = sockets[name[8:-1]]
            found.append(LOOPBACK if address in {"0100007F", "0000000000000000FFFF00000100007F"} else address)
    return found


def bare_environment() -> dict[str, str]:
    """This process's environment without what its own Ray session put there."""
    ours = {"RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def descendants(pid: int) -> list[int]:
    """Processes below one, as far down as it goes."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = children.get(pid, [])
    return [*found, *(below for child in found for below in descendants(child))]
