"""The data sets: latents of rendered pictures with several captions each."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

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
    """What a data set holds: shares of tasks and of styles (hard, oracle, soft), caption noise."""

    tasks: dict[str, float]
    styles: tuple[float, float, float]
    noise: CaptionNoise = field(default_factory=CaptionNoise)
    captions: int = 4


@dataclass(frozen=True)
class Dataset:
    """Latents [N, 16, 4, 4] and, of each picture, its captions."""

    latents: Tensor
    captions: list[list[str]]


def style(recipe: Recipe, rng: random.Random) -> Style:
    """A random style by the recipe's shares."""
    return rng.choices((hard_style, oracle_style, soft_style), recipe.styles)[0](rng)


def example(recipe: Recipe, rng: random.Random) -> tuple[Scene, list[str]]:
    """One picture's scene and its captions, each as loose as the recipe's noise makes it."""
    task = rng.choices(list(recipe.tasks), list(recipe.tasks.values()))[0]
    drawn = style(recipe, rng)
    meaning = training_meaning(task, rng)
    picture = loose_scene(drawn, rng) if task == "look" else scene(meaning, drawn, rng)
    captions = [training_caption(disagree(meaning, recipe.noise, rng), rng) for _ in range(recipe.captions)]
    return picture, captions


def make_dataset(vae: AutoencoderKL, recipe: Recipe, size: int, seed: int, tick: Callable[[int], None]) -> Dataset:
    """Render, encode and caption ``size`` pictures; ``tick`` is told how many were made."""
    rng = random.Random(seed)
    latents, captions = [], []
    for start in range(0, size, _ENCODE_BATCH):
        batch = [example(recipe, rng) for _ in range(min(_ENCODE_BATCH, size - start))]
        latents.append(encode(vae, render([picture for picture, _ in batch])))
        captions += [names for _, names in batch]
        tick(len(batch))
    return Dataset(torch.cat(latents), captions)
