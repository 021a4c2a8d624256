"""A reward: pictures and prompts to numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from opd_ray.errors import ConfigError
from opd_ray.plugins import check_arguments, check_construction, load

__all__ = ["REWARDS", "Reward", "check_rewards", "make_rewards"]

REWARDS = {
    "compose": "opd_ray.world.scorers:compose",
    "compose_partial": "opd_ray.world.scorers:compose_partial",
    "text": "opd_ray.world.scorers:text",
    "look": "opd_ray.world.scorers:look",
    "ocr": "opd_ray.rewards.ocr:Ocr",
    "ocr_exact": "opd_ray.rewards.ocr:OcrExact",
    "geneval": "opd_ray.rewards.geneval:GenEval",
    "geneval_strict": "opd_ray.rewards.geneval:GenEvalStrict",
    "geneval_partial": "opd_ray.rewards.geneval:GenEvalPartial",
    "jpeg_compressibility": "opd_ray.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "opd_ray.rewards.jpeg:JpegIncompressibility",
}


class Reward(Protocol):
    """A function of this shape, or a class whose objects are called like one; it is made once a worker."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; NaN where the reward does not apply to a prompt."""
        ...


def make_rewards(rewards: Mapping[str, Mapping[str, Any]]) -> dict[str, Reward]:
    """Rewards by name; a class is made with its keyword arguments, a function is called with them every time."""
    made: dict[str, Reward] = {}
    for name, args in rewards.items():
        reward = load(name, REWARDS, "reward")
        _check_arguments(name, reward, args)
        made[name] = reward(**args) if isinstance(reward, type) else partial(reward, **args)
    return made


def check_rewards(
    rewards: Mapping[str, Mapping[str, Any]],
    by_task: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
) -> None:
    """Refuse unknown rewards and arguments, held-out tasks that no reward scores, and scores of tasks without prompts.

    Raises:
        ConfigError: which, and what is there.
    """
    for name, args in rewards.items():
        reward = load(name, REWARDS, "reward")
        _check_arguments(name, reward, args)
    for task in by_task:
        if task not in tasks:
            raise ConfigError(
                f"evaluation.rewards.{task}: there are no held-out prompts of that task; prompts.eval has "
                f"{', '.join(tasks) or 'none'}. Add them or remove the entry"
            )
    for task in tasks:
        for name in by_task.get(task, (task,)):
            if name not in rewards:
                raise ConfigError(
                    f"held-out task {task!r} is scored by {name!r}, which is not among rewards "
                    f"({', '.join(rewards) or 'none'}); add it there or name another in evaluation.rewards.{task}"
                )


def _check_arguments(name: str, reward: Any, args: Mapping[str, Any]) -> None:
    where = f"rewards.{name}"
    if isinstance(reward, type):
        check_construction(reward, args, where)
    else:
        check_arguments(reward, args, where)
