"""``opd-ray pairs``: a data set of preferences from any model, or another one's, labelled by any reward."""

import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from opd_ray.commands.options import Json, Seed, Threads, require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from opd_ray.evaluation.models import Found
    from opd_ray.pairs.feedback import Parts, Score
    from opd_ray.pairs.given import Given

__all__ = ["pairs"]

PART = 32
"""Prompts of one part of the file: so much is done again by whoever goes on."""
Tables = Iterator[tuple[Any, dict[str, int]]]
"""Parts of the file, and what was counted in each."""
Maker = Callable[[int, Callable[[float], None]], Tables]
"""Given how many parts are there and whom to tell of progress, the others."""
VERSIONS = ("opd-ray", "torch", "diffusers", "transformers")


class Rate(ProgressColumn):
    """Pairs a second."""

    def render(self, task: Task) -> Text:
        """Of the last while."""
        return Text("" if task.speed is None else f"{task.speed:.1f} pairs/s")


def pairs(
    model: Annotated[
        str | None,
        typer.Argument(help="What draws: a diffusers folder, hub id, run folder, `world` or `world/<name>`."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="What to draw: .txt, .csv, .jsonl or .parquet, or `world/<task>/train`.")
    ] = None,
    reward: Annotated[str, typer.Option(help="Who judges: a built-in name or package.module:attr.")] = "",
    count: Annotated[int, typer.Option("--pairs", min=1, help="Pairs to draw; ties among them are left out.")] = 1000,
    images_per_prompt: Annotated[int, typer.Option(min=2, help="The best is paired with the worst of so many.")] = 2,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="In place of --prompts and --reward: a .jsonl file with rows {prompt, image}, each of which is "
            "preferred to what MODEL draws of its prompt: a style or a concept from a handful of pictures."
        ),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="With --pictures: what MODEL draws instead, for instance `a photo of a dog` of one dog."),
    ] = None,
    relabel: Annotated[
        Path | None, typer.Option(help="In place of MODEL and --prompts: a Parquet file whose pairs get new labels.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; a run's and the world's own, else 40.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance; a run's and the world's own, else 4.5.")] = None,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a forward.")] = 64,
    out: Annotated[Path, typer.Option(help="The Parquet file; run it again to go on where it was stopped.")] = Path(
        "pairs.parquet"
    ),
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Write pairs in Pick-a-Pic's columns, labelled by a reward; the key `pairs` of a recipe trains on them."""
    _require_source(model, prompts, relabel, reward, pictures, guidance, out)
    import torch

    from opd_ray.evaluation.models import find_model
    from opd_ray.pairs.feedback import Parts

    torch.set_num_threads(threads)
    if relabel is None:
        found = find_model(str(model))
        scale = guidance if guidance is not None else 4.5 if found.guidance is None else found.guidance
        about = {"model": found.label, "prompts": str(prompts), "seed": seed, "batch": batch, "pairs": count}
        steps = found.known_steps(steps or found.steps or 40)
        about |= {"steps": steps, "guidance": scale, "images_per_prompt": images_per_prompt}
        about |= {"pictures": str(pictures), "beside": beside} if pictures is not None else {}
        sizes = [min(PART, count - start) for start in range(0, count, PART)]
    else:
        found, about, sizes = None, {"relabel": str(relabel)}, _sizes(relabel)
    about |= {"reward": reward, "versions": {name: importlib.metadata.version(name) for name in VERSIONS}}
    make = _source(found, about, relabel, pictures)
    require_folder(out.parent)
    _write(parts := Parts(out, about), sizes, make, quiet=json or not errors.is_terminal)
    _tell(out, about, parts.finish(), json)


def _write(parts: "Parts", sizes: Sequence[int], make: Maker, *, quiet: bool) -> None:
    """Those that are not there yet, with the rate and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=quiet, transient=True) as progress:
        bar = progress.add_task("scoring pairs", total=sum(sizes), completed=sum(sizes[: parts.done]))
        try:
            for table, counts in make(parts.done, lambda amount: progress.advance(bar, amount)):
                parts.write(table, counts)
        except KeyboardInterrupt:
            done = sum(sizes[: parts.done])
            raise Stopped(f"{done} of {sum(sizes)} pairs are done; run it again to go on") from None


def _tell(out: Path, about: Mapping[str, Any], counts: Mapping[str, int], json: bool) -> None:
    if json:
        console.print_json(data={"file": str(out), "about": about, "counts": counts})
        return
    rest = ", ".join(f"{number} {name}" for name, number in counts.items() if name != "pairs" and number)
    console.print(f"{counts['pairs']} pairs in {out}" + (f"; left out: {rest}" if rest else ""), soft_wrap=True)


def _source(found: "Found | None", about: Mapping[str, Any], relabel: Path | None, pictures: Path | None) -> Maker:
    """What makes the file's parts, from one on."""
    from opd_ray.pairs.given import given_pictures
    from opd_ray.rewards.base import make_rewards

    if pictures is not None:
        assert found is not None
        return partial(_beside, found, about, given_pictures(pictures))
    score = make_rewards({about["reward"]: {}})[about["reward"]]
    if score.has_probes:
        score.prove()
    if relabel is not None:
        return partial(_relabelled, relabel, score)
    assert found is not None
    return partial(_drawn, found, about, _texts(about["prompts"]), score)


def _require_source(
    model: str | None,
    prompts: str | None,
    relabel: Path | None,
    reward: str,
    pictures: Path | None,
    guidance: float | None,
    out: Path,
) -> None:
    if out.suffix != ".parquet":
        raise ConfigError(f"--out: {out} is to be a Parquet file; name it {out.with_suffix('.parquet')}")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise ConfigError(f"--guidance {guidance}: expected a number from 0 on")
    if pictures is not None:
        if model is None or prompts is not None or relabel is not None or reward:
            raise ConfigError("--pictures needs MODEL, and none of --prompts, --reward and --relabel")
        return
    if not reward:
        raise ConfigError("--reward is missing; name a built-in reward or package.module:attr")
    if relabel is not None and (model is not None or prompts is not None):
        raise ConfigError("--relabel takes its pictures from a file; leave out MODEL and --prompts")
    if relabel is None and (model is None or prompts is None):
        raise ConfigError("give MODEL and --prompts to draw pairs, or --relabel FILE to label a file's anew")


def _texts(file: str) -> tuple[str, ...]:
    from opd_ray.preflight import locate
    from opd_ray.prompts import read_texts

    return read_texts(Path(locate(file)))


def _drawn(
    found: "Found",
    how: Mapping[str, Any],
    texts: tuple[str, ...],
    score: "Score",
    done: int,
    advance: Callable[[float], None],
) -> Tables:
    """Parts of drawn pairs, from one on."""
    import torch

    from opd_ray.actors.rollout import SampleRequest, draw_pictures
    from opd_ray.pairs.feedback import drawn_pairs
    from opd_ray.prompts import PromptStream
    from opd_ray.seeds import fold
    from opd_ray.types import Prompt

    stream = PromptStream({"": [Prompt(text, text, "") for text in texts]}, how["seed"])
    family, each = found.load(), how["images_per_prompt"]
    for start in range(done * PART, how["pairs"], PART):
        chosen, end = stream.take("", start, min(PART, how["pairs"] - start))
        # A prompt that comes again in a later epoch is drawn at other noise.
        rows = [(prompt, n // len(texts) * each + k) for n, prompt in enumerate(chosen, start) for k in range(each)]
        pictures, scores = list[torch.Tensor](), list[torch.Tensor]()
        for first in range(0, len(rows), how["batch"]):
            some = rows[first : first + how["batch"]]
            prompts, samples = (tuple(side) for side in zip(*some, strict=True))
            request = SampleRequest("", None, how["guidance"], how["steps"], how["seed"], prompts, samples)
            pictures.append(draw_pictures(family, request))
            scores.append(score(pictures[-1], [prompt.text for prompt in prompts]))
            advance(len(some) / each)
        images = torch.cat(pictures).unflatten(0, (len(chosen), each))
        seeds = [fold(how["seed"], "pairs", n) for n in range(start, end)]
        yield drawn_pairs(images, [prompt.text for prompt in chosen], torch.cat(scores).view(-1, each), seeds)


def _beside(
    found: "Found",
    how: Mapping[str, Any],
    given: "Sequence[Given]",
    done: int,
    advance: Callable[[float], None],
) -> Tables:
    """Parts of pairs of a given picture, which is the better one, and a drawing."""
    import torch

    from opd_ray.actors.rollout import SampleRequest, draw_pictures
    from opd_ray.pairs.feedback import drawn_pairs
    from opd_ray.pairs.given import as_tensor
    from opd_ray.seeds import fold
    from opd_ray.types import Prompt

    family = found.load()
    for start in range(done * PART, how["pairs"], PART):
        numbers = range(start, min(start + PART, how["pairs"]))
        rows = [given[n % len(given)] for n in numbers]
        asked = tuple(Prompt(text, text, "") for row in rows for text in [how["beside"] or row.prompt])
        request = SampleRequest("", None, how["guidance"], how["steps"], how["seed"], asked, tuple(numbers))
        drawn = draw_pictures(family, request).cpu()
        ours = torch.stack([as_tensor(row, drawn.shape[-1]) for row in rows])
        better = torch.tensor([[1.0, 0.0]]).expand(len(rows), -1)
        seeds = [fold(how["seed"], "pairs", n) for n in numbers]
        yield drawn_pairs(torch.stack([ours, drawn], 1), [row.prompt for row in rows], better, seeds)
        advance(len(rows))


def _sizes(path: Path) -> list[int]:
    """Pairs of each row group of a file."""
    from opd_ray.errors import PromptError
    from opd_ray.pairs.index import opened

    try:
        about = opened(path, ("jpg_0", "jpg_1", "caption")).metadata
    except PromptError as error:
        raise PromptError(f"--relabel: {path}: {error}") from None
    return [about.row_group(group).num_rows for group in range(about.num_row_groups)]


def _relabelled(path: Path, score: "Score", done: int, advance: Callable[[float], None]) -> Tables:
    """Parts of a file with new labels, from one on."""
    from opd_ray.pairs.feedback import relabelled, row_groups

    for rows in row_groups(path, done):
        yield relabelled(rows, score)
        advance(len(rows))
