"""The data sets: latents of rendered pictures with several captions each."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from opd_ray.world.autoencoder import encode
from opd_ray.world.render import render
from opd_ray.world.scenes import (
    CaptionNoise,
    Scene,
    Style,
    disagree,
    hard_style,
    loose_scene,
    oracle_style,
    scene,
    soft_style,
)
from opd_ray.world.splits import training_caption, training_meaning

_ENCODE_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """What a data set holds: shares of tasks and of styles (hard, oracle, soft), and its captions.

    ``noises`` names sets of captions, each with how far it is from what the pictures show.
    """

    tasks: dict[str, float]
    styles: tuple[float, float, float]
    noises: dict[str, CaptionNoise]
    captions: int = 4
    """Captions of each set that a picture has."""
    look_styles: tuple[float, float, float] | None = None
    """Other shares of styles for look captions."""
    relations: bool = True
    """Whether compose pictures may be about how two objects lie to each other."""


@dataclass(frozen=True)
class Dataset:
    """Latents [N, 16, 4, 4] and, of each set, each picture's captions."""

    latents: Tensor
    captions: dict[str, list[list[str]]]


def style(shares: tuple[float, float, float], rng: random.Random) -> Style:
    """A random style by its share."""
    return rng.choices((hard_style, oracle_style, soft_style), shares)[0](rng)


def example(
    recipe: Recipe, rng: random.Random, caption_rngs: dict[str, random.Random]
) -> tuple[Scene, dict[str, list[str]]]:
    """One picture's scene and its captions. Each set of captions has its own stream of chance."""
    task = rng.choices(list(recipe.tasks), list(recipe.tasks.values()))[0]
    drawn = style((task == "look" and recipe.look_styles) or recipe.styles, rng)
    meaning = training_meaning(task, rng, recipe.relations)
    picture = loose_scene(drawn, rng) if task == "look" else scene(meaning, drawn, rng)
    captions = {
        name: [
            training_caption(disagree(meaning, noise, caption_rngs[name]), caption_rngs[name])
            for _ in range(recipe.captions)
        ]
        for name, noise in recipe.noises.items()
    }
    return picture, captions


def make_dataset(vae: AutoencoderKL, recipe: Recipe, size: int, seed: int, tick: Callable[[int], None]) -> Dataset:
    """Render, encode and caption ``size`` pictures; ``tick`` is told how many were made."""
    rng = random.Random(seed)
    caption_rngs = {name: random.Random(f"{seed} {name}") for name in recipe.noises}
    latents: list[Tensor] = []
    captions: dict[str, list[list[str]]] = {name: [] for name in recipe.noises}
    for start in range(0, size, _ENCODE_BATCH):
        count = min(_ENCODE_BATCH, size - start)
        batch = [example(recipe, rng, caption_rngs) for _ in range(count)]
        latents.append(encode(vae, render([picture for picture, _ in batch])))
        for _, names in batch:
            for name, each in names.items():
                captions[name].append(each)
        tick(count)
    return Dataset(torch.cat(latents), captions)
