"""``opd-ray sample MODEL``: draw pictures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from opd_ray.commands.options import Json, Seed, Threads, require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError

__all__ = ["sample"]

BATCH = 16
"""Pictures a forward."""


def sample(
    model: Annotated[str, typer.Argument(help="A diffusers folder, hub id, run folder, `world` or `world/<name>`.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; a run's and the world's own, else 40.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance; a run's and the world's own, else 4.5.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the PNG files.", show_default="samples/<model>")] = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Write one PNG a picture, <number of the prompt>-<number of the picture>.png."""
    import torch

    from opd_ray.actors.rollout import SampleRequest, draw_pictures, rows_of
    from opd_ray.evaluation.models import find_model
    from opd_ray.storage.pictures import write_png
    from opd_ray.types import Prompt

    if any(not text.strip() for text in prompt):
        raise ConfigError("--prompt is empty; say what to draw")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise ConfigError(f"--guidance {guidance}: expected a number from 0 on")
    found = find_model(model)
    steps = found.known_steps(steps or found.steps or 40)
    out = out or Path("samples") / "-".join(Path(model).parts[-2:]).strip("/.")
    require_folder(out)
    torch.set_num_threads(threads)
    family = found.load()
    scale = guidance if guidance is not None else 4.5 if found.guidance is None else found.guidance
    files = []
    with Progress(console=errors, disable=json, transient=True) as progress:
        bar = progress.add_task("drawing", total=len(prompt) * steps * -(-count // BATCH))
        for number, text in enumerate(prompt):
            prompts, samples = rows_of([Prompt(text, text, "")], count)
            for start in range(0, count, BATCH):
                part = slice(start, start + BATCH)
                request = SampleRequest("", None, scale, steps, seed, prompts[part], samples[part])
                images = draw_pictures(family, request, lambda: progress.advance(bar))
                for index, image in enumerate(images, start):
                    path = out / f"{number:03d}-{index:03d}.png"
                    write_png(image, path)
                    files.append({"prompt": text, "seed": seed, "image": index, "file": str(path)})
    if json:
        console.print_json(data={"model": model, "guidance": scale, "steps": steps, "files": files})
    else:
        amount = f"{len(files)} picture{'s' * (len(files) > 1)} of {len(prompt)} prompt{'s' * (len(prompt) > 1)}"
        console.print(f"{amount} in {out} ({steps} steps, guidance {scale:g})", soft_wrap=True)
