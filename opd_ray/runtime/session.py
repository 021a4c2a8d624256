"""The folder of a Ray that we start: ours for as long as this process lives, and nothing of it stays.

A clean ``ray.shutdown()`` leaves Ray's session folder, and a killed driver leaves workers for a while. So each Ray of
ours gets a temporary folder to itself, and in it a file that the driver keeps locked. The system lets go of the lock
when the driver dies in whatever way: whoever gets it then may end what is left. No Ray of others is ever looked at.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["Session", "apart", "clean", "forsaken", "processes"]

VITAL = (b"raylet", b"gcs_server")
"""Without these two of its processes a Ray of one machine is no more."""

PREFIX = "opd-ray-"
MARK = "driver.json"
LONGEST_BASE = 26
"""In bytes: below it Ray's sockets have paths of 81 more, and the system allows 107."""
PATIENCE_S = 10.0
"""A process that was sent SIGKILL is gone by then, unless the system itself hangs."""
OF_RAY = re.compile(rb"/ray/(core|dashboard|_private|autoscaler)/")
"""In the first words of a command that runs a part of Ray, whichever environment it is installed in."""

_is_apart = False
_held: "set[Session]" = set()
"""Locked until they are removed, or this process ends, even where nobody else keeps them."""


class Session:
    """A folder for one Ray, marked as ours."""

    def __init__(self) -> None:
        base = _base()
        base.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        hidden = self.folder / f".{MARK}"
        self._mark = hidden.open("w")
        fcntl.flock(self._mark, fcntl.LOCK_EX)
        mark = {"pid": os.getpid(), "time": time.time(), "command": " ".join(sys.argv), **_machine()}
        json.dump(mark, self._mark)
        self._mark.flush()
        hidden.rename(self.folder / MARK)  # nobody sees it before it is locked
        self._vital: dict[int, str] = {}
        _held.add(self)

    def watch(self) -> None:
        """From now on ``lost`` knows which processes Ray cannot do without."""
        for pid in processes(self.folder):
            with suppress(OSError):  # it has ended meanwhile, or is no child of ours but one that raylet just forked
                program = os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if program in VITAL:
                    self._vital[pid] = program.decode()

    def lost(self) -> str | None:
        """Which of those has ended."""
        for pid, program in self._vital.items():
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:  # Ray itself asked before us
                ended = True
            if ended:
                return f"{program} (process {pid})"
        return None

    def remove(self) -> None:
        """End what is left of its processes, then remove it."""
        with self._mark, suppress(OSError):  # what cannot be removed now is found by `clean`
            _remove(self.folder)
        _held.discard(self)


@contextmanager
def apart() -> Iterator[None]:
    """What Ray forks inside gets a process group of its own.

    A SIGTERM to our whole group, as `timeout` and some schedulers send it, would otherwise end Ray under a driver that
    wants to finish its round and write a checkpoint. Ray's processes die with the driver all the same.
    """
    global _is_apart
    _is_apart = True
    try:
        yield
    finally:
        _is_apart = False


def _leave_group() -> None:
    if _is_apart:
        os.setpgid(0, 0)


os.register_at_fork(after_in_child=_leave_group)  # `subprocess` offers this to its caller alone, which is Ray


def forsaken() -> list[Path]:
    """The folders of those whose driver no longer lives."""
    return [folder for folder, _ in _taken_over()]


def clean() -> list[str]:
    """End and remove what drivers left that were killed; a line for each."""
    told = []
    for folder, mark in _taken_over():
        try:
            about = json.load(mark)
            whose = f"process {about['pid']} ({about['command']})"
        except (ValueError, LookupError, TypeError):
            whose = "a process"
        try:
            count = len(_remove(folder))
            told.append(f"removed {folder}, the Ray of {whose}, which was killed; {count} processes of it ended")
        except OSError as error:
            told.append(f"{folder}, the Ray of {whose}, which was killed, cannot be removed ({error.strerror})")
    return told


def processes(folder: Path) -> list[int]:
    """Ray's processes that belong to the Ray of a folder; none where the system has no /proc.

    They name the folder in their command. A worker replaces its command by a title, and has its log open there.
    """
    found, name = [], os.fsencode(folder) + b"/"
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            command = Path(entry.path, "cmdline").read_bytes()
            ray = OF_RAY.search(b" ".join(command.split(b"\0")[:4]))
            if (ray and name in command) or (command.startswith(b"ray::") and _opened_in(entry.path, folder)):
                found.append(int(entry.name))
        except OSError:  # it ended
            continue
    return found


def _opened_in(process: str, folder: Path) -> bool:
    for number in os.listdir(f"{process}/fd"):
        with suppress(OSError):
            if os.readlink(f"{process}/fd/{number}").startswith(f"{folder}/"):
                return True
    return False


def _base() -> Path:
    """Where Ray would put its own folder, unless that is too deep for the paths of its sockets."""
    linux = sys.platform.startswith("linux")
    base = Path(os.environ.get("RAY_TMPDIR") or (linux and os.environ.get("TMPDIR")) or "/tmp").resolve()
    return base if len(os.fsencode(base)) <= LONGEST_BASE else Path("/tmp").resolve()


def _ours() -> list[Path]:
    """All that this user's drivers marked, whether they live or not."""
    return [
        mark.parent
        for mark in sorted(_base().glob(f"{PREFIX}*/{MARK}"))
        if not mark.parent.is_symlink() and mark.parent.stat().st_uid == os.getuid()
    ]


def _taken_over() -> Iterator[tuple[Path, IO[str]]]:
    """Each folder whose driver no longer lives, with its mark, which we hold locked meanwhile."""
    for folder in _ours():
        if (mark := _seized(folder)) is not None:
            with mark:
                if _was_here(mark):
                    yield folder, mark


def _machine() -> dict[str, str]:
    """Its name, and which of its starts this is where the system tells."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def _was_here(mark: IO[str]) -> bool:
    """Whether its lock says anything: a shared folder may keep those of each machine to itself."""
    try:
        about = json.load(mark)
        return any(about.get(key) == value for key, value in _machine().items() if value)
    except (ValueError, AttributeError):
        return True  # it was killed before it could write
    finally:
        mark.seek(0)


def _seized(folder: Path) -> IO[str] | None:
    """The mark, locked by us, if nobody else holds it."""
    try:
        mark = (folder / MARK).open()
    except OSError:  # another one removed it
        return None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        mark.close()
        return None
    return mark


def _remove(folder: Path) -> set[int]:
    """End its processes, by force since nobody is left whom they could tell anything, and remove it; who was ended."""
    ended, deadline = set[int](), time.monotonic() + PATIENCE_S
    while (left := processes(folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended |= set(left)
        time.sleep(0.05)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink()  # last: until then another one can go on with it
    folder.rmdir()
    return ended
