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
    Scene,
    Style,
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
    """What a data set holds: shares of tasks and of styles (hard, oracle, soft)."""

    tasks: dict[str, float]
    styles: tuple[float, float, float]
    captions: int = 4
    """How many a picture has."""
    look_styles: tuple[float, float, float] | None = None
    """Other shares of styles for look captions."""


@dataclass(frozen=True)
class Dataset:
    """Latents [N, 16, 4, 4] and each picture's captions."""

    latents: Tensor
    captions: list[list[str]]


def style(shares: tuple[float, float, float], rng: random.Random) -> Style:
    """A random style by its share."""
    return rng.choices((hard_style, oracle_style, soft_style), shares)[0](rng)


def example(recipe: Recipe, rng: random.Random) -> tuple[Scene, list[str]]:
    """One picture's scene and its captions."""
    task = rng.choices(list(recipe.tasks), list(recipe.tasks.values()))[0]
    drawn = style((task == "look" and recipe.look_styles) or recipe.styles, rng)
    meaning = training_meaning(task, rng)
    picture = loose_scene(drawn, rng) if task == "look" else scene(meaning, drawn, rng)
    return picture, [training_caption(meaning, rng) for _ in range(recipe.captions)]


def make_dataset(vae: AutoencoderKL, recipe: Recipe, size: int, seed: int, tick: Callable[[int], None]) -> Dataset:
    """Render, encode and caption ``size`` pictures; ``tick`` is told how many were made."""
    rng = random.Random(seed)
    latents: list[Tensor] = []
    captions: list[list[str]] = []
    for start in range(0, size, _ENCODE_BATCH):
        count = min(_ENCODE_BATCH, size - start)
        batch = [example(recipe, rng) for _ in range(count)]
        latents.append(encode(vae, render([picture for picture, _ in batch])))
        captions += [each for _, each in batch]
        tick(count)
    return Dataset(torch.cat(latents), captions)
