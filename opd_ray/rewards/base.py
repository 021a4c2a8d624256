"""A reward: pictures and prompts to numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from opd_ray.errors import ConfigError
from opd_ray.plugins import check_arguments, load

__all__ = ["REWARDS", "Reward", "check_rewards", "make_rewards"]

REWARDS = {
    "compose": "opd_ray.world.scorers:compose",
    "compose_partial": "opd_ray.world.scorers:compose_partial",
    "text": "opd_ray.world.scorers:text",
    "look": "opd_ray.world.scorers:look",
}


class Reward(Protocol):
    """Any callable of this shape; a class with arguments is made once a worker."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; NaN where the reward does not apply to a prompt."""
        ...


def make_rewards(rewards: Mapping[str, Mapping[str, Any]]) -> dict[str, Reward]:
    """Rewards by name: built-in names, or package.module:attr with its keyword arguments."""
    made: dict[str, Reward] = {}
    for name, args in rewards.items():
        reward = load(name, REWARDS, "reward")
        if isinstance(reward, type) or args:
            check_arguments(reward, args, f"rewards.{name}")
            reward = reward(**args)
        made[name] = reward
    return made


def check_rewards(
    rewards: Mapping[str, Mapping[str, Any]],
    by_task: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
) -> None:
    """Refuse unknown rewards and arguments, and held-out tasks that no reward scores.

    Raises:
        ConfigError: which, and what is there.
    """
    for name, args in rewards.items():
        reward = load(name, REWARDS, "reward")
        if isinstance(reward, type) or args:
            check_arguments(reward, args, f"rewards.{name}")
    for task in tasks:
        for name in by_task.get(task, (task,)):
            if name not in rewards:
                raise ConfigError(
                    f"held-out task {task!r} is scored by {name!r}, which is not among rewards "
                    f"({', '.join(rewards) or 'none'}); add it there or name another in evaluation.rewards.{task}"
                )
