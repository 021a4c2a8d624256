"""A worker process of Ray: the host of one role, with its log, its threads and its signs of life."""

import faulthandler
import os
import resource
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from opd_ray.errors import RunFolderError, UserError
from opd_ray.runtime.handle import Beat, Done, WorkerSpec

__all__ = ["Process"]

NONCE_S = 10.0
"""A network file system may know for a few seconds that a new file is not there."""


class Process:
    """What runs in a Ray worker process: the host of one role, made at the first call."""

    def __init__(self, spec: WorkerSpec, name: str, home: str) -> None:
        self._elsewhere = ray.get_runtime_context().get_node_id() != home
        ship = spec.ship and not spec.home
        astray = _astray(spec.nonce, spec.role, 0.0 if ship else NONCE_S) if spec.nonce is not None else None
        logs, self._astray = spec.logs, None if ship else astray
        self._away = ""
        if astray is not None:
            logs = elsewhere(spec) if ship else None
            self._away = str(logs or "")
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(log, 1)  # also what native code prints when it dies
            os.dup2(log, 2)
        self._spec = spec
        self._host: Any = None

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the host; its own errors travel to whoever waits."""
        if self._host is None:
            if "torch" in sys.modules or self._spec.threads > 1:
                _set_threads(self._spec.threads)
            self._host = self._make()
            if "torch" in sys.modules:
                _set_threads(self._spec.threads)
        try:
            return getattr(self._host, method)(*args)
        except UserError as error:
            raise self._placed(error) from None

    def _placed(self, error: UserError) -> UserError:
        """With the node in front, where that is another one than the driver's."""
        return type(error)(f"node {ray.util.get_node_ip_address()}: {error}") if self._elsewhere else error

    def _make(self) -> Any:
        """The host.

        Raises:
            UserError: what is missing on its node.
        """
        if self._astray is not None:
            raise self._astray
        try:
            return self._spec.factory()
        except UserError as error:  # for instance a model that lies on the driver's node alone
            raise self._placed(error) from None

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]  # beside a call that is under way
    def beat(self, stack: bool) -> Done:
        """A sign of life; with the stacks of all threads in the log where they were asked for."""
        if stack:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._spec.stack_after_s:  # a watchdog without Python's lock, put off by each sign of life
            faulthandler.dump_traceback_later(self._spec.stack_after_s, file=sys.stderr)
        node, memory = ray.util.get_node_ip_address(), (_memory_mb(), _gpu_memory_mb())
        return Done(Beat(node, os.getpid(), *memory, away=self._away), 0.0, 0)


def elsewhere(spec: WorkerSpec) -> Path | None:
    """Where logs lie on a node that does not see the run folder: this user's own, and of this attempt alone.

    None where it cannot be made, or is another's: a worker goes without a log then.
    """
    if spec.logs is None or spec.nonce is None:
        return None
    name = f"opd-ray-{os.getuid()}-{spec.logs.parent.name}-{spec.nonce[1][:12]}"
    folder = Path(tempfile.gettempdir()) / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
    return folder if mine else None


def _astray(nonce: tuple[Path, str], role: str, patience_s: float) -> RunFolderError | None:
    """Why this worker must not use the run folder; None where it sees the driver's."""
    path, expected = nonce
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(OSError):
            if path.read_text() == expected:
                return None
        if time.monotonic() > deadline:
            return RunFolderError(
                f"node {ray.util.get_node_ip_address()}: {path.parent} is not the run folder that the driver has, "
                f"so no {role} can work there; mount the same storage at this path on every node, or set "
                "cluster.storage: ship"
            )
        time.sleep(0.5)


def _set_threads(count: int) -> None:
    import torch  # a worker that computes nothing does without

    torch.set_num_threads(count)


def _memory_mb() -> float:
    """Resident memory of this process; at its highest where the system does not tell the present one."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _gpu_memory_mb() -> float:
    """What torch holds of its card."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.memory_reserved()) / 2**20
