"""The stages that make the U-Net and its few-step distillation, behind those of the first base."""

import json
from dataclasses import asdict
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from opd_ray.world import TASKS
from opd_ray.world.dataset import Dataset, make_dataset
from opd_ray.world.drawing import draw_few, score
from opd_ray.world.stages import Result, Stage, Workplace, load_autoencoder
from opd_ray.world.unet import STEPS, Ends, load_unet_pipeline, new_unet_pipeline, teacher_ends, train_few, train_unet

FEW_STEPS = (1, 2, 4)


def _data(place: Workplace) -> Dataset:
    settings = place.settings
    vae = load_autoencoder(place)
    return make_dataset(vae, settings.unet_recipe, settings.unet_pictures, settings.seed + 2, lambda count: None)


def _save(pipe: StableDiffusionPipeline, place: Workplace, name: str) -> None:
    """In float16, and without the folder that it was read from; what is scored later is what was saved."""
    pipe.to(torch.float16).save_pretrained(str(place.out / name), safe_serialization=True)
    for path in (place.out / name).rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None):
            path.write_text(json.dumps(content, indent=2) + "\n")


def _unet(place: Workplace) -> Result:
    settings = place.settings
    torch.manual_seed(settings.seed)
    pipe = new_unet_pipeline(load_autoencoder(place))
    train_unet(pipe, _data(place), settings.unet_fit, settings.seed, place.tick)
    _save(pipe, place, "unet")
    return {}


def _paths(place: Workplace) -> Result:
    settings = place.settings
    pipe = load_unet_pipeline(place.out / "unet")

    def tick(count: int) -> None:
        place.tick(count, {})

    ends = teacher_ends(pipe, _data(place), settings.few_paths, settings.unet_guidance, settings.seed + 7, tick)
    save_file(vars(ends), str(place.work("paths.safetensors")))
    return {}


def _few(place: Workplace) -> Result:
    settings = place.settings
    pipe = load_unet_pipeline(place.out / "unet")
    ends = Ends(**load_file(str(place.work("paths.safetensors"))))
    train_few(pipe, ends, settings.few_fit, settings.seed + 7, place.tick)
    _save(pipe, place, "few")
    return {}


def _scores(place: Workplace) -> Result:
    settings = place.settings
    own = settings.unet_guidance
    asked = [("unet", str(steps), steps, own) for steps in (STEPS, *FEW_STEPS)]
    asked += [("unet", f"{steps} unguided", steps, 1.0) for steps in FEW_STEPS]  # as many forwards as the distilled
    asked += [("few", str(steps), steps, 1.0) for steps in FEW_STEPS]
    found: dict[str, dict[str, Any]] = {}
    for name, label, steps, guidance in asked:
        pipe = load_unet_pipeline(place.out / name)
        row = found.setdefault(name, {})[label] = {"guidance": guidance}
        for task in TASKS:
            prompts = place.held_out(task, settings.score_prompts)
            images = draw_few(pipe, prompts, steps, guidance, seed=settings.seed + 4)
            row[task] = score(images, prompts, task)
            place.tick(1, {})
    return {"unet_scores": {"n": settings.score_prompts, "models": found}}


def unet_stages() -> list[Stage]:
    """In order."""
    return [
        Stage(
            "unet",
            lambda s: (asdict(s.unet_recipe), s.unet_pictures, asdict(s.unet_fit)),
            lambda s: s.unet_fit.steps,
            _unet,
        ),
        Stage("few-step paths", lambda s: (s.few_paths, s.unet_guidance), lambda s: s.few_paths, _paths),
        Stage(
            "few steps",
            lambda s: asdict(s.few_fit),
            lambda s: s.few_fit.steps,
            _few,
        ),
        Stage(
            "few steps' scores",
            lambda s: (s.score_prompts,),
            lambda s: len(TASKS) * (1 + 3 * len(FEW_STEPS)),
            _scores,
        ),
    ]
