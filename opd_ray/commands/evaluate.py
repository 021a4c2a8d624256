"""``opd-ray evaluate MODEL...``: the same prompts and first noises for every model, scored with intervals."""

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opd_ray.console import console

if TYPE_CHECKING:
    from opd_ray.evaluation.models import Loaded
    from opd_ray.rewards import Reward
    from opd_ray.types import Prompt

__all__ = ["evaluate"]

TASKS = {"compose": ("compose",), "text": ("text",), "look": ("look",), "mixed": ("compose", "text", "look")}
"""The tiny world's held-out prompt sets and the scorers that apply to each."""


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Diffusers folders, hub ids, run folders, `world` or `world/<name>`.")
    ],
    images: Annotated[int, typer.Option(min=1, help="Held-out prompts of each task.")] = 256,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; a run's own, else 10.")] = None,
    guidance: Annotated[
        list[str] | None, typer.Option(help="MODEL=G for one model, or G for all; a run's own, else 4.5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts and first noises.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a forward.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score models on the tiny world's held-out prompts: mean and 95 % bootstrap interval."""
    from opd_ray.evaluation.compare import held_out
    from opd_ray.evaluation.models import load_model
    from opd_ray.evaluation.statistics import mean
    from opd_ray.prompts import read_prompts
    from opd_ray.rewards import make_rewards
    from opd_ray.world import prompts_path

    files = {task: str(prompts_path(task, "heldout")) for task in TASKS}
    prompts = held_out(read_prompts(files, "the tiny world"), images, seed)
    rewards = make_rewards({name: {} for name in ("compose", "text", "look")})
    scales = _scales(models, guidance or [])
    result: dict[str, Any] = {"seed": seed, "images_per_task": images, "models": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=json, transient=True) as progress:
        total = len(models) * sum(len(rows) for rows in prompts.values())
        bar = progress.add_task("drawing and scoring", total=total)
        for name in models:
            loaded = load_model(name)
            scale = scales.get(name, loaded.guidance if loaded.guidance is not None else 4.5)
            chosen = steps or loaded.steps or 10
            scores = _score(
                loaded, prompts, rewards, scale, chosen, seed, batch, lambda done: progress.advance(bar, done)
            )
            means = {key: mean(values) for key, values in scores.items()}
            result["models"][name] = {"guidance": scale, "steps": chosen, "scores": means}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_module.dumps(result, indent=2) + "\n")
    if json:
        console.print_json(data=result)
    else:
        console.print(_table(result))


def _scales(models: Sequence[str], given: Sequence[str]) -> dict[str, float]:
    from opd_ray.errors import ConfigError

    scales: dict[str, float] = {}
    for text in given:
        name, _, value = text.rpartition("=")
        if name and name not in models:
            raise ConfigError(f"--guidance {text}: {name} is not among the models {', '.join(models)}")
        try:
            scales |= {model: float(value) for model in ([name] if name else models) if name or model not in scales}
        except ValueError:
            raise ConfigError(f"--guidance {text}: expected a number or MODEL=number") from None
    return scales


def _score(
    loaded: "Loaded",
    prompts: Mapping[str, Sequence["Prompt"]],
    rewards: Mapping[str, "Reward"],
    guidance: float,
    steps: int,
    seed: int,
    batch: int,
    advance: Any,
) -> dict[str, list[float]]:
    from opd_ray.actors.rollout import SampleRequest, draw_pictures

    scores: dict[str, list[float]] = {}
    for task, rows in prompts.items():
        for start in range(0, len(rows), batch):
            part = tuple(rows[start : start + batch])
            request = SampleRequest("", None, guidance, steps, seed, part, (0,) * len(part))
            pictures = draw_pictures(loaded.family, request)
            for reward in TASKS[task]:
                key = task if reward == task else f"{task}:{reward}"
                found = rewards[reward](pictures, [prompt.text for prompt in part])
                scores.setdefault(key, []).extend(found.tolist())
            advance(len(part))
    return scores


def _table(result: dict[str, Any]) -> Table:
    keys = list(dict.fromkeys(key for model in result["models"].values() for key in model["scores"]))
    table = Table(title=f"held-out prompts, seed {result['seed']}", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("guidance", justify="right")
    for key in keys:
        table.add_column(key, justify="right")
    for name, model in result["models"].items():
        cells = [
            f"{score['value']:.3f} [dim]{score['low']:.3f}-{score['high']:.3f}[/dim]"
            for score in (model["scores"][key] for key in keys)
        ]
        table.add_row(name.replace("[", "\\["), f"{model['guidance']:g}", *cells)
    return table
