"""The identity of files that take part in an evaluation."""

import ast
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def of_rewards(rewards: Mapping[str, Mapping[str, Any]], environments: Mapping[str, Any]) -> dict[str, Any]:
    """Reward -> its arguments, where its code is, and the identity of that code and of the files among its arguments.

    Args:
        rewards: as in a configuration.
        environments: Ray's ``runtime_env`` of each; where it is not empty, this process need not have its packages.
    """
    return {name: _reward(name, args, environments.get(name) or {}) for name, args in rewards.items()}


def _reward(name: str, args: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    paths = {value: Path(resolve(value)) for value in args.values() if isinstance(value, str)}
    found: dict[str, Any] = {
        "code": REWARDS.get(name, name),
        "arguments": dict(args),
        "files": {value: fingerprint(path) for value, path in paths.items() if path.exists()},
    }
    if environment:  # it may hold keys, and a summary is shown to others
        told = json.dumps(environment, sort_keys=True, default=str)
        return found | {"runtime_env_sha256": hashlib.sha256(told.encode()).hexdigest()}
    reward = load(name, REWARDS, "reward")
    try:
        files = _code(Path(inspect.getsourcefile(reward) or ""), reward.__module__)
    except (TypeError, AttributeError, OSError):  # an object of no file
        return found
    told = "".join(f"{file.name} {fingerprint(file)}\n" for file in files)
    return found | {"code_sha256": hashlib.sha256(told.encode()).hexdigest()}


def _code(file: Path, module: str) -> list[Path]:
    """A module's file, and those of its package that it imports, directly or through one another."""
    package, found, left = module.rpartition(".")[0], dict[Path, None](), [file]
    while left:
        one = left.pop()
        found[one] = None
        for node in ast.walk(ast.parse(one.read_bytes())):
            beside = {one.with_name(f"{name}.py") for name in _imported(node, package)}
            left += sorted(path for path in beside if path not in found and path.is_file())
    return sorted(found)


def _imported(node: ast.AST, package: str) -> list[str]:
    """The modules of the package itself that a statement may import, by their last name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level <= 1:
        parts = ([package] if node.level and package else []) + ([node.module] if node.module else [])
        start = ".".join(parts)
        names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
    else:
        names = []
    return [last for parent, _, last in (name.rpartition(".") for name in names) if parent == package]
