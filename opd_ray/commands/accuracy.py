"""``opd-ray accuracy RUN...``: how often what was trained prefers the better picture of a pair."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from opd_ray.commands.options import Json, Seed, Threads, require_local
from opd_ray.config import PairsConfig
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError
from opd_ray.report.wording import span

if TYPE_CHECKING:
    from opd_ray.evaluation.models import Found
    from opd_ray.models import Family
    from opd_ray.pairs.index import PairIndex
    from opd_ray.types import Experience

__all__ = ["Asked", "accuracy", "ask"]


@dataclass(frozen=True, slots=True)
class Asked:
    """How many pairs, and how."""

    pairs: int
    draws: int
    seed: int
    batch: int


def accuracy(
    runs: Annotated[list[Path], typer.Argument(help="Run folders whose student is a LoRA.")],
    pairs: Annotated[list[Path], typer.Option(help="Labelled pairs: files or folders, as the key `pairs` takes them.")],
    count: Annotated[int, typer.Option(min=1, help="Pairs that are asked about.")] = 512,
    draws: Annotated[int, typer.Option(min=8, help="Times and noises of each pair.")] = 8,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a forward.")] = 32,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Implicit reward accuracy on labelled pairs: 0.5 is chance, 1 less the share of wrong labels the most there is."""
    import torch

    from opd_ray.evaluation.models import find_model
    from opd_ray.pairs.index import index_pairs

    for run in runs:
        require_local(run, "RUN")
    found = {str(run): find_model(str(run)) for run in runs}  # all of them before the first one costs minutes
    for name, model in found.items():
        if model.lora is None:
            raise ConfigError(f"{name}: its student is no LoRA, so its start is not at hand; give a run of a LoRA")
    chosen = PairsConfig(files=tuple(map(str, pairs)))
    index = index_pairs(chosen)
    asked = Asked(min(count, index.pairs), draws, seed, batch)
    torch.set_num_threads(threads)
    result: dict[str, Any] = {"draws": draws, "seed": seed, "runs": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=json, transient=True) as progress:
        bar = progress.add_task("asking", total=len(found) * asked.pairs)
        for name, model in found.items():
            result["runs"][name] = ask(model, chosen, index, asked, lambda done: progress.advance(bar, done))
    if json:
        console.print_json(data=result)
        return
    for name, one in result["runs"].items():
        interval = span(one["low"], one["high"], "{:.3f}".format)
        console.print(f"{name}: {one['value']:.3f}{f' ({interval})' if interval else ''} of {one['n']} pairs")


def ask(
    model: "Found", chosen: PairsConfig, index: "PairIndex", asked: Asked, advance: Callable[[int], None]
) -> dict[str, float | None]:
    """The accuracy of one run, as ``implicit_accuracy``; ``advance`` is told of pairs that are done."""
    from opd_ray.algorithms.dpo import DiffusionDpo
    from opd_ray.config import DpoConfig
    from opd_ray.evaluation.implicit import implicit_accuracy

    family = model.load()
    algorithm = DiffusionDpo(DpoConfig(name="diffusion_dpo", draws=asked.draws))
    algorithm.facts = replace(algorithm.facts, seed=asked.seed, times=family.schedule.training_times())
    if model.start is not None:
        family.load_lora("start", model.start)
    items, start = _items(family, chosen, index, asked, advance), "start" if model.start is not None else None
    return implicit_accuracy(family, "lora", algorithm, items, start)


def _items(
    family: "Family", chosen: PairsConfig, index: "PairIndex", asked: Asked, advance: Callable[[int], None]
) -> "Iterator[Experience]":
    """Each pair once, as a learner gets them."""
    from opd_ray.actors.pairs import PairsActor
    from opd_ray.pairs.order import Order
    from opd_ray.roles import pair_rows
    from opd_ray.types import Experience, Prompt, WorkItem

    order = Order(index, asked.seed, chosen.window)
    reader = PairsActor(family, lambda side: pair_rows(chosen, order, side, ray=False), size=asked.batch)
    for number, start in enumerate(range(0, asked.pairs, asked.batch)):
        rows = min(asked.batch, asked.pairs - start)
        tensors = reader.read(number).tensors
        own = {name: one if name.startswith("empty.") else one[:rows] for name, one in tensors.items()}
        prompts = tuple(Prompt(str(start + row), "", chosen.task) for row in range(rows))
        yield Experience(WorkItem(0, chosen.task, number, number, prompts, (0,) * rows, ()), recorded=own)
        advance(rows)
