"""A job of two stages: its specialists, all at the same time, and then the student that they teach.

On Ray each run has a driver of its own, which is `opd-ray train` itself: what happens to one of them happens to no
other, and each has its own folder and checkpoints. With ``runtime: local`` they are done here, one after the other.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from opd_ray.commands.train import JOB, ONE_REQUEST_S, interruptible, run_training, signals
from opd_ray.config import STUDENT, Config
from opd_ray.console import errors
from opd_ray.errors import OpdRayError, RunFolderError, Stopped, UserError
from opd_ray.storage.run_folder import STAGES, read_json, stopping_when_full, write_json_atomic

if TYPE_CHECKING:
    from opd_ray.runtime.cluster import RayBackend
    from opd_ray.stages import Stage

__all__ = ["drive", "run_stages"]

COMMAND = "from opd_ray.commands.stages import drive; drive()"
POLL_S = 0.5
PARENT_DEATH = 1
"""prctl's PR_SET_PDEATHSIG: the signal that the system sends a process when its parent has died."""


def run_stages(job: Config, folder: Path, *, resume: bool, force: bool) -> dict[str, Any]:
    """Train what is not trained yet, and tell what it took.

    Args:
        job: a configuration with ``specialists``.
        folder: of the job.
        resume: stages that were begun go on; specialists that have ended are used as they are in any case.
        force: as in ``run_training``.

    Returns:
        The student's result, and under ``stages`` what each of them took.

    Raises:
        UserError: a stage cannot run, by its name; nothing was started for it.
        Stopped: before the end; whatever was begun can be resumed.
    """
    from opd_ray.stages import check, costs, named, stages, standing  # imports torch, which `--help` does not need

    with interruptible(), stopping_when_full(folder):
        first, student = stages(job, folder)
        found = {stage.name: standing(stage, resume=resume, force=force) for stage in (*first, student)}
        if found[STUDENT] == "done" and not resume:
            raise RunFolderError(f"{folder} has come to its end already; choose another name, or score it by --resume")
        todo = [stage for stage in first if found[stage.name] != "done"]
        for stage in first:
            if stage not in todo:
                _note(f"{stage.name}: trained already, in {stage.folder}")
        check(job, [*todo, student])
        told: dict[str, Any] = {"stages": [stage.config.name for stage in (*first, student)]}
        if job.cluster.runtime == "local":
            _write(folder, told)
            for stage in (*todo, student):
                _note(f"{stage.name} begins")
                stage.write(1)
                with named(stage):
                    run_training(stage.config, stage.folder, resume=resume, force=force)
        else:
            flags = [*(["--resume"] if resume else []), *(["--force"] if force else [])]
            with redirect_stdout(sys.stderr), _ray(todo, student) as backend:
                _write(folder, told)
                drivers = Drivers(backend, flags)
                with signals(drivers.heard):
                    drivers.run(todo)
                    drivers.run([student])
        told["took"] = costs(first, student)
        _write(folder, told)
    result: dict[str, Any] = read_json(student.folder / "result.json")
    return result | {"stages": told["took"]}


def _write(folder: Path, told: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / STAGES, told)


@contextmanager
def _ray(first: "Sequence[Stage]", student: "Stage") -> "Iterator[RayBackend]":
    """The cluster that is there, or one of our own that all stages share, with room for each stage."""
    from opd_ray.runtime.cluster import RayBackend
    from opd_ray.runtime.session import clean
    from opd_ray.stages import check_room

    for text in clean():
        _note(text)
    _note("starting Ray")
    stores = [sum(stage.config.cluster.object_store_mb for stage in part) for part in (first, [student])]
    with closing(RayBackend(object_store_mb=max(stores))) as backend:
        for part in (first, [student]):
            check_room(backend, part)
        yield backend


class Drivers:
    """Runs at the same time, each a process of its own."""

    def __init__(self, backend: "RayBackend", flags: Sequence[str]) -> None:
        self._backend, self._flags = backend, flags
        self._drivers: list[Driver] = []
        self._asked: float | None = None
        """When somebody asked all of them to stop."""
        self._signal: int = signal.SIGINT
        """By which signal."""

    def run(self, together: "Sequence[Stage]") -> None:
        """From the start of the first to the end of the last.

        Raises:
            UserError: one of them was refused.
            Stopped: they were asked to stop and are resumable; or one of them stopped by itself, or was killed.
            OpdRayError: one of them failed.
        """
        self._drivers, failed = [], None
        try:
            for stage in together:
                if self._asked is None:
                    stage.write(len(together))
                    self._begin(stage)
            while any(driver.code is None for driver in self._drivers):
                self._backend.wait((), POLL_S)
                if failed is None and (failed := self._failed()) is not None:
                    self._stop_others(failed)
        finally:
            for driver in self._drivers:
                driver.end()
        if (failed := failed or self._failed()) is not None:
            raise failed.error()
        if self._asked is not None and sum(driver.code == 0 for driver in self._drivers) < len(together):
            told = ", ".join(f"{stage.name} {stage.progress()}" for stage in together)
            raise Stopped(f"{told}; --resume goes on from there")

    def _begin(self, stage: "Stage") -> None:
        driver = Driver(stage, self._flags, self._backend.address)
        self._drivers.append(driver)
        if self._asked is not None and not driver.asked:  # while it was made: neither `heard` nor Ray knew of it
            driver.ask(self._signal)

    def _failed(self) -> "Driver | None":
        """Who ended early; where all were asked to stop, who has another reason to."""
        ended = [driver for driver in self._drivers if driver.code]
        return next((one for one in ended if self._asked is None or one.code == UserError.exit_code), None)

    def _stop_others(self, failed: "Driver") -> None:
        others = [driver for driver in self._drivers if driver.code is None]
        if others:
            _note(f"{failed.stage.name} has ended early; the others stop after their round, with a checkpoint")
        for driver in others:
            driver.ask(signal.SIGINT)

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on, each request once: they are in no process group to which it was sent."""
        now = time.monotonic()
        if number == signal.SIGTERM and self._asked is not None and now - self._asked < ONE_REQUEST_S:
            return
        self._asked, self._signal = now, number
        for driver in self._drivers:
            if JOB in os.environ:  # `ray job stop` sends it to every process below
                driver.asked = True
            else:
                driver.ask(number)


class Driver:
    """`opd-ray train` of one stage, on a Ray that is there; its lines are told with its name in front."""

    def __init__(self, stage: "Stage", flags: Sequence[str], address: str) -> None:
        self.stage, self._last = stage, ""
        command = [sys.executable, "-P", "-c", COMMAND, "train", str(stage.recipe), "--out", str(stage.folder.parent)]
        self.process = subprocess.Popen(
            [*command, *flags],
            env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # its result is in its folder
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        self.asked = False
        """To stop, by a signal."""
        self._reader = threading.Thread(target=self._tell, daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def _tell(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._last = line.strip() or self._last
                errors.print(f"{self.stage.config.name} | {line.rstrip()}", soft_wrap=True)

    def ask(self, number: int) -> None:
        """Pass a signal on."""
        self.asked = True
        if self.code is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Nothing of it stays; where it still runs, something went wrong here."""
        if self.code is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)  # a process below it may hold the other end for longer
        if self.process.stderr is not None and not self._reader.is_alive():
            self.process.stderr.close()

    def error(self) -> OpdRayError:
        """Why it ended early."""
        name, code = self.stage.name, self.process.returncode
        if code < 0:
            by = signal.Signals(-code).name
            return Stopped(f"{name}: its driver was ended by {by}; --resume goes on from the last checkpoints")
        kind: type[OpdRayError] = {error.exit_code: error for error in (UserError, Stopped)}.get(code, OpdRayError)
        return kind(f"{name}: {self._last.removeprefix('error: ').removeprefix('stopped: ')}")


def drive() -> None:
    """What such a process does: the command, for as long as the job lives, and deaf to no signal."""
    from opd_ray.cli import main  # it imports this module

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    sys.argv[0] = "opd-ray"
    main()


def _note(text: str) -> None:
    errors.print(text, soft_wrap=True)
