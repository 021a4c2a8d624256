"""Pictures whose scores are known: rendered truth for each task."""

import random
from collections.abc import Sequence

from torch import Tensor

from opd_ray.world.captions import parse
from opd_ray.world.dataset import style
from opd_ray.world.render import render
from opd_ray.world.scenes import hard_style, loose_scene, oracle_style, scene, soft_style
from opd_ray.world.settings import BASE_RECIPE
from opd_ray.world.splits import training_caption, training_meaning


def truth(task: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Correct pictures [count, 3, 32, 32] in a task's own style, and their captions."""
    rng = random.Random(seed)
    style = {"compose": hard_style, "text": hard_style, "look": soft_style, "mixed": hard_style}
    scenes, prompts = [], []
    for _ in range(count):
        meaning = training_meaning(task, rng)
        drawn = style[task](rng)
        scenes.append(loose_scene(drawn, rng) if task == "look" else scene(meaning, drawn, rng))
        prompts.append(training_caption(meaning, rng))
    return render(scenes), prompts


def oracle(task: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Correct pictures in the style that satisfies every score at once, and their captions."""
    rng = random.Random(seed)
    scenes, prompts = [], []
    for _ in range(count):
        meaning = training_meaning(task, rng)
        scenes.append(scene(meaning, oracle_style(rng), rng))
        prompts.append(training_caption(meaning, rng))
    return render(scenes), prompts


def illustrations(prompts: Sequence[str], styles: tuple[float, float, float] = BASE_RECIPE.styles) -> Tensor:
    """Pictures [B, 3, 32, 32] of just what these prompts ask for; by default in the styles of the base's data."""
    rng = random.Random(0)
    scenes = []
    for prompt in prompts:
        meaning, drawn = parse(prompt), style(styles, rng)
        asked = bool(meaning.items or meaning.word)
        scenes.append(scene(meaning, drawn, rng, training=False) if asked else loose_scene(drawn, rng))
    return render(scenes)
