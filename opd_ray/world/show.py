"""Sheets of pictures, for eyes: rendered truth, its round trip, and what each model draws."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from opd_ray.world import TASKS, lora_path, pipeline_path, prompt_file, prompts_path
from opd_ray.world.autoencoder import decode, encode
from opd_ray.world.drawing import draw
from opd_ray.world.network import load_pipeline
from opd_ray.world.render import SIZE
from opd_ray.world.samples import oracle, truth
from opd_ray.world.settings import STUDENT_GUIDANCE, Settings

_COLUMNS, _ROWS = 12, 4
_ZOOM = 3


def sheet(images: Tensor, columns: int = _COLUMNS) -> Image.Image:
    """Pictures [B, 3, H, W] side by side, enlarged without smoothing."""
    rows = -(-len(images) // columns)
    cell = SIZE + 2
    canvas = torch.ones(3, rows * cell, columns * cell)
    for i, image in enumerate(images):
        top, left = (i // columns) * cell + 1, (i % columns) * cell + 1
        canvas[:, top : top + SIZE, left : left + SIZE] = image
    picture = Image.fromarray((canvas.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy())
    return picture.resize((picture.width * _ZOOM, picture.height * _ZOOM), Image.Resampling.NEAREST)


def write_sheets(out: Path, world: Path | None) -> list[Path]:
    """Write one PNG a model and the truth's, and give their paths."""
    out.mkdir(parents=True, exist_ok=True)
    count = _COLUMNS * _ROWS
    folder = world / "pipeline" if world else pipeline_path()
    pipe = load_pipeline(folder)
    tasks = (*TASKS, "mixed")
    written = []

    def write(name: str, images: list[Tensor]) -> None:
        path = out / f"{name}.png"
        sheet(torch.cat(images)).save(path)
        written.append(path)

    drawn = [truth(task, count, seed=0)[0] for task in tasks]
    drawn.append(oracle("mixed", count, seed=0)[0])
    write("truth", drawn)
    write("round-trip", [decode(pipe.vae, encode(pipe.vae, images)) for images in drawn])
    for model in ("base", *TASKS):
        guidance = STUDENT_GUIDANCE
        if model != "base":
            pipe.load_lora_weights(str(world / "lora" / model if world else lora_path(model)))
            guidance = Settings().specialists[model].guidance
        images = []
        for task in tasks:
            path = world / prompt_file(task, "heldout") if world else prompts_path(task, "heldout")
            rows = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:count]]
            images.append(draw(pipe, rows, guidance))
        write(model, images)
        pipe.unload_lora_weights()
    return written
