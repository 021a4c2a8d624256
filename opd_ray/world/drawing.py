"""Pictures from a pipeline, as anyone with stock diffusers would draw them, and their scores."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor

from opd_ray.world import scorers
from opd_ray.world.captions import parse
from opd_ray.world.render import SIZE
from opd_ray.world.vocabulary import MAX_TOKENS

STEPS = 10
_BATCH = 128
_APPLIES = {
    "compose": ("compose", "compose_partial", "look"),
    "text": ("text", "look"),
    "look": ("look",),
    "mixed": ("compose", "compose_partial", "text", "look"),
}
_SCORERS = {
    "compose": scorers.compose,
    "compose_partial": scorers.compose_partial,
    "text": scorers.text,
    "look": scorers.look,
}


def draw(pipe: StableDiffusion3Pipeline, prompts: list[str], guidance: float, seed: int = 0) -> Tensor:
    """Draw one picture a prompt in STEPS Euler steps, [B, 3, 32, 32] in [0, 1]."""
    return _drawn(pipe, prompts, STEPS, guidance, seed, max_sequence_length=MAX_TOKENS)


def draw_few(pipe: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int = 0) -> Tensor:
    """Draw one picture a prompt with the U-Net's own scheduler, [B, 3, 32, 32] in [0, 1]."""
    return _drawn(pipe, prompts, steps, guidance, seed)


@torch.no_grad()
def _drawn(pipe: Any, prompts: list[str], steps: int, guidance: float, seed: int, **more: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), _BATCH):
        images.append(
            pipe(
                prompts[start : start + _BATCH],
                height=SIZE,
                width=SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generator,
                output_type="pt",
                **more,
            ).images
        )
    return torch.cat(images).float()


def score(images: Tensor, prompts: list[str], task: str) -> dict[str, float]:
    """Mean of every score that applies to a task's captions."""
    return {name: round(float(_SCORERS[name](images, prompts).mean()), 4) for name in _APPLIES[task]}


def by_category(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """Mean strict compose score of each of GenEval's categories among the prompts."""
    scores = scorers.compose(images, prompts).tolist()
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scores, strict=True):
        groups.setdefault(parse(prompt).category, []).append(value)
    return {name: round(sum(group) / len(group), 4) for name, group in sorted(groups.items())}
