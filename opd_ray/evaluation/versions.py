"""The identity of files that take part in an evaluation."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ray.errors import ConfigError
from opd_ray.models.base import resolve
from opd_ray.plugins import load
from opd_ray.rewards.base import REWARDS

__all__ = ["fingerprint", "of_rewards"]

END = 2**20
"""Bytes at each end of a file that its identity is made of: whole checkpoints would take minutes."""


def fingerprint(path: Path) -> str:
    """sha256 of names and sizes of a file, or of all files below a folder, and of the first and last MiB of each."""
    total = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.relative_to(path)}\n{size}\n".encode())
        with file.open("rb") as opened:
            total.update(opened.read(END))
            opened.seek(max(size - END, 0))
            total.update(opened.read(END))
    return total.hexdigest()


def of_rewards(rewards: Mapping[str, Mapping[str, Any]], elsewhere: Sequence[str] = ()) -> dict[str, Any]:
    """Reward -> its arguments, where its code is, and the identity of that code and of the files among its arguments.

    Args:
        rewards: as in a configuration.
        elsewhere: those whose packages this process need not have.
    """
    return {name: _reward(name, args, name in elsewhere) for name, args in rewards.items()}


def _reward(name: str, args: Mapping[str, Any], elsewhere: bool) -> dict[str, Any]:
    paths = {value: Path(resolve(value)) for value in args.values() if isinstance(value, str)}
    found: dict[str, Any] = {
        "code": REWARDS.get(name, name),
        "arguments": dict(args),
        "files": {value: fingerprint(path) for value, path in paths.items() if path.exists()},
    }
    try:
        source = None if elsewhere else inspect.getsourcefile(load(name, REWARDS, "reward"))
    except (ConfigError, TypeError):  # it cannot be imported here, or is an object of no file
        source = None
    return found | ({"code_sha256": fingerprint(Path(source))} if source else {})
