"""``opd-ray sample MODEL``: draw pictures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from opd_ray.console import console
from opd_ray.errors import ConfigError

__all__ = ["sample"]


def sample(
    model: Annotated[str, typer.Argument(help="A diffusers folder, hub id, run folder, `world` or `world/<name>`.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; a run's own, else 40.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance; a run's own, else 4.5.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same first noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    json: Annotated[bool, typer.Option("--json", help="Print the files as JSON.")] = False,
) -> None:
    """Write one PNG a picture, named by prompt and number."""
    from opd_ray.actors.rollout import SampleRequest, draw_pictures, rows_of
    from opd_ray.evaluation.models import load_model
    from opd_ray.runtime.hosts import write_png
    from opd_ray.types import Prompt

    if any(not text.strip() for text in prompt):
        raise ConfigError("--prompt is empty; say what to draw")
    loaded = load_model(model)
    steps = steps or loaded.steps or 40
    scale = guidance if guidance is not None else 4.5 if loaded.guidance is None else loaded.guidance
    files = []
    for number, text in enumerate(track(prompt, "drawing", console=console, disable=json, transient=True)):
        prompts, samples = rows_of([Prompt(text, text, "")], count)
        images = draw_pictures(loaded.family, SampleRequest("", None, scale, steps, seed, prompts, samples))
        for index, image in enumerate(images):
            path = out / f"{number:03d}-{index:03d}.png"
            write_png(image, path)
            files.append({"prompt": text, "seed": seed, "image": index, "file": str(path)})
    if json:
        console.print_json(data={"model": model, "guidance": scale, "steps": steps, "files": files})
    else:
        console.print(
            f"{len(files)} pictures of {len(prompt)} prompts in {out} ({steps} steps, guidance {scale:g})",
            markup=False,
            soft_wrap=True,
        )
