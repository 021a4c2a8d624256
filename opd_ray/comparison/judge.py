"""What a model is worth: scores at prompts and first noises that all models share, and gauges that nobody optimises."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_ray.actors import SampleRequest
from opd_ray.actors.rollout import draw_pictures
from opd_ray.comparison.protocol import Judged, prompts_of
from opd_ray.config import Config
from opd_ray.evaluation.gauges import Gauge, diversity, kernel_distance
from opd_ray.evaluation.models import find_model
from opd_ray.models import Family
from opd_ray.plugins import load
from opd_ray.recipes import read
from opd_ray.rewards import make_rewards
from opd_ray.storage.pictures import write_png
from opd_ray.types import Prompt

__all__ = ["adapter_of", "judge", "snapshot_of", "tuned"]

BATCH = 64
SHOWN = 4
"""Pictures of each task that are kept to look at."""
ADAPTER = "judged"


@cache
def base_of(model: str) -> Family:
    """Once a process: models differ in their adapters alone."""
    return find_model(model).load()


@contextmanager
def adapter_of(family: Family, lora: Path | None) -> Iterator[None]:
    """The base under a LoRA of a run or a merge, or bare."""
    if lora is None:
        with family.adapter(None):
            yield
        return
    family.load_lora(ADAPTER, str(lora))
    try:
        with family.adapter(ADAPTER):
            yield
    finally:
        family.remove_adapter(ADAPTER)


@contextmanager
def snapshot_of(family: Family, run: Path, round: int) -> Iterator[None]:
    """The base under what a checkpoint of a run holds: its moving average, where it has one."""
    config: Config = read(run / "config.yaml")
    folder = run / "checkpoints" / f"step-{round:06d}"
    averaged = folder / "ema.safetensors"
    assert config.student.lora is not None, "only LoRAs are compared"
    family.add_student(ADAPTER, config.student.lora.model_copy(update={"start": None}), 0)
    try:
        held = load_file(averaged if averaged.is_file() else folder / "student.safetensors")
        with torch.no_grad():
            for name, parameter in family.adapter_parameters(ADAPTER).items():
                parameter.copy_(held[name])
        with family.adapter(ADAPTER):
            yield
    finally:
        family.remove_adapter(ADAPTER)


def pictures(family: Family, judged: Judged, prompts: Sequence[Prompt], samples: Sequence[int]) -> Tensor:
    """[B, 3, H, W] in [0, 1] by the adapter in use."""
    drawn = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        rows = tuple(prompts[part]), tuple(samples[part])
        drawn.append(draw_pictures(family, SampleRequest("", None, judged.guidance, judged.steps, judged.seed, *rows)))
    return torch.cat(drawn)


def scored(judged: Judged, task: str, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """One number a picture: the smallest of the task's rewards that apply to it."""
    texts = [prompt.text for prompt in prompts]
    rewards = make_rewards({name: {} for name in judged.rewards[task]}, "cpu")
    answers = [rewards[name](images, texts).numpy() for name in judged.rewards[task]]
    return [float(value) for value in np.fmin.reduce(answers)]


def judge(judged: Judged, family: Family, shown: Path | None = None, *, full: bool = True) -> dict[str, Any]:
    """Scores and gauges of the adapter in use.

    Args:
        judged: which prompts, how many, and how they are drawn and scored.
        family: with the adapter in use.
        shown: folder of a few pictures to look at.
        full: as a row of a table; otherwise as a point of a curve, which has fewer pictures, and scores and fidelity
            alone.

    Returns:
        scores, one number a picture; fidelity and diversity, gauges as JSON; all by task. ``pooled`` is the fidelity
        of all tasks' pictures taken together, in which what one task has too much of makes up for another's lack.
    """
    count = judged.images_per_task if full else judged.curve_images
    prompts = {task: prompts_of(path, task)[:count] for task, path in judged.prompts.items()}
    scores, features, true = {}, dict[str, Tensor](), dict[str, Tensor]()
    for task, own in prompts.items():
        images = pictures(family, judged, own, [0] * len(own))
        scores[task] = scored(judged, task, images, own)
        features[task] = family.encode_images(images)
        if judged.truth is not None:
            true[task] = true_features(family, judged.truth, tuple(prompt.text for prompt in own))
        for number in range(min(SHOWN, len(own)) if shown is not None else 0):
            assert shown is not None
            write_png(images[number], shown / f"{task}-{number}.png")
    found: dict[str, Any] = {"scores": scores}
    if true:
        found["fidelity"] = {
            task: told(kernel_distance(features[task], own, paired=True, seed=number), drawn=full)
            for number, (task, own) in enumerate(true.items())
        }
    if true and full:
        together = torch.cat([*features.values()]), torch.cat([*true.values()])
        found["pooled"] = told(kernel_distance(*together, paired=True), drawn=True)
    if full:
        found["diversity"] = {
            task: told(varied(judged, family, own, seed=number), drawn=True)
            for number, (task, own) in enumerate(prompts.items())
        }
    return found


def varied(judged: Judged, family: Family, prompts: Sequence[Prompt], seed: int) -> Gauge:
    """How much pictures of one prompt differ, over the first few of a task."""
    some = prompts[: judged.varied]
    rows = [prompt for prompt in some for _ in range(judged.variants)]
    images = pictures(family, judged, rows, [*range(judged.variants)] * len(some))
    return diversity(family.encode_images(images).split(judged.variants), seed=seed)


@cache
def true_features(family: Family, truth: str, texts: tuple[str, ...]) -> Tensor:
    """Of true pictures of these prompts."""
    return family.encode_images(load(truth, {}, "judged.truth")(texts))


def tuned(judged: Judged, family: Family, prompts: Mapping[str, str], count: int) -> dict[str, Any]:
    """The mean score of the averaged tasks, each at the last prompts of a file."""
    means = {}
    for task in judged.averaged:
        own = prompts_of(prompts[task], task)[-count:]
        means[task] = float(np.nanmean(scored(judged, task, pictures(family, judged, own, [0] * len(own)), own)))
    return {"means": means, "average": float(np.mean([*means.values()]))}


def told(gauge: Gauge, *, drawn: bool) -> dict[str, Any]:
    """As JSON, for tables with its bootstrap samples."""
    found: dict[str, Any] = {"value": gauge.value, "low": gauge.low, "high": gauge.high}
    return found | ({"drawn": [round(one, 5) for one in gauge.drawn]} if drawn else {})
