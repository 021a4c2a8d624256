"""The stages of a build. Each reads what earlier ones left in the folder and gives its results."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from opd_ray.world import SPLITS, TASKS, prompt_file
from opd_ray.world.autoencoder import decode, encode, train_autoencoder
from opd_ray.world.dataset import Dataset, make_dataset
from opd_ray.world.drawing import by_category, draw, score
from opd_ray.world.network import load_pipeline, new_pipeline, save_pipeline
from opd_ray.world.samples import truth
from opd_ray.world.settings import Settings
from opd_ray.world.specialists import overrides, save_half, train
from opd_ray.world.splits import prompt_rows
from opd_ray.world.training import train_base

Result = dict[str, Any]


@dataclass(frozen=True)
class Workplace:
    """Where a build happens, with what settings, and whom to tell about progress."""

    out: Path
    settings: Settings
    key: str
    """Of the stage: another one where its settings, or those of a stage before it, are others."""
    tick: Callable[[int, dict[str, float]], None]

    @property
    def pipeline(self) -> Path:
        """The diffusers folder."""
        return self.out / "pipeline"

    def lora(self, name: str) -> Path:
        """A specialist's folder."""
        return self.out / "lora" / name

    def work(self, name: str) -> Path:
        """A file or folder that later stages need and nobody else."""
        return self.out / "work" / name

    def held_out(self, task: str, count: int) -> list[str]:
        """The first held-out prompts of a task."""
        lines = (self.out / prompt_file(task, "heldout")).read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines[:count]]


@dataclass(frozen=True)
class Stage:
    """A name, what it depends on (a change makes it run again), its length in ticks, its work."""

    name: str
    depends: Callable[[Settings], object]
    length: Callable[[Settings], int]
    run: Callable[[Workplace], Result]


def _prompts(place: Workplace) -> Result:
    rows: dict[str, Any] = {}
    for task, split in SPLITS:
        settings = place.settings
        count = settings.train_rows if split == "train" else settings.heldout_rows
        made = prompt_rows(task, split, count)
        path = place.out / prompt_file(task, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        rows[path.name] = {"rows": count, "unique": len({row["prompt"] for row in made})}
        place.tick(1, {})
    return {"prompts": rows}


def _autoencoder(place: Workplace) -> Result:
    model = train_autoencoder(place.settings.autoencoder_steps, place.settings.seed, place.tick)
    model.half().save_pretrained(str(place.work("autoencoder")))
    vae = load_autoencoder(place)
    count = place.settings.score_prompts
    results: Result = {"scaling_factor": vae.config.scaling_factor}
    results["shift_factor"] = vae.config.shift_factor
    for task in (*TASKS, "mixed"):
        images, prompts = truth(task, count, seed=place.settings.seed + 1)
        results[task] = {
            "rendered": score(images, prompts, task),
            "round_trip": score(decode(vae, encode(vae, images)), prompts, task),
        }
    return {"autoencoder": results}


def load_autoencoder(place: Workplace) -> AutoencoderKL:
    """The trained autoencoder as it ships, in float32."""
    return AutoencoderKL.from_pretrained(str(place.work("autoencoder"))).float().eval()


def _latents(place: Workplace) -> Result:
    settings = place.settings
    vae = load_autoencoder(place)
    data = make_dataset(
        vae,
        settings.base_recipe,
        settings.base_pictures,
        settings.seed + 2,
        lambda count: place.tick(count, {}),
    )
    save_file({"latents": data.latents}, str(place.work("latents.safetensors")))
    place.work("captions.json").write_text(json.dumps(data.captions))
    return {}


def _base(index: int) -> Callable[[Workplace], Result]:
    def run(place: Workplace) -> Result:
        settings = place.settings
        data = Dataset(
            load_file(str(place.work("latents.safetensors")))["latents"],
            json.loads(place.work("captions.json").read_text()),
        )
        torch.manual_seed(settings.seed)
        before = place.work(f"base-{index}")
        pipe = load_pipeline(before) if index else new_pipeline(load_autoencoder(place), settings.shift)
        train_base(pipe, data, settings.base_phases[index], settings.seed + index, place.tick)
        pipe.save_pretrained(str(place.work(f"base-{index + 1}")), safe_serialization=True)
        return {}

    return run


def _base_styles(place: Workplace) -> Result:
    settings = place.settings
    pipe = load_pipeline(place.work(f"base-{len(settings.base_phases)}"))
    data = make_dataset(pipe.vae, settings.last_recipe, settings.last_pictures, settings.seed + 5, lambda count: None)
    train_base(pipe, data, settings.last_phase, settings.seed + 5, place.tick)
    save_pipeline(pipe, place.pipeline)
    return {}


def _sweep(place: Workplace) -> Result:
    settings = place.settings
    pipe = load_pipeline(place.pipeline)
    swept: dict[str, dict[str, Any]] = {}
    for guidance in settings.sweep:
        row = {}
        for task in TASKS:
            prompts = place.held_out(task, settings.sweep_prompts)
            row[task] = score(draw(pipe, prompts, guidance), prompts, task)[task]
            place.tick(1, row)
        swept[str(guidance)] = row
    return {"guidance_sweep": {"n": settings.sweep_prompts, "base": swept}}


def _specialist(name: str) -> Callable[[Workplace], Result]:
    def run(place: Workplace) -> Result:
        settings = place.settings
        one = settings.specialists[name]
        folder = place.work("runs") / f"{name}-{place.key}"
        train(one.recipe, folder, overrides(place.out, name, one, settings.lora_rank, settings.seed), place.tick)
        save_half(folder / "lora", place.lora(name))
        return {}

    return run


def _scores(place: Workplace) -> Result:
    settings = place.settings
    matrix: dict[str, Any] = {}
    categories: dict[str, Any] = {}
    for model in ("base", *settings.specialists):
        pipe = load_pipeline(place.pipeline)
        guidance = settings.guidance
        if model != "base":
            pipe.load_lora_weights(str(place.lora(model)))
            guidance = settings.specialists[model].guidance
        matrix[model] = {"guidance": guidance}
        for task in (*TASKS, "mixed"):
            prompts = place.held_out(task, settings.score_prompts)
            images = draw(pipe, prompts, guidance, seed=settings.seed + 4)
            matrix[model][task] = score(images, prompts, task)
            if task == "compose":
                categories[model] = by_category(images, prompts)
            place.tick(1, {})
    return {"scores": {"n": settings.score_prompts, "models": matrix, "categories": categories}}


def _learned(name: str) -> Stage:
    return Stage(
        f"specialist {name}",
        lambda settings: (asdict(settings.specialists[name]), settings.lora_rank),
        lambda settings: settings.specialists[name].rounds,
        _specialist(name),
    )


def _phase(index: int) -> Stage:
    return Stage(
        f"base {index + 1}",
        lambda settings: (asdict(settings.base_phases[index]), settings.shift),
        lambda settings: settings.base_phases[index].steps,
        _base(index),
    )


def stages(settings: Settings) -> list[Stage]:
    """All stages in order."""
    return [
        Stage("prompts", lambda s: (s.train_rows, s.heldout_rows), lambda s: len(SPLITS), _prompts),
        Stage(
            "autoencoder",
            lambda s: (s.seed, s.autoencoder_steps),
            lambda s: s.autoencoder_steps,
            _autoencoder,
        ),
        Stage(
            "latents",
            lambda s: (asdict(s.base_recipe), s.base_pictures),
            lambda s: s.base_pictures,
            _latents,
        ),
        *(_phase(index) for index in range(len(settings.base_phases))),
        Stage(
            "base styles",
            lambda s: (asdict(s.last_phase), asdict(s.last_recipe), s.last_pictures),
            lambda s: s.last_phase.steps,
            _base_styles,
        ),
        Stage(
            "guidance sweep",
            lambda s: (s.sweep, s.sweep_prompts),
            lambda s: len(s.sweep) * len(TASKS),
            _sweep,
        ),
        *(_learned(name) for name in settings.specialists),
        Stage(
            "scores",
            lambda s: (s.guidance, s.score_prompts),
            lambda s: 4 * (1 + len(s.specialists)),
            _scores,
        ),
    ]
