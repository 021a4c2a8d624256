"""``opd-ray record CONFIG``: teachers draw what a student is then trained on without drawing itself."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from opd_ray.commands.options import Json, Override, RunSeed, Threads, overrides, require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, Stopped
from opd_ray.recipes import load

__all__ = ["record"]


def record(
    config: Annotated[str, typer.Argument(help="A recipe that distils: its teachers draw its training prompts.")],
    override: Override = None,
    seed: RunSeed = None,
    out: Annotated[Path, typer.Option(help="Folder of the recordings; run it again to go on.")] = Path("recordings"),
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Write the teachers' drawings, with their velocities, for as many rounds as the recipe has.

    The key `recorded` of a recipe trains on them.
    """
    loaded = load(config, overrides(override, seed))
    if not loaded.teachers or loaded.drawn is None:
        missing = "teachers" if not loaded.teachers else "prompts.train"
        raise ConfigError(f"{config} has no {missing}; give a recipe whose teachers draw its training prompts")
    import torch

    from opd_ray.algorithms import make_algorithm
    from opd_ray.preflight import preflight
    from opd_ray.recording import Recorder

    torch.set_num_threads(threads)
    algorithm = make_algorithm(loaded)
    train, _ = preflight(loaded, algorithm, lambda text: errors.print(text, soft_wrap=True, markup=False))
    recorder = Recorder(loaded, algorithm, train, out, "cuda" if torch.cuda.is_available() else "cpu")
    require_folder(out)
    items = recorder.left(loaded.rounds)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=json, transient=True) as progress:
        bar, done = progress.add_task("recording", total=len(items)), 0
        try:
            for _ in recorder.record(items):
                done += 1
                progress.advance(bar)
        except KeyboardInterrupt:
            raise Stopped(f"{done} of {len(items)} recordings are done; run it again to go on") from None
    images = loaded.rounds * loaded.batch.images_per_task
    told = {"out": str(out), "rounds": loaded.rounds, "images_per_task": images, "tasks": [*train], "new": len(items)}
    if json:
        console.print_json(data=told)
    else:
        console.print(f"{images} drawings of each of {', '.join(train)} in {out}", soft_wrap=True, markup=False)
