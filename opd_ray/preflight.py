"""What can be refused before anything starts, and what a resumed run must not change."""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from opd_ray import world
from opd_ray.actors.recorded import recordings
from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import ClusterConfig, Config
from opd_ray.errors import ConfigError, PlacementError, PromptError
from opd_ray.learners.engine import INSTALL
from opd_ray.metrics import check_logging
from opd_ray.models.base import check_adapters, sigmas_of
from opd_ray.models.checkpoint import check_complete
from opd_ray.models.teachers import check_checkpoint, teacher_model
from opd_ray.planning import check_memory, check_teacher_memory, needs, round_bytes, rounds_that_fit
from opd_ray.prompts import read_prompts
from opd_ray.recording import check_recording
from opd_ray.rewards.base import check_rewards
from opd_ray.types import Prompt

__all__ = ["FORCED", "Prompts", "anchored", "drawn_prompts", "identity", "locate", "overlaps", "preflight"]

Prompts = dict[str, tuple[Prompt, ...]]

FORCED = (
    "algorithm",
    "batch",
    "optimizer",
    "pairs",
    "precision",
    "prompts",
    "rewards",
    "rounds",
    "sampling",
    "teachers",
)
"""Sections in which a resumed run may differ with --force: the saved weights and moments still mean the same."""


def preflight(
    config: Config, algorithm: Algorithm, note: Callable[[str], None] = lambda text: None, *, awaiting: bool = False
) -> tuple[Prompts, Prompts]:
    """Everything that can be refused before a worker starts; returns training and held-out prompts.

    Args:
        config: the run.
        algorithm: its own.
        note: is told of rows that are left out.
        awaiting: teachers that the run's specialists will be need not be there yet.

    Raises:
        UserError: what is wrong, and where.
    """
    if config.specialists and not awaiting:
        raise ConfigError(f"{config.name} has specialists to train first: `opd-ray train` it, all stages in one job")
    check_logging(config)
    train = drawn_prompts(config, note)
    held_out = _prompts(config, config.prompts.eval if config.prompts else None, "prompts.eval", note)
    if train:
        config.check_tasks(tuple(train))
    if config.recorded is not None:
        recordings(config.recorded)
        check_recording(config)
    scoring = config.evaluation.images_per_task > 0
    elsewhere = [name for name in config.rewards if config.cluster.of_reward(name).runtime_env]
    check_rewards(
        config.rewards,
        config.evaluation.rewards if scoring else {},
        tuple(held_out) if scoring else (),
        elsewhere,
    )
    algorithm.check(sigmas_of(config.model, config.sampling.steps))
    check_cards(config.cluster)
    check_backend(config.cluster)
    if config.cluster.gpu_memory_gb is not None:
        check_memory(config, needs(config))
    if config.cluster.runtime == "ray" and not os.environ.get("RAY_ADDRESS"):  # a Ray of our own, whose size is known
        parts = round_bytes(config, algorithm, len(train))
        rounds_that_fit(parts, config.cluster.object_store_mb * 2**20, config.cluster.plasma_fraction)
    check_complete(config.model)
    there = {name: one for name, one in config.teachers.items() if one.specialist not in config.specialists}
    check_adapters(config.model, config.student.lora, there)
    check_whole(config, algorithm)
    for name, teacher in config.teachers.items():
        if teacher.model is not None:
            model = teacher_model(config.model, teacher)
            check_checkpoint(name, config.model, model)
            check_complete(model)
    check_teacher_memory(config)
    return train, held_out


def drawn_prompts(config: Config, note: Callable[[str], None] = lambda text: None) -> Prompts:
    """Those that are drawn to learn from; none where the configuration has none.

    Raises:
        PromptError: a file is missing or malformed.
    """
    return _prompts(config, config.drawn, "prompts.train", note)


def _prompts(config: Config, spec: str | dict[str, str] | None, what: str, note: Callable[[str], None]) -> Prompts:
    chosen = config.prompts
    if chosen is None or spec is None:
        return {}
    return read_prompts(_located(spec), what, on_bad=chosen.on_bad, deduplicate=chosen.deduplicate, note=note)


def check_whole(config: Config, algorithm: Algorithm) -> None:
    """Refuse an algorithm that needs more than one copy of the weights where all of them are trained.

    Raises:
        ConfigError: names what it asks for.
    """
    asked = [*algorithm.adapters, *(name for name in algorithm.velocities if name == "reference")]
    if config.student.lora is None and asked:
        raise ConfigError(
            f"student.lora null trains the denoiser itself, of which there is one copy, and algorithm "
            f"{config.algorithm.name} also needs {', '.join(asked)}; train a LoRA"
        )


def check_cards(cluster: ClusterConfig) -> None:
    """Refuse a card for a role in this process where there is none; Ray says so of its nodes itself.

    Raises:
        PlacementError: a role asks for one.
    """
    placements = [cluster.rollout, cluster.learner, *cluster.teachers.values(), *cluster.rewards.values()]
    wanted = any(placement.device == "cuda" for placement in placements)
    if wanted and cluster.runtime == "local" and not torch.cuda.is_available():
        raise PlacementError("a role asks for a gpu, and this process sees none; set resources.gpu to 0")


def check_backend(cluster: ClusterConfig) -> None:
    """Refuse a learner backend whose package is not there.

    Raises:
        ConfigError: says how to install it.
    """
    if cluster.learner.backend == "deepspeed" and find_spec("deepspeed") is None:
        raise ConfigError(INSTALL)


def overlaps(train: Prompts, held_out: Prompts) -> Iterator[str]:
    """A warning for each task whose held-out prompts are also trained on."""
    seen = {prompt.text for prompts in train.values() for prompt in prompts}
    for task, prompts in held_out.items():
        count = sum(prompt.text in seen for prompt in prompts)
        if count:
            yield f"{count} of {len(prompts)} held-out prompts of {task} are also trained on: its scores are too good"


def _located(spec: str | dict[str, str]) -> str | dict[str, str]:
    return {task: locate(path) for task, path in spec.items()} if isinstance(spec, dict) else locate(spec)


def locate(path: str) -> str:
    """A prompt file, or `world/<task>/<split>` of the built-in ones."""
    match path.split("/"):
        case ["world", task, split]:
            try:
                return str(world.prompts_path(task, split))
            except ValueError as error:
                raise PromptError(f"{path}: {error}") from None
    return path


def identity(config: Config) -> dict[str, Any]:
    """What a resumed run must not change. Where it runs, how long and what it reports, and where, may change."""
    free = {"cluster", "rounds", "checkpoint", "evaluation", "logging", "name", "specialists"}
    if config.optimizer.schedule == "cosine":
        free.remove("rounds")  # the learning rate of every round depends on their number
    if not make_algorithm(config).needs_rewards:
        free.add("rewards")  # they score what was trained, and change nothing of it
    found = config.model_dump(mode="json", exclude=free)
    if config.prompts:  # without those that are only scored; a checkpoint holds the digests of the others
        found["prompts"] = {"train": config.drawn} if config.drawn else None
    return found


def anchored(config: Config) -> Config:
    """Local paths made absolute: workers of a Ray that was there before us have another working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path.partition("/")[0] != "world" and Path(path).exists() else path

    teachers = {
        name: teacher.model_copy(update={"lora" if teacher.lora else "model": absolute(teacher.path)})
        for name, teacher in config.teachers.items()
    }
    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    student, lora = config.student, config.student.lora
    if lora is not None and lora.start is not None:
        student = student.model_copy(update={"lora": lora.model_copy(update={"start": absolute(lora.start)})})
    recorded = absolute(config.recorded) if config.recorded else None
    pairs = config.pairs and config.pairs.model_copy(update={"files": tuple(map(absolute, config.pairs.files))})
    placed = {"teachers": teachers, "model": model, "student": student, "recorded": recorded, "pairs": pairs}
    return config.model_copy(update=placed)
