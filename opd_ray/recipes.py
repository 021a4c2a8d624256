"""Recipes: a name or a YAML path, plus ``-o key=value`` overrides, become one ``Config``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from opd_ray.config import ClusterConfig, Config, Precision, PrecisionConfig, parse
from opd_ray.errors import ConfigError

__all__ = ["cluster_file", "find", "load", "override", "read", "recipes", "schema"]


def _places(kind: str) -> list[Path]:
    """Where recipes lie: the checkout's `configs`, or the copy inside an installed package."""
    package = Path(__file__).parent
    return [package.parent / kind, package / kind]


def recipes(kind: str = "configs") -> dict[str, Path]:
    """The recipes that `CONFIG` may name, by name."""
    for place in _places(kind):
        if place.is_dir():
            return {path.stem: path for path in sorted(place.glob("*.yaml"))}
    return {}


def find(name: str, kind: str = "configs") -> Path:
    """A recipe by path or by name."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if path.is_file():
            return path
        raise ConfigError(f"{name}: no such file")
    if path.is_dir() and len(path.parts) > 1:
        raise ConfigError(f"{name} is a folder; give the path of a YAML file")
    known = recipes(kind)
    if name not in known:
        what = "recipe" if kind == "configs" else "cluster file"
        raise ConfigError(f"no {what} {name!r}; known: {', '.join(known) or 'none'}. Or give the path of a YAML file")
    return known[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignment: str) -> None:
    """Set one key of plain data, for instance ``cluster.rollout.workers=2``.

    Raises:
        ConfigError: it is no assignment, or its key is below a value.
    """
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"-o {assignment}: expected key=value, for instance -o rounds=6")
    *parents, last = _parts(key)
    section = data
    for parent in parents:
        if section.get(parent) is None:  # not there, or switched off as `ema: null`
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"-o {assignment}: {parent} is a value, not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"-o {assignment}: {text!r} is not a YAML value") from None


def _parts(key: str) -> list[str]:
    """A key at its dots, but for those of a reward that is named as package.module:attr."""
    parts = key.split(".")
    colon = next((place for place, part in enumerate(parts) if ":" in part), None)
    if colon is None or "rewards" not in parts[:colon]:
        return parts
    first = parts.index("rewards") + 1
    return [*parts[:first], ".".join(parts[first : colon + 1]), *parts[colon + 1 :]]


def read(path: Path) -> Config:
    """A configuration as a run wrote it down, with its cluster inside.

    Raises:
        ConfigError: it cannot be read, or is not one.
    """
    return parse(_read(path), str(path))


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a recipe name or YAML path stands for.

    Raises:
        ConfigError: in one line, where it is wrong, what was seen and what is allowed.
    """
    path = find(name)
    data = _read(path)
    data.setdefault("name", path.stem)
    cluster = data.get("cluster", "local")
    for assignment in [a for a in overrides if a.startswith("cluster=")]:
        cluster = assignment.partition("=")[2]
    if isinstance(cluster, str):
        data["cluster"] = cluster_file(cluster, path.parent)
    for assignment in overrides:
        if not assignment.startswith("cluster="):
            override(data, assignment)
    return parse(data, str(path))


def cluster_file(name: str, folder: Path = Path()) -> dict[str, Any]:
    """What a cluster file says: one of ``configs/cluster`` by its name, or a path, as seen from a folder or from here.

    Raises:
        ConfigError: there is none, or it is not YAML.
    """
    beside = folder / name
    return _read(beside if beside.is_file() else find(name, "configs/cluster"))


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file: a ``Config`` that may leave its name to the file and name a cluster file."""
    found = Config.model_json_schema()
    found["required"].remove("name")
    found["properties"]["cluster"] = {
        "anyOf": [{"$ref": f"#/$defs/{ClusterConfig.__name__}"}, {"type": "string"}],
        "default": "local",
        "description": f"{ClusterConfig.__doc__} Or the name or path of a file that says it.",
    }
    found["properties"]["precision"] = {
        "anyOf": [{"enum": list(get_args(Precision))}, {"$ref": f"#/$defs/{PrecisionConfig.__name__}"}],
        "default": "auto",
        "description": f"{PrecisionConfig.__doc__} One word for all roles, or a section.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found
