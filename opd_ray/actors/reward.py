"""The reward actor: pictures and their prompts in, one number a picture out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_ray.errors import RewardError
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
            RewardError: a reward answered with another shape, or not with numbers.
        """
        scores = {}
        for name, reward in self.rewards.items():
            answer = reward(images, list(prompts))
            try:
                score = torch.as_tensor(answer, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                raise RewardError(f"reward {name} answered {answer!r}, expected [{len(prompts)}] numbers") from None
            if score.shape != (len(prompts),):
                raise RewardError(
                    f"reward {name} answered {list(score.shape)}, expected [{len(prompts)}], a number a picture"
                )
            if score.isinf().any():
                raise RewardError(f"reward {name} answered infinity; NaN is for pictures that it does not apply to")
            scores[name] = score
        return scores
