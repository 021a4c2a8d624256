"""The run folder as the control channel: requests in ``control/<id>.json``, each answer beside its own.

It needs no Ray, no token and no open port: whoever can write the folder, on whatever machine, can ask. The driver looks
once a second. It takes a request by renaming it and whoever asked withdraws it by removing it, so exactly one of the
two succeeds, and nothing is carried out that was withdrawn.
"""

import contextlib
import json
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.errors import RunFolderError, UserError
from opd_ray.storage.run_folder import newest_attempt, read_json, write_json_atomic

__all__ = ["HEARTBEAT_S", "Answer", "Request", "answer", "ask", "heartbeat", "pending", "serve"]

HEARTBEAT_S = 60.0
"""A driver that works writes its heartbeat far more often."""
EXPIRES_S = 600.0
"""Whoever asked has long given up; clocks of machines may differ by minutes."""
KEPT = 20
"""Answers that stay, for whoever wants to look back."""
READ_S = 60.0
"""So long an answer surely stays, for whoever waits for it."""
LARGEST = 65536
"""Bytes of a request that is looked at."""
POLL_S = 0.2
GRACE_S = 10.0
"""How long a driver may work on a request that it has taken."""

FOLDER, TAKEN, ANSWER, BROKEN = "control", ".taken.json", ".answer.json", ".broken"


@dataclass(frozen=True, slots=True)
class Request:
    """Wanted numbers of workers by role or teacher."""

    id: str
    targets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the driver did, or why it refused."""

    ok: bool
    text: str


def heartbeat(run_dir: Path) -> dict[str, Any]:
    """What ``status.json`` says, of the newest attempt.

    Raises:
        RunFolderError: the folder is no run's, or its newest attempt has not begun to train.
    """
    if not (run_dir / "run.json").is_file():
        raise RunFolderError(f"{run_dir}: not a run folder (no run.json); run folders are runs/<name>")
    path, attempt = run_dir / "status.json", newest_attempt(run_dir)
    beat: Any = read_json(path) if path.is_file() else None
    match beat:
        case {"status": str(), "time": int() | float(), "attempt": int(number)} if number == attempt:
            return {**beat}
    raise RunFolderError(f"{run_dir}: attempt {attempt} has no heartbeat yet; its workers start, or it could not start")


def ask(run_dir: Path, targets: Mapping[str, int], timeout_s: float = 30.0) -> Answer:
    """Ask the driver of a run for other numbers of workers, and wait for its answer.

    Raises:
        RunFolderError: there is no run that could answer, the folder cannot be written, or no answer came within
            ``timeout_s`` seconds and the request was withdrawn.
    """
    beat = heartbeat(run_dir)
    if beat["status"] != "running":
        raise RunFolderError(f"{run_dir}: the run is not under way ({beat['status']}), so it has no workers to scale")
    # Its name sorts by time; what comes after that keeps two of the same moment apart.
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    path, answered = _places(run_dir, name)
    try:
        path.parent.mkdir(exist_ok=True)
        write_json_atomic(path, {"targets": dict(targets), "attempt": beat["attempt"], "time": time.time()})
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be written ({error.strerror})") from None
    try:
        found = _wait(answered, timeout_s)
    finally:
        withdrawn = _withdraw(path)
    if found is None and not withdrawn:
        found = _wait(answered, GRACE_S)
    if found is None:
        with contextlib.suppress(RunFolderError):
            beat = heartbeat(run_dir)
        outcome = "the request was withdrawn" if withdrawn else "it has taken the request, so look at its status"
        raise RunFolderError(
            f"{run_dir}: no answer in {timeout_s:g} s; {outcome}. The driver's last heartbeat is "
            f"{max(time.time() - beat['time'], 0):.0f} s old"
        )
    return found


def serve(run_dir: Path, act: Callable[[Mapping[str, int]], str]) -> list[str]:
    """Carry out what is asked of this run, for the driver, once a second; returns lines for its log.

    Args:
        run_dir: the run's folder.
        act: does all of a request, or raises ``UserError`` and does nothing of it; returns what it did.
    """
    lines = []
    for request in pending(run_dir):
        wanted = " ".join(f"{name}={number}" for name, number in request.targets.items())
        try:
            text = act(request.targets)
        except UserError as error:
            answer(run_dir, request, False, str(error))
            lines.append(f"scale {wanted} was refused: {error}")
        else:
            answer(run_dir, request, True, text)
            lines.extend(f"scaled: {line}" for line in text.splitlines())
    return lines


def pending(run_dir: Path) -> list[Request]:
    """Take the requests that wait, oldest first. What is too old or broken is answered at once and left out."""
    folder = run_dir / FOLDER
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except OSError:
        return []  # nobody has asked yet; and a folder that fails for a moment ends no run
    requests = []
    for path in found:
        if path.name.endswith(ANSWER):
            continue
        name = path.name.removesuffix(TAKEN).removesuffix(".json")
        taken = folder / f"{name}{TAKEN}"
        try:
            path.replace(taken)
        except OSError:
            continue  # withdrawn at this moment
        request, fault = _read(taken, name, newest_attempt(run_dir))
        if request is not None:
            requests.append(request)
            continue
        if fault.startswith("broken"):
            with contextlib.suppress(OSError):
                taken.replace(folder / f"{name}{BROKEN}")
        answer(run_dir, Request(name, {}), False, fault)
    return requests


def answer(run_dir: Path, request: Request, ok: bool, text: str) -> None:
    """Tell whoever asked. A folder that cannot be written ends no run: they give up after a while."""
    path, answered = _places(run_dir, request.id)
    with contextlib.suppress(OSError):
        about = {"targets": dict(request.targets), "ok": ok, "text": text, "time": time.time()}
        write_json_atomic(answered, about)
        path.with_name(f"{request.id}{TAKEN}").unlink(missing_ok=True)
        _prune(path.parent)


def _read(path: Path, name: str, attempt: int) -> tuple[Request | None, str]:
    """A request, or what is wrong with it."""
    try:
        about = path.lstat()  # a pipe would be waited for
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            return None, f"broken: no file of at most {LARGEST} bytes"
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return None, f"broken: cannot be read ({error})"
    match data:
        case {"targets": dict(targets), "attempt": int(asked), "time": int() | float() as then} if all(
            type(number) is int for number in targets.values()
        ):
            age = time.time() - then
            if asked != attempt:
                return None, f"expired: it was for attempt {asked}, and this is attempt {attempt}; ask again"
            if age > EXPIRES_S:
                return None, f"expired: it was {age:.0f} s old when it was read, unless clocks differ; ask again"
            return Request(name, targets), ""
    return None, "broken: expected targets (a whole number by name), attempt and time"


def _places(run_dir: Path, name: str) -> tuple[Path, Path]:
    folder = run_dir / FOLDER
    return folder / f"{name}.json", folder / f"{name}{ANSWER}"


def _wait(path: Path, timeout_s: float) -> Answer | None:
    deadline = time.monotonic() + timeout_s
    while True:
        if path.is_file():
            data = read_json(path)
            return Answer(bool(data["ok"]), str(data["text"]))
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_S)


def _withdraw(path: Path) -> bool:
    """Whether it was still there to be withdrawn."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _prune(folder: Path) -> None:
    """Remove all but the newest answers and broken files."""
    for ending in (ANSWER, BROKEN):
        for path in sorted(folder.glob(f"*{ending}"))[:-KEPT]:
            if time.time() - path.stat().st_mtime > READ_S:
                path.unlink(missing_ok=True)
