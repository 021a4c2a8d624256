"""``opd-ray evaluate MODEL...``: the same prompts and first noises for every model, scored with intervals."""

import json as json_module
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from opd_ray.commands.options import Json, Seed, Threads, require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.report.wording import MISSING, Write, alike, span

if TYPE_CHECKING:
    from opd_ray.evaluation.models import Found
    from opd_ray.models import Family
    from opd_ray.rewards import Reward
    from opd_ray.types import Prompt

__all__ = ["evaluate"]

PIXELS = 32
"""Height and width of the tiny world's pictures."""
TASKS = {"compose": ("compose",), "text": ("text",), "look": ("look",), "mixed": ("compose", "text", "look")}
"""The tiny world's held-out prompt sets and the scorers that apply to each."""


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Diffusers folders, hub ids, run folders, `world` or `world/<name>`.")
    ],
    images: Annotated[int, typer.Option(min=1, help="Held-out prompts of each task.")] = 256,
    steps: Annotated[
        str | None,
        typer.Option(help="Denoising steps, or several as in 1,2,4,8; a run's and the world's own, else 10."),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=G for one model, or G for all; a run's and the world's own, else 4.5."),
    ] = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a forward.")] = 64,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Score models on the tiny world's held-out prompts: mean and 95 % bootstrap interval."""
    import torch

    from opd_ray.evaluation.compare import held_out
    from opd_ray.evaluation.models import find_model
    from opd_ray.evaluation.statistics import mean
    from opd_ray.prompts import read_prompts
    from opd_ray.rewards import make_rewards
    from opd_ray.world import prompts_path

    scales, counts = _scales(models, guidance or []), _counts(steps)
    _require_file(out)
    found = [find_model(name) for name in models]  # all of them before the first one costs minutes
    for name, model in zip(models, found, strict=True):
        _require_fit(name, model, counts)
    files = {task: str(prompts_path(task, "heldout")) for task in TASKS}
    prompts = held_out(read_prompts(files, "the tiny world"), images, seed)
    torch.set_num_threads(threads)
    rewards = make_rewards({name: {} for name in ("compose", "text", "look")})
    result: dict[str, Any] = {"seed": seed, "images_per_task": images, "models": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=json, transient=True) as progress:
        total = len(models) * max(len(counts), 1) * sum(len(rows) for rows in prompts.values())
        bar = progress.add_task("drawing and scoring", total=total)
        for name, model in zip(models, found, strict=True):
            scale = scales.get(name, model.guidance if model.guidance is not None else 4.5)
            if not (json or errors.is_terminal):
                errors.print(f"drawing and scoring {name}", soft_wrap=True)
            family = model.load()
            for chosen in counts or [model.steps or 10]:
                how = (scale, chosen, seed, batch)
                scores = _score(family, prompts, rewards, how, lambda done: progress.advance(bar, done))
                means = {key: mean(values) for key, values in scores.items()}
                label = name if len(counts) < 2 else f"{name}, {chosen} step{'s' * (chosen > 1)}"
                result["models"][label] = {"guidance": scale, "steps": chosen, "scores": means}
    if json:
        console.print_json(data=result)
    else:
        _tell(result)
    if out is not None:
        out.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")


def _tell(result: Mapping[str, Any]) -> None:
    console.print(_table(result))
    for name, model in result["models"].items():
        console.print(f"{name}: guidance {model['guidance']:g}, {model['steps']} steps", soft_wrap=True)
    console.print(f"The same held-out prompts and first noises for all, seed {result['seed']}.")


def _counts(steps: str | None) -> list[int]:
    """The numbers of steps that were asked for; none where every model has its own."""
    found = [part.strip() for part in (steps or "").split(",") if part.strip()]
    if wrong := [part for part in found if not part.isdecimal() or not 1 <= int(part) <= 1000]:
        raise ConfigError(f"--steps {steps}: {wrong[0]!r} is no number from 1 to 1000; for instance 10, or 1,2,4,8")
    return list(dict.fromkeys(map(int, found)))


def _require_fit(name: str, found: "Found", counts: Sequence[int]) -> None:
    """The tiny world's size, and numbers of steps that it knows."""
    from opd_ray.models.base import family_class

    for steps in counts or [found.steps or 10]:
        found.known_steps(steps)
    shape = family_class(found.model.family).shape(found.model)
    if shape is not None and shape.pixels != PIXELS:
        raise ConfigError(
            f"{name} draws {shape.pixels} pixels; evaluate scores the tiny world's {PIXELS}. For your own prompts give "
            "the recipe prompts.eval, rewards and evaluation: `train --resume` scores a finished run"
        )


def _require_file(out: Path | None) -> None:
    if out is None:
        return
    if out.is_dir():
        raise RunFolderError(f"--out: {out} is a folder; name a JSON file, for instance {out / 'scores.json'}")
    require_folder(out.parent)


def _scales(models: Sequence[str], given: Sequence[str]) -> dict[str, float]:
    """Guidance by model; what is said of one model goes before what is said of all."""
    everywhere, own = dict[str, float](), dict[str, float]()
    for text in given:
        name, _, value = text.rpartition("=")
        if name and name not in models:
            raise ConfigError(f"--guidance {text}: {name} is not among the models {', '.join(models)}")
        try:
            scale = float(value)
        except ValueError:
            scale = math.nan
        if not 0 <= scale < math.inf:
            raise ConfigError(f"--guidance {text}: expected a number from 0 on, or MODEL=number")
        if name:
            own[name] = scale
        else:
            everywhere = dict.fromkeys(models, scale)
    return everywhere | own


def _score(
    family: "Family",
    prompts: Mapping[str, Sequence["Prompt"]],
    rewards: Mapping[str, "Reward"],
    how: tuple[float, int, int, int],
    advance: Callable[[float], None],
) -> dict[str, list[float]]:
    """Score key -> one number a prompt. ``how``: guidance, steps, seed and pictures a forward."""
    from opd_ray.actors.rollout import SampleRequest, draw_pictures

    guidance, steps, seed, batch = how
    scores: dict[str, list[float]] = {}
    for task, rows in prompts.items():
        for start in range(0, len(rows), batch):
            part = tuple(rows[start : start + batch])
            request = SampleRequest("", None, guidance, steps, seed, part, (0,) * len(part))
            pictures = draw_pictures(family, request, partial(advance, len(part) / steps))
            for reward in TASKS[task]:
                key = task if reward == task else f"{task}:{reward}"
                found = rewards[reward](pictures, [prompt.text for prompt in part])
                scores.setdefault(key, []).extend(found.tolist())
    return scores


def _table(result: Mapping[str, Any]) -> Table:
    """A line for each score and model, so that any number of models fits on 80 columns."""
    keys = list(dict.fromkeys(key for model in result["models"].values() for key in model["scores"]))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("score", no_wrap=True)
    table.add_column("model", overflow="fold")
    for name in ("mean", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in keys:
        scores = [model["scores"][key] for model in result["models"].values()]
        write = alike(score[name] for score in scores for name in ("value", "low", "high"))
        for place, (name, model) in enumerate(result["models"].items()):
            last = place == len(result["models"]) - 1
            table.add_row("" if place else key, name, *_cells(model["scores"][key], write), end_section=last)
    return table


def _cells(score: Mapping[str, Any], write: Write) -> list[str]:
    return [write(score["value"]), span(score["low"], score["high"], write) or MISSING, str(score["n"])]
