"""``opd-ray evaluate MODEL...``: the same prompts and first noises for every model, scored with intervals."""

import json as json_module
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from opd_ray.commands.judging import (
    Cluster,
    ClusterKeys,
    RewardNames,
    carry_out,
    config_of,
    folder_for,
    table_of,
    versions_of,
)
from opd_ray.commands.options import Json, Seed, Threads, require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from opd_ray.config import Config
    from opd_ray.evaluation.drawings import Drawing
    from opd_ray.evaluation.models import Found
    from opd_ray.evaluation.router import Router
    from opd_ray.models import Family
    from opd_ray.rewards import Reward
    from opd_ray.types import Prompt

__all__ = ["evaluate"]

Routes = Annotated[
    list[str] | None,
    typer.Option(
        help="TASK=MODEL: adds a row `router` in which each task's prompts are drawn by its own model; MODEL alone for "
        "all other tasks. May be given several times."
    ),
]
PIXELS = 32
"""Height and width of the tiny world's pictures."""
TASKS = {"compose": ("compose",), "text": ("text",), "look": ("look",), "mixed": ("compose", "text", "look")}
"""The tiny world's held-out prompt sets and the scorers that apply to each."""


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Diffusers folders, hub ids, run folders, `world` or `world/<name>`.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="A file .txt, .csv, .jsonl or .parquet, `world/<task>/<split>`, or TASK=FILE; may be given several "
            "times. Without it: the tiny world's held-out prompts and scorers."
        ),
    ] = None,
    rewards: RewardNames = None,
    router: Routes = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    images: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each task, in an order of the seed; all, and the world's 256.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Denoising steps, or several as in 10,40; a run's and the world's own, else 40."),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(help="MODEL=G for one model, or G for all; a run's and the world's own, else 4.5."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Height and width of the pictures; the models' own where not given.")
    ] = None,
    seed: Seed = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a forward; 8, and 64 of the world's.")] = None,
    pictures: Annotated[
        int | None, typer.Option(min=0, help="Prompts of each task whose pictures are written; all where not given.")
    ] = None,
    cluster: Cluster = None,
    override: ClusterKeys = None,
    threads: Threads = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="With --prompts the folder of the evaluation (`evaluation`), else a JSON file."),
    ] = None,
    json: Json = False,
) -> None:
    """Score models on the same prompts and first noises: mean and 95 % bootstrap interval.

    With --prompts through workers, one row a picture; run it again to go on where it was stopped.
    """
    routes, every = _routes(models, router or [])
    scales, counts = _scales(every, guidance or []), _counts(steps)
    if prompts is None:
        several = images_per_prompt if images_per_prompt > 1 else None
        _require_prompts(rewards, cluster, override, resolution, pictures, several)
        _world(models, routes, scales, counts, images or 256, seed, batch or 64, threads, out, json=json)
        return
    found = _found(every, resolution)
    config = config_of(rewards or [], cluster, override or [], threads)
    by_task = _prompts(prompts, images, seed)
    cut = {"images_per_prompt": images_per_prompt, "seed": seed, "batch": batch or 8, "pictures": pictures}
    drawn = _drawings(models, routes, found, scales, counts, [*by_task])
    _files(drawn, found, config, by_task, cut, folder_for(out or Path("evaluation")), json=json)


def _routes(models: Sequence[str], given: Sequence[str]) -> "tuple[Router | None, list[str]]":
    """The router, and every model that draws, each once."""
    from opd_ray.evaluation.router import ROUTER, read_router

    router = read_router(given)
    if ROUTER in models and router is not None:
        raise ConfigError(f"{ROUTER} is a model and the name of --router's row; give it as ./{ROUTER}")
    return router, list(dict.fromkeys([*models, *(router.models if router else ())]))


def _require_prompts(*given: Any) -> None:
    """Refuse options that say nothing about the tiny world's own evaluation."""
    names = ("rewards", "cluster", "override", "resolution", "pictures", "images-per-prompt")
    for name, value in zip(names, given, strict=True):
        if value is not None:
            raise ConfigError(f"--{name} needs --prompts: without them the tiny world's prompts and scorers are used")


def _found(models: Sequence[str], resolution: int | None) -> "dict[str, Found]":
    """All of them before the first one costs hours."""
    from opd_ray.evaluation.drawings import anchored, check_pixels
    from opd_ray.evaluation.models import find_model

    found = {name: anchored(find_model(name), resolution) for name in models}
    check_pixels(found)
    return found


def _prompts(files: Sequence[str], count: int | None, seed: int) -> "dict[str, tuple[Prompt, ...]]":
    """By task: that of the option, or else of the row, or else the file's name."""
    from opd_ray.evaluation.compare import held_out
    from opd_ray.preflight import locate
    from opd_ray.prompts import PromptFile, read_files

    chosen = []
    for text in files:
        task, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            task, path = "", text
        chosen.append(PromptFile(locate(path), task or None, Path(path).stem))
    prompts = read_files(chosen, "--prompts")
    return held_out(prompts, count, seed) if count is not None else prompts


def _drawings(
    models: Sequence[str],
    router: "Router | None",
    found: "Mapping[str, Found]",
    scales: Mapping[str, float],
    counts: Sequence[int],
    tasks: Sequence[str],
) -> "list[Drawing]":
    """The models, and behind them the router."""
    from opd_ray.evaluation.drawings import drawings, routed

    drawn = drawings({name: found[name] for name in models}, scales, counts)
    return drawn + (routed(router, found, scales, counts, tasks) if router else [])


def _files(
    drawn: "Sequence[Drawing]",
    found: "Mapping[str, Found]",
    config: "Config",
    prompts: "Mapping[str, Sequence[Prompt]]",
    cut: Mapping[str, Any],
    folder: Path,
    *,
    json: bool,
) -> None:
    """Prompts of files, through workers."""
    from opd_ray.evaluation.drawings import abouts, parts_of
    from opd_ray.evaluation.hosts import DrawingHost
    from opd_ray.evaluation.parts import Results
    from opd_ray.prompts import PromptStream
    from opd_ray.scoring import a_few

    models, versions = abouts(drawn), versions_of(config)
    asked = {"models": models, "prompts": PromptStream(prompts, 0).digests(), **cut, "versions": versions}
    results = Results(folder, tuple(config.rewards), asked)
    parts = parts_of(drawn, prompts, folder, **cut)
    make = partial(DrawingHost, dict(found), config.cluster.rollout.device)
    some = a_few(*prompts.values())
    told = {"seed": cut["seed"], "images_per_prompt": cut["images_per_prompt"], "models": models, "versions": versions}
    carry_out(config, results, parts, make, some, told, json=json)


def _world(
    models: Sequence[str],
    router: "Router | None",
    scales: Mapping[str, float],
    counts: Sequence[int],
    images: int,
    seed: int,
    batch: int,
    threads: int,
    out: Path | None,
    *,
    json: bool,
) -> None:
    """The tiny world's held-out prompts and scorers, in this process."""
    import torch

    from opd_ray.evaluation.compare import held_out
    from opd_ray.evaluation.models import find_model
    from opd_ray.evaluation.statistics import mean
    from opd_ray.prompts import read_prompts
    from opd_ray.rewards import make_rewards
    from opd_ray.world import prompts_path

    _require_file(out)
    every = dict.fromkeys([*models, *(router.models if router else ())])
    found = {name: find_model(name) for name in every}  # all of them before the first one costs minutes
    for name, model in found.items():
        _require_fit(name, model, counts)
    drawn = _drawings(models, router, found, scales, counts, [*TASKS])
    files = {task: str(prompts_path(task, "heldout")) for task in TASKS}
    prompts = held_out(read_prompts(files, "the tiny world"), images, seed)
    torch.set_num_threads(threads)
    rewards = make_rewards({name: {} for name in ("compose", "text", "look")})
    result: dict[str, Any] = {"seed": seed, "images_per_task": images, "models": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=json, transient=True) as progress:
        rows = {one.label: sum(len(prompts[task]) for task in one.tasks or TASKS) for one in drawn}
        bar = progress.add_task("drawing and scoring", total=sum(rows.values()))
        held: tuple[str, Family | None] = "", None
        for one in drawn:
            if held[0] != one.model:
                if not (json or errors.is_terminal):
                    errors.print(f"drawing and scoring {one.model}", soft_wrap=True)
                held = "", None  # two may not fit
                held = one.model, one.found.load()
            assert held[1] is not None
            own = {task: prompts[task] for task in one.tasks or TASKS}
            how = (one.guidance, one.steps, seed, batch)
            scores = _score(held[1], own, rewards, how, lambda done: progress.advance(bar, done))
            how_told = _how(one)
            known = result["models"].setdefault(one.label, {**how_told, "scores": {}})
            known["scores"] |= {key: mean(values) for key, values in scores.items()}
            if one.tasks is not None:
                known["routes"] |= how_told["routes"]
    if json:
        console.print_json(data=result)
    else:
        _tell(result)
    if out is not None:
        out.write_text(json_module.dumps(result, indent=2) + "\n", encoding="utf-8")


def _how(one: "Drawing") -> dict[str, Any]:
    """How it draws; of a router by the tasks."""
    how = {"guidance": one.guidance, "steps": one.steps}
    return how if one.tasks is None else {"routes": {", ".join(one.tasks): {"model": one.model, **how}}}


def _tell(result: Mapping[str, Any]) -> None:
    console.print(table_of({name: model["scores"] for name, model in result["models"].items()}))
    for name, model in result["models"].items():
        for tasks, how in model["routes"].items() if "routes" in model else [("", model)]:
            what = f"{name}: {tasks} by {how['model']}" if tasks else name
            console.print(f"{what}: guidance {how['guidance']:g}, {how['steps']} steps", soft_wrap=True)
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
            "--prompts and --rewards"
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
