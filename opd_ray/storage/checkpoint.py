"""Checkpoints of a run that no crash can break: tmp folder, fsync, manifest, rename.

``checkpoints/step-000010/`` holds a safetensors file for each group of tensors, ``state.json`` and,
written last, ``manifest.json`` with every file's size and sha256. Names and plain data only, so any
learner backend can read what another wrote, and nothing executes on load.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from opd_ray.errors import DiskFullError, RunFolderError
from opd_ray.storage import run_folder

__all__ = ["Checkpoint", "commit", "deserialise", "newest", "save", "serialise"]

FORMAT = 1
FOLDER = "checkpoints"
STEP = re.compile(r"(\.replaced-)?step-(\d{6,})")
TEMPORARY = re.compile(r"\.tmp-(\d+)-.*")
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on after ``round`` finished rounds."""

    round: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By group (student, ema, optimizer, ...), then by name."""
    state: dict[str, Any] = field(default_factory=dict)
    """Plain JSON data: finite numbers, text keys, lists rather than tuples."""


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def save(run_dir: Path, checkpoint: Checkpoint, *, attempt: int, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``: see ``commit``."""
    return commit(run_dir, checkpoint.round, serialise(checkpoint), attempt=attempt, keep=keep)


def commit(run_dir: Path, round: int, contents: Mapping[str, bytes], *, attempt: int, keep: int) -> Path:
    """Write what ``serialise`` gave of a checkpoint, then remove all but the newest ``keep``.

    Whatever happens on the way, earlier checkpoints stay as they are. One of the same round is
    replaced.

    Args:
        run_dir: a folder that ``run_folder.claim`` took.
        round: of the checkpoint.
        contents: by file name, the manifest last.
        attempt: the number that ``claim`` returned.
        keep: how many checkpoints stay, at least 1.

    Raises:
        RunFolderError: a newer attempt has claimed the folder, or it cannot be written.
        DiskFullError: there is no room for it.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1")
    _refuse_older(run_dir, attempt)
    folder = run_dir / FOLDER
    target = folder / f"step-{round:06d}"
    temporary = folder / f".tmp-{attempt}-{target.name}"
    try:
        folder.mkdir(exist_ok=True)
        _remove_temporary(folder, attempt)
        temporary.mkdir()
        for name, content in contents.items():
            _write(temporary / name, content)
        run_folder.sync(temporary)
        # Under the lock no newer attempt can start between the check and the rename.
        with run_folder.locked(run_dir):
            _refuse_older(run_dir, attempt)
            _commit(temporary, target)
        _prune(folder, keep)
    except OSError as error:
        _refuse_older(run_dir, attempt)  # a newer attempt removes our temporary folder: say that
        if error.errno in run_folder.FULL:
            shutil.rmtree(temporary, ignore_errors=True)  # the run's last words need room too
            raise DiskFullError(_no_room(target, sum(map(len, contents.values())), error)) from None
        raise RunFolderError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _no_room(target: Path, needed: int, error: OSError) -> str:
    free = shutil.disk_usage(target.parent.parent).free
    return (
        f"{target}: cannot be written ({error.strerror}): {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; the "
        "last good checkpoint stays. Free some room, then go on with --resume"
    )


def newest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written.

    Returns:
        The checkpoint, None where no usable one exists, and a line for each damaged one that was
        skipped: which, and why.

    Raises:
        RunFolderError: the newest one is of a format that only a later release reads.
    """
    skipped: list[str] = []
    for number, folder in _steps(run_dir / FOLDER):
        try:
            return _load(folder, number), skipped
        except _DamagedError as error:
            skipped.append(f"{FOLDER}/{folder.name} is damaged and was skipped: {error}")
    return None, skipped


def serialise(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File contents by name, the manifest last.

    Raises:
        ValueError: a group's name is no file name, or ``state`` is not plain JSON data.
    """
    contents = {}
    names = {}
    for group, tensors in checkpoint.tensors.items():
        if not GROUP.fullmatch(group):
            raise ValueError(f"group {group!r} is no file name; expected {GROUP.pattern}")
        # Clones: safetensors refuses tensors that share memory or have strides.
        plain = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        contents[f"{group}.safetensors"] = safetensors.torch.save(plain)
        names[group] = list(plain)
    contents["state.json"] = _state(checkpoint.state)
    manifest = {
        "format": FORMAT,
        "round": checkpoint.round,
        "groups": names,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }
    contents["manifest.json"] = json.dumps(manifest, indent=1).encode()
    return contents


def deserialise(contents: Mapping[str, bytes]) -> Checkpoint:
    """The inverse of ``serialise``, for contents that are known to be whole."""
    manifest = json.loads(contents["manifest.json"])
    tensors = {}
    for group, names in manifest["groups"].items():
        loaded = safetensors.torch.load(contents[f"{group}.safetensors"])
        tensors[group] = {name: loaded[name] for name in names}  # in the order of saving
    return Checkpoint(manifest["round"], tensors, json.loads(contents["state.json"]))


def _state(state: dict[str, Any]) -> bytes:
    content = json.dumps(state, indent=1, allow_nan=False).encode()
    # JSON turns tuples into lists and number keys into text without a word.
    if change := _change(state, json.loads(content), "state"):
        raise ValueError(f"{change} does not survive JSON; use lists, text keys and plain numbers")
    return content


def _change(before: Any, after: Any, where: str) -> str | None:
    """The path of the first value that is not what it was."""
    if isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after):
        changes = (_change(before[key], after[key], f"{where}.{key}") for key in before)
        return next((change for change in changes if change), None)
    return None if before == after else where


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _commit(temporary: Path, target: Path) -> None:
    """Rename into place. ``newest`` finds the replaced one if a crash falls between the renames."""
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    temporary.rename(target)
    run_folder.sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _refuse_older(run_dir: Path, attempt: int) -> None:
    latest = run_folder.newest_attempt(run_dir)
    if latest > attempt:
        raise RunFolderError(
            f"{run_dir}: attempt {latest} has taken over; attempt {attempt} must not write "
            "checkpoints any more. Stop it"
        )


def _remove_temporary(folder: Path, attempt: int) -> None:
    """Remove what crashed writers left, but nothing of a newer attempt."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and int(match[1]) <= attempt:
            shutil.rmtree(path)


def _prune(folder: Path, keep: int) -> None:
    """Damaged ones do not count, and newer damaged ones stay for whoever looks into it."""
    intact = 0
    for number, path in _steps(folder):
        if intact >= keep:
            shutil.rmtree(path)
            continue
        try:
            _manifest(path, number)
        except (_DamagedError, RunFolderError):  # broken, or of a later release
            continue
        intact += 1


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Round and path of every checkpoint, newest first."""
    if not folder.is_dir():
        return []
    matches = [(STEP.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(match[2]), not match[1], path) for match, path in matches if match]
    return [(number, path) for number, _, path in sorted(found, reverse=True)]


def _manifest(folder: Path, number: int) -> dict[str, Any]:
    """The manifest, after a look at every file's size but not at its content."""
    path = folder / "manifest.json"
    if not path.exists():
        raise _DamagedError("manifest.json is missing")
    try:
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:
            raise RunFolderError(
                f"{folder} is of format {manifest['format']}, and this opd-ray reads up to format {FORMAT}; go on with "
                "the opd-ray that wrote it, or move this checkpoint away to go on from the one before"
            )
        if manifest["format"] != FORMAT or manifest["round"] != number:
            raise _DamagedError(f"manifest.json is not of format {FORMAT} and round {number}")
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise _DamagedError(f"{name} has {size} of {expected['bytes']} bytes")
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _DamagedError(f"manifest.json cannot be read ({error})") from None
    return dict(manifest)


def _load(folder: Path, number: int) -> Checkpoint:
    manifest = _manifest(folder, number)
    try:
        contents = {name: _read(folder, name, manifest) for name in manifest["files"]}
        return deserialise(contents | {"manifest.json": json.dumps(manifest).encode()})
    except OSError as error:
        raise _DamagedError(f"cannot be read ({error.strerror})") from None
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:
        raise _DamagedError(f"manifest.json does not fit the files ({error!r})") from None


def _read(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Read once and hash that: what was checked is what is loaded."""
    content = (folder / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
        raise _DamagedError(f"{name} was changed (its sha256 differs)")
    return content
