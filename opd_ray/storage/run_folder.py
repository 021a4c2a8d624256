"""The run folder: whose it is, which attempt is the newest, and files that are whole or absent."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from opd_ray.errors import DiskFullError, RunFolderError

__all__ = [
    "FULL",
    "STAGES",
    "abandon",
    "claim",
    "differences",
    "locked",
    "newest_attempt",
    "overwrite_json",
    "read_json",
    "stopping_when_full",
    "sync",
    "write_atomic",
    "write_json_atomic",
]

STAGES = "stages.json"
"""In the folder of a job of several runs: the names of their folders, in order, and in the end what they took."""
LOCK_TIMEOUT_S = 30.0
FULL = {errno.ENOSPC, errno.EDQUOT}
"""What the system says where there is no room, or none for this user."""


def claim(run_dir: Path, identity: Mapping[str, Any], *, resume: bool = False, may_differ: Sequence[str] = ()) -> int:
    """Take a run folder for this run, creating it where there is none, and number the attempt.

    ``run.json`` gets ``attempt``, ``identity`` and ``identity_sha256``; other keys in it are kept.

    Args:
        run_dir: the folder, new or empty or a run's.
        identity: plain JSON data in which a continued run must not differ, for instance its method.
        resume: go on with the run that is there; without one, start at attempt 0.
        may_differ: keys of ``identity`` that may be others than the run's.

    Returns:
        0 for the first attempt, one more each time the run is started again.

    Raises:
        RunFolderError: the folder holds a run and ``resume`` is false, the run there has another
            identity, the folder is no run's, or it cannot be written.
    """
    path = run_dir / "run.json"
    plain = dict(identity)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{run_dir}: cannot be made ({error.strerror})") from None
    with locked(run_dir):
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in run_dir.iterdir()):
                raise RunFolderError(f"{run_dir} is not empty and has no run.json; choose another name")
            run: dict[str, Any] = {"attempt": 0}
        elif (run := _run(path)).get("abandoned"):
            run = {"attempt": 0}
        elif not resume:
            raise RunFolderError(f"{run_dir} has a run already; go on with it by --resume or choose another name")
        else:
            run["attempt"] += 1
            before, now = ({k: v for k, v in side.items() if k not in may_differ} for side in (run["identity"], plain))
            if other := differences(before, now):
                raise RunFolderError(
                    f"{run_dir} belongs to another run: {'; '.join(other)}. Choose another name, start it as it was, "
                    "or add --force where the weights still fit"
                )
        run |= {"identity": plain, "identity_sha256": _sha256(plain)}
        write_json_atomic(path, run)
    return int(run["attempt"])


def abandon(run_dir: Path) -> None:
    """Take back a first claim that came to nothing: the next one may be another run's, and logs stay until then."""
    path = run_dir / "run.json"
    with locked(run_dir):
        run = _run(path)
        if run["attempt"] == 0:  # a later attempt has something to lose
            write_json_atomic(path, run | {"abandoned": True})


def newest_attempt(run_dir: Path) -> int:
    """The number of the attempt that claimed the folder last.

    Raises:
        RunFolderError: the folder was never claimed, or its run.json is broken.
    """
    return int(_run(run_dir / "run.json")["attempt"])


@contextlib.contextmanager
def locked(run_dir: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of if this process dies.

    Raises:
        RunFolderError: another process holds it for longer than ``timeout_s`` seconds, or the
            folder cannot be written.
    """
    deadline = time.monotonic() + timeout_s
    try:
        file = (run_dir / ".lock").open("ab")
    except OSError as error:
        raise RunFolderError(f"{run_dir}: cannot be written ({error.strerror})") from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunFolderError(
                        f"{run_dir} is locked by another process for more than {timeout_s:g} s; stop the other one"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                raise RunFolderError(
                    f"{run_dir}: file system without locks ({error.strerror}); put it elsewhere"
                ) from None
        yield


def write_json_atomic(path: Path, data: Any) -> None:
    """Write JSON such that a reader, also after a crash, finds either the old file or the new one.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
        TypeError: not plain JSON data.
        OSError: the file cannot be written.
    """
    write_atomic(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def write_atomic(path: Path, content: bytes) -> None:
    """As ``write_json_atomic``, for any content.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # a write that fails does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def overwrite_json(path: Path, data: Any) -> None:
    """Write JSON over what is there, in the room that it has: for the last word of a run whose disk is full.

    Raises:
        OSError: the file is not there, or needs more room than there is; then it is as it was.
    """
    with path.open("r+b", buffering=0) as file:
        before = file.read()
        try:
            _rewrite(file, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            _rewrite(file, before)  # it has room for this
            raise OSError(error.errno, error.strerror, str(path)) from None


def _rewrite(file: FileIO, content: bytes) -> None:
    file.seek(0)
    if file.write(content) < len(content):  # the rest found no room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file.truncate()


@contextlib.contextmanager
def stopping_when_full(folder: Path) -> Iterator[None]:
    """A full disk stops what is done here, resumably.

    Raises:
        DiskFullError: there was no room for a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"{error.filename or folder}: cannot be written ({os.strerror(error.errno)}); the last good checkpoint "
            "stays. Free some room, then go on with --resume"
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunFolderError: it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from None


def sync(folder: Path) -> None:
    """Make a folder's own entries durable: a rename without it may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(path: Path) -> dict[str, Any]:
    run = read_json(path)
    match run:
        case {"attempt": int(), "identity": dict()}:
            return dict(run)
    raise RunFolderError(f"{path}: is not a run's (no attempt or identity); choose another name")


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The first differing keys, dotted, with both values."""
    before, now = _flat(old), _flat(new)
    keys = [key for key in {**before, **now} if before.get(key, "absent") != now.get(key, "absent")]
    shown = [f"{k} was {before.get(k, 'absent')}, now {now.get(k, 'absent')}" for k in keys[:5]]
    return [*shown, f"and {len(keys) - 5} more"] if len(keys) > 5 else shown


def _flat(data: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(data, Mapping) or (prefix and not data):
        return {prefix: json.dumps(data, sort_keys=True)}
    return {
        key: value
        for name, part in data.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }
