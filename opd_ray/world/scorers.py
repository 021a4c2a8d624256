"""The world's rewards. Each takes images and captions and gives one score in 0..1 an image.

Scores are NaN where a caption does not ask for what a scorer measures; `look` applies to all.
"""

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opd_ray.rewards.probes import Probe, probed
from opd_ray.world.captions import Meaning, parse
from opd_ray.world.detect import Found, detect
from opd_ray.world.reading import edit_distance, read
from opd_ray.world.render import SIZE, render
from opd_ray.world.scenes import hard_style, scene, soft_style

_NAN = float("nan")
# Where each preference reaches one half, and over which width it turns.
_WARMTH, _WARMTH_WIDTH = 0.11, 0.02
_EDGES, _EDGES_WIDTH = 0.105, 0.007
_CONTRAST, _CONTRAST_WIDTH = 0.175, 0.012


def _swapped(prompts: tuple[str, str]) -> list[Probe]:
    """True renderings of two captions: each is better under its own one."""
    rng = random.Random(0)
    images = render([scene(parse(prompt), hard_style(rng), rng, training=False) for prompt in prompts])
    return [Probe((images[i], prompts[i]), (images[1 - i], prompts[i])) for i in (0, 1)]


def _styles() -> list[Probe]:
    """One caption, drawn warm and soft, and cold and hard."""
    rng, prompt = random.Random(0), "a red circle"
    soft, hard = render([scene(parse(prompt), style(rng), rng, training=False) for style in (soft_style, hard_style)])
    return [Probe((soft, prompt), (hard, prompt))]


_composed_probes = partial(_swapped, ("two red circles", "a blue square"))


@probed(_composed_probes)
def compose(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where exactly the objects asked for are there, as asked; else 0. [B, 3, 32, 32] to [B]."""
    return _composed(images, prompts, _strict)


@probed(_composed_probes)
def compose_partial(images: Tensor, prompts: list[str]) -> Tensor:
    """The share of a caption's demands that the picture meets. [B, 3, 32, 32] to [B]."""
    return _composed(images, prompts, _partial)


@probed(partial(_swapped, ('the word "tree"', 'the word "milk"')))
def text(images: Tensor, prompts: list[str]) -> Tensor:
    """1 - edit distance / length between the word asked for and the word read. To [B]."""
    words = [parse(prompt).word for prompt in prompts]
    scores = torch.full((len(prompts),), _NAN)
    chosen = [i for i, word in enumerate(words) if word]
    if chosen:
        seen = read(images[chosen])
        for i, found in zip(chosen, seen, strict=True):
            word = words[i] or ""
            scores[i] = max(0.0, 1 - edit_distance(found, word) / len(word))
    return scores


@probed(_styles)
def look(images: Tensor, prompts: list[str]) -> Tensor:
    """A fixed aesthetic preference: warm, soft edges, low contrast. Smooth in the pixels. To [B].

    Differentiable; prompts are not looked at.
    """
    images = images.float()
    warmth = (images[:, 0] - images[:, 2]).flatten(1).mean(1)
    across = (images[..., 1:] - images[..., :-1]).square().flatten(1).mean(1)
    down = (images[..., 1:, :] - images[..., :-1, :]).square().flatten(1).mean(1)
    edges = (across + down + 1e-8).sqrt()
    contrast = (images.flatten(2).var(2).mean(1) + 1e-8).sqrt()
    return (
        torch.sigmoid((warmth - _WARMTH) / _WARMTH_WIDTH)
        * torch.sigmoid((_EDGES - edges) / _EDGES_WIDTH)
        * torch.sigmoid((_CONTRAST - contrast) / _CONTRAST_WIDTH)
    )


def _composed(images: Tensor, prompts: list[str], judge: Callable[[Meaning, list[Found]], float]) -> Tensor:
    meanings = [parse(prompt) for prompt in prompts]
    scores = torch.full((len(prompts),), _NAN)
    chosen = [i for i, meaning in enumerate(meanings) if meaning.items]
    if chosen:
        for i, found in zip(chosen, detect(images[chosen]), strict=True):
            scores[i] = judge(meanings[i], found)
    return scores


def _strict(meaning: Meaning, found: list[Found]) -> float:
    wanted = sum(item.count for item in meaning.items)
    # Beside a word, a blot of letters that run together is the reader's business.
    objects = [item for item in found if item.shape] if meaning.word else found
    return float(len(objects) == wanted and _partial(meaning, objects) == 1.0)


def _partial(meaning: Meaning, found: list[Found]) -> float:
    marks: list[float] = []
    for item in meaning.items:
        shaped = [one for one in found if one.shape == item.shape]
        # Two items of one shape must share its regions: each counts those of its own colour.
        rivals = sum(other.shape == item.shape for other in meaning.items) > 1
        coloured = [one for one in shaped if item.colour in (None, one.colour)]
        counted = coloured if rivals else shaped
        marks.append(min(len(counted), item.count) / max(len(counted), item.count))
        if item.colour:
            marks.append(min(len(coloured), item.count) / max(len(coloured), item.count))
        if meaning.corner:
            marks.append(float(bool(coloured) and _placed(coloured[0], meaning.corner)))
    return sum(marks) / len(marks)


def _placed(one: Found, corner: str) -> bool:
    row, column = corner.split()
    return (one.y < SIZE / 2) == (row == "top") and (one.x < SIZE / 2) == (column == "left")
