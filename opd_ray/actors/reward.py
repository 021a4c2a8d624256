"""The reward actor: pictures and their prompts in, one number a picture out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_ray.rewards.base import Reward

__all__ = ["RewardActor"]


class RewardActor:
    """Holds the reward functions of a run."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = rewards

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Reward name -> [B] float32; NaN where a reward does not apply to a prompt.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts.

        Raises:
            ValueError: a reward answered with another shape, or not with numbers.
        """
        scores = {}
        for name, reward in self.rewards.items():
            score = torch.as_tensor(reward(images, list(prompts)), dtype=torch.float32)
            if score.shape != (len(prompts),) or score.isinf().any():
                raise ValueError(
                    f"reward {name} answered {tuple(score.shape)} for {len(prompts)} pictures, or infinity"
                )
            scores[name] = score
        return scores
