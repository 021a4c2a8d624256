"""Recipes: a name or a YAML path, plus ``-o key=value`` overrides, become one ``Config``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from opd_ray.config import ClusterConfig, Config, Precision, PrecisionConfig, parse
from opd_ray.errors import ConfigError

__all__ = [
    "assignments",
    "cluster_file",
    "find",
    "load",
    "override",
    "read",
    "recipes",
    "schema",
    "specialist",
    "yaml_of",
]


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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    data = yaml_of(text, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def yaml_of(text: str, path: Path) -> Any:
    """The data of a file's text.

    Raises:
        ConfigError: the file, and where in it the text is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        told = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ConfigError(f"{path}: not YAML: {told}") from None


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Dotted keys and their values, plain data, as ``load`` and `-o` take them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def override(data: dict[str, Any], assignment: str) -> None:
    """Set one key of plain data, for instance ``cluster.rollout.workers=2``.

    Raises:
        ConfigError: it is no assignment, or its key is below a value.
    """
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"-o {assignment}: expected key=value, for instance -o rounds=6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"-o {assignment}: {text!r} is not a YAML value") from None
    _assign(data, key, value, f"-o {assignment}")


def _assign(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one key, dotted, of plain data; ``where`` names it in errors."""
    *parents, last = _parts(key)
    section = data
    for parent in parents:
        if section.get(parent) is None:  # not there, or switched off as `ema: null`
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {parent} is a value, not a section")
    section[last] = value


def _parts(key: str) -> list[str]:
    """A key at its dots, but for those of a reward that is named as package.module:attr, and of a specialist's own."""
    parts = key.split(".")
    if parts[0] == "specialists" and len(parts) > 4:  # specialists.<name>.set.<a key of its recipe>
        return [*parts[:3], ".".join(parts[3:])]
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
    for chosen in _specialists(data):
        beside = path.parent / chosen["recipe"]
        chosen["recipe"] = str(beside) if beside.is_file() else chosen["recipe"]
    config = parse(data, str(path))
    for name in config.specialists:
        specialist(config, name)  # it is refused now or never
    return config


def _specialists(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of plain data that name a recipe; what is malformed is refused later, by name."""
    found = data.get("specialists")
    entries = found.values() if isinstance(found, dict) else ()
    return [one for one in entries if isinstance(one, dict) and isinstance(one.get("recipe"), str)]


def specialist(job: Config, name: str) -> Config:
    """The run that trains one of a job's specialists: its recipe with the job's seed and cluster, and what `set` says.

    Raises:
        ConfigError: the recipe is not there, cannot run so, or leaves no LoRA for the job's student.
    """
    chosen = job.specialists[name]
    where = f"specialists.{name}"
    try:
        path = find(chosen.recipe)
    except ConfigError as error:
        raise ConfigError(f"{where}.recipe: {error}") from None
    data = _read(path) | {"name": name, "seed": job.seed, "cluster": None}
    for key, value in chosen.set.items():
        if not key.startswith("cluster."):
            _assign(data, key, value, f"{where}.set.{key}")
    cluster = job.cluster.model_dump(mode="json")
    for kind in ("teachers", "rewards"):  # entries for those that it does not have are others'
        cluster[kind] = {k: v for k, v in cluster[kind].items() if k in {"default", *(data.get(kind) or {})}}
    data["cluster"] = cluster
    for key, value in chosen.set.items():
        if key.startswith("cluster."):
            _assign(data, key, value, f"{where}.set.{key}")
    config = parse(data, f"{where} ({chosen.recipe})")
    _check_specialist(job, config, where)
    return config


def _check_specialist(job: Config, config: Config, where: str) -> None:
    if config.specialists:
        raise ConfigError(f"{where}: its recipe has specialists of its own; there is one stage before the distillation")
    if config.student.lora is None:
        raise ConfigError(
            f"{where}: student.lora null trains the denoiser itself, and a teacher is a LoRA; give it one"
        )
    for key in ("family", "path", "revision", "subfolder"):
        own, asked = getattr(config.model, key), getattr(job.model, key)
        if own != asked:
            raise ConfigError(
                f"{where}: model.{key} is {own}, and the student's {asked}; its LoRA has to be over the student's base"
            )


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
