"""What a run folder holds, read leniently: an unfinished or broken run still gets its report.

The files are other modules' output and, after a crash, may be cut short. Whatever cannot be read is
named in ``problems`` and left out, so that everything above this file works with typed values.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd_ray.errors import RunFolderError

__all__ = ["Round", "RunFolder", "Sample", "Samples", "mapping", "numbers", "tables"]


def mapping(data: object) -> dict[str, Any]:
    """The mapping that ``data`` is; an empty one where it is something else or missing."""
    return {str(key): value for key, value in data.items()} if isinstance(data, Mapping) else {}


def numbers(data: object) -> dict[str, float]:
    """The finite numbers of a mapping, by key."""
    return {
        key: float(value)
        for key, value in mapping(data).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def tables(data: object) -> dict[str, dict[str, float]]:
    """A mapping of mappings of numbers."""
    return {key: numbers(value) for key, value in mapping(data).items()}


def _measures(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A row's tables of tables with numbers, but for the roles' own; steps become their mean."""
    found = {key: tables(value) for key, value in row.items() if key != "roles"}
    return {
        key: {task: sum(steps.values()) / len(steps) for task, steps in by_task.items() if steps}
        for key, by_task in found.items()
        if any(by_task.values())
    }


@dataclass(frozen=True, slots=True)
class Round:
    """One row of metrics.jsonl."""

    index: int
    """0-based."""
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    roles: dict[str, dict[str, float]] = field(default_factory=dict)
    """By role: worker-seconds of each use of its time, and workers, queued, answers. Older rows have none."""
    store: dict[str, float] = field(default_factory=dict)
    """Bytes of Ray's object store: used, spilled."""
    loss: dict[str, float] = field(default_factory=dict)
    gap: dict[str, dict[str, float]] = field(default_factory=dict)
    forwards: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    """By reward: pictures that it could not score."""
    remarks: tuple[str, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    """The row's own numbers: grad_norm, lr, staleness."""
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    """What else the algorithm tells by task and step: name -> task -> mean over steps."""
    weight_version: str = ""

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Round":
        """Missing sections become empty."""
        return cls(
            index=int(row["round"]),
            seconds=numbers(row.get("seconds")),
            busy=numbers(row.get("busy")),
            roles=tables(row.get("roles")),
            store=numbers(row.get("store")),
            loss=numbers(row.get("loss")),
            gap=tables(row.get("gap")),
            forwards=numbers(row.get("forwards")),
            scores=numbers(row.get("scores")),
            evaluation=numbers(row.get("evaluation")),
            failed=numbers(row.get("failed")),
            remarks=tuple(map(str, row.get("remarks") or ())),
            values=numbers(row),
            measures=_measures(row),
            weight_version=str(row.get("weight_version", "")),
        )

    @property
    def task_loss(self) -> dict[str, float]:
        """The loss of each task, or the total where there are no tasks."""
        return {name: x for name, x in self.loss.items() if name != "total"} or self.loss


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and seed, drawn by every model."""

    task: str
    prompt: str
    seed: str
    images: dict[str, Path]
    """By model; files that lie outside the samples folder are left out."""


@dataclass(frozen=True, slots=True)
class Samples:
    """samples/index.json."""

    models: tuple[str, ...]
    rows: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run, as far as it can be read."""

    path: Path
    config_text: str
    config: dict[str, Any]
    facts: dict[str, Any]
    """run.json."""
    result: dict[str, Any]
    """Empty while the run is unfinished."""
    rounds: tuple[Round, ...]
    samples: Samples | None
    problems: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "RunFolder":
        """Read what is there.

        Raises:
            RunFolderError: there is no such folder.
        """
        if not path.is_dir():
            raise RunFolderError(f"{path}: no such run folder. Give the folder that `train` wrote, runs/<name>")
        problems: list[str] = []
        text = _text(path / "config.yaml", problems)
        return cls(
            path=path,
            config_text=text,
            config=_yaml(text, problems),
            facts=_json(path / "run.json", problems),
            result=_json(path / "result.json", problems),
            rounds=_rounds(path / "metrics.jsonl", problems),
            samples=_samples(path / "samples", problems),
            problems=tuple(problems),
        )

    @property
    def name(self) -> str:
        """The run's name, or its folder's where the configuration is unreadable."""
        return str(self.config.get("name", self.path.resolve().name))

    @property
    def total_rounds(self) -> int | None:
        """How many rounds were asked for."""
        total = self.config.get("rounds")
        return total if isinstance(total, int) else None

    @property
    def train_s(self) -> float | None:
        """Seconds in rounds. Not from time stamps: a resumed run may have rested for a week."""
        times = [row.seconds["round"] for row in self.rounds if "round" in row.seconds]
        return sum(times) if times else None

    @property
    def teacher_of_task(self) -> dict[str, str]:
        """Task -> teacher, from the result, or from the configuration while there is none."""
        teachers = self.result.get("teachers") or self.config.get("teachers")
        return {
            str(task): name
            for name, teacher in mapping(teachers).items()
            for task in (mapping(teacher).get("tasks") or (name,))
        }

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task with a loss or a score, in order of appearance: one colour each."""
        seen: dict[str, None] = dict.fromkeys(self.teacher_of_task)
        for row in self.rounds:
            seen.update(dict.fromkeys([*row.task_loss, *row.evaluation]))
        for scores in mapping(self.result.get("scores")).values():
            seen.update(dict.fromkeys(mapping(scores)))
        seen.pop("total", None)
        return tuple(seen)


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"{path.name} is not there")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__})")
    return ""


def _yaml(text: str, problems: list[str]) -> dict[str, Any]:
    try:
        return mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        problems.append("config.yaml is not YAML")
        return {}


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    try:
        return mapping(json.loads(text)) if text else {}
    except ValueError:
        problems.append(f"{path.name} is not JSON; it may have been cut short")
        return {}


def _rounds(path: Path, problems: list[str]) -> tuple[Round, ...]:
    rows: dict[int, Round] = {}
    broken = 0
    for line in _text(path, problems).splitlines():
        try:
            row = Round.read(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            broken += 1
        else:
            rows[row.index] = row  # a resumed run repeats the rounds after its checkpoint: the last counts
    if broken:
        problems.append(f"{path.name} has {broken} unreadable line{'s' * (broken > 1)}")
    return tuple(rows[index] for index in sorted(rows))


def _samples(folder: Path, problems: list[str]) -> Samples | None:
    if not folder.is_dir():
        problems.append("samples is not there")
        return None
    index = _json(folder / "index.json", problems)
    root = folder.resolve()
    rows = []
    for row in index.get("rows") or ():
        row = mapping(row)
        images = {model: (root / str(name)).resolve() for model, name in mapping(row.get("images")).items()}
        inside = {model: image for model, image in images.items() if image.is_relative_to(root)}
        rows.append(
            Sample(
                str(row.get("task", "")),
                str(row.get("prompt", "")),
                str(row.get("seed", "")),
                inside,
            )
        )
    models = tuple(str(model) for model in index.get("models") or ())
    return Samples(models, tuple(rows)) if models and rows else None
