"""A few processes that work off nodes as soon as what they need is there."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import Protocol
from opd_ray.errors import DiskFullError, OpdRayError, Stopped, UserError
from opd_ray.storage.run_folder import stopping_when_full

__all__ = ["Workers", "in_one_line"]

PATIENCE_S = 120.0
"""How long a worker that is asked to stop may take for the round that it is in."""


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    node: Node | None = None
    since: float = 0.0


@dataclass
class Workers:
    """Processes of this machine, each with one node at a time.

    A node that fails is told, and so is what needed it; all others go on.
    """

    protocol: Protocol
    place: Place
    count: int
    told: Callable[[Node, str, float], None]
    """Node, `begun`, `done` or why it failed, and seconds."""
    failed: dict[str, str] = field(default_factory=dict)
    _workers: list[_Worker] = field(default_factory=list)

    def carry_out(self, nodes: Sequence[Node], done: set[str]) -> None:
        """Work off all nodes whose keys are not in ``done``, which grows.

        Raises:
            KeyboardInterrupt: asked to stop; every training has written a checkpoint.
            DiskFullError: so it was for a node, and would be for all others.
        """
        left = [node for node in nodes if node.key not in done]
        try:
            while left or any(worker.node for worker in self._workers):
                left = self._without_lost(left)
                self._hand_out(left, done)
                self._collect(done)
        finally:
            self._end()

    def _without_lost(self, left: list[Node]) -> list[Node]:
        for node in left:
            missing = next((need for need in node.needs if need in self.failed), None)
            if missing is not None:
                self.failed[node.key] = f"needs {missing}, which failed"
        return [node for node in left if node.key not in self.failed]

    def _hand_out(self, left: list[Node], done: set[str]) -> None:
        ready = [node for node in left if all(need in done for need in node.needs)]
        for node in ready:
            worker = next((one for one in self._workers if one.node is None), None)
            if worker is None:
                if len(self._workers) == self.count:
                    return
                worker = self._start()
            left.remove(node)
            worker.node, worker.since = node, time.monotonic()
            worker.pipe.send(node)
            self.told(node, "begun", 0.0)

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = self.place.out / "logs" / f"worker-{len(self._workers)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_serve, args=(theirs, self.protocol, self.place, log), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _collect(self, done: set[str]) -> None:
        busy = {worker.pipe: worker for worker in self._workers if worker.node is not None}
        for pipe in wait([*busy], timeout=1.0):
            assert isinstance(pipe, Connection)
            worker = busy[pipe]
            node, worker.node = worker.node, None
            assert node is not None
            try:
                why = pipe.recv()
            except (EOFError, OSError):
                worker.process.join(5)
                why = f"its process died ({worker.process.exitcode}); enough memory? Run the command again to go on"
                self._workers.remove(worker)
            if isinstance(why, DiskFullError):
                raise why
            if why is None:
                done.add(node.key)
            else:
                self.failed[node.key] = why
            self.told(node, why or "done", time.monotonic() - worker.since)

    def _end(self) -> None:
        """Ask for a checkpoint, wait for it, and leave nothing behind."""
        for worker in self._workers:
            worker.pipe.close()
            if worker.node is not None and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGTERM)
        until = time.monotonic() + PATIENCE_S
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(5)
        self._workers.clear()


def in_one_line(error: OpdRayError) -> str:
    """What it says, in the words of a comparison, which goes on without being asked to."""
    return " ".join(str(error).splitlines()).replace("go on with --resume", "run the command again")


def _serve(pipe: Connection, protocol: Protocol, place: Place, log: Path) -> None:
    """A worker's life. In a process group of its own, so that Ctrl-C reaches it through the driver alone."""
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    from opd_ray.comparison.work import perform  # imports torch and diffusers, which the driver does not need

    while True:
        try:
            node = pipe.recv()
        except (EOFError, OSError):  # the driver is gone, or has nothing more
            return
        why: str | DiskFullError | None = None
        try:
            with stopping_when_full(place.out):
                perform(protocol, node, place)
        except DiskFullError as error:
            why = error
        except (Stopped, UserError) as error:
            why = in_one_line(error)
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error} ({log} has the rest)"
        try:
            pipe.send(why)
        except OSError:  # the driver is gone, or asked for the stop and waits for no answer
            return
