"""Angles between the gradients of an arm's tasks, and how much of them is chance."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_ray.commands.train import run_training
from opd_ray.comparison.nodes import Node, Place, key_of, overrides_of
from opd_ray.comparison.protocol import Protocol
from opd_ray.config import Config
from opd_ray.recipes import assignments, load

__all__ = ["cosines"]

BATCHES = 4
STILL = 1e-12
"""A learning rate at which no weight moves, so that all batches have their gradients at the same place."""


def cosines(protocol: Protocol, node: Node, place: Place) -> dict[str, dict[str, float]]:
    """Cosines between the gradients of tasks, at the start and at the end of an arm's training.

    Returns:
        ``start`` and ``end`` -> two tasks -> cosine of their gradients, each the mean of a few batches. Of a task and
        itself: of the means of two halves of its batches. Where that is far below 1, angles are mostly chance.
    """
    (name,) = protocol.arms[node.arm].of
    trained = Node(key_of(protocol, name, node.seed), "train", name, node.seed, ())
    recipe = protocol.arms[name].recipe
    assert recipe is not None
    whole = load(recipe, overrides_of(protocol, trained, place))
    assert isinstance(whole.drawn, dict)
    found = {}
    for start, lora in (("start", None), ("end", str(place.work(trained.key).resolve()))):
        batches = dict[str, list[Tensor]]()
        for task, file in whole.drawn.items():
            key = f"{node.arm}-{start}-{task}-s{node.seed}"
            own = [
                *overrides_of(protocol, trained, place),
                *assignments(protocol.arms[node.arm].set),
                *(f"name={key}", f"rounds={BATCHES}", f"prompts.train={{{task}: {file}}}", f"optimizer.lr={STILL}"),
                *("checkpoint.every=1", f"checkpoint.keep={BATCHES}"),
                *([f"student.lora.start={lora}"] if lora else []),
                *_of_task(whole, task),
            ]
            config = load(recipe, own)
            folder = place.work(key)
            run_training(config, folder, resume=(folder / "run.json").is_file())
            batches[task] = _gradients(folder, config.optimizer.betas[0])
        found[start] = {
            f"{a} and {b}": _cosine(batches[a][::2], batches[a][1::2]) if a == b else _cosine(batches[a], batches[b])
            for a, b in itertools.combinations_with_replacement(batches, 2)
        }
    return found


def _of_task(config: Config, task: str) -> list[str]:
    """Without the teachers and rewards of other tasks."""
    changes = list[str]()
    if config.teachers:
        teacher = config.teachers[config.teacher_of_task[task]]
        changes.append(f"teachers={{{task}: {{lora: {teacher.lora}, guidance: {teacher.guidance}}}}}")
    chosen: Mapping[str, tuple[str, ...]] = getattr(config.algorithm, "task_rewards", {})
    if task in chosen:
        changes.append(f"algorithm.task_rewards={{{task}: [{', '.join(chosen[task])}]}}")
    return changes


def _gradients(run: Path, beta: float) -> list[Tensor]:
    """Of each round, from what Adam's first average became by it: m <- beta m + (1 - beta) g."""
    found, before = list[Tensor](), torch.zeros(())
    for number in range(1, BATCHES + 1):
        averages = load_file(run / "checkpoints" / f"step-{number:06d}" / "optimizer.safetensors")
        own = [averages[name].flatten() for name in sorted(averages) if name.endswith(":exp_avg")]
        now = torch.cat(own).double()
        found.append((now - beta * before) / (1 - beta))
        before = now
    return found


def _cosine(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.stack(ours).sum(0), torch.stack(theirs).sum(0), dim=0))
