"""Denoising diffusion policy optimization, importance sampled (DDPO-IS, arXiv 2305.13301 Eq. 6).

Each step of a drawing is an action, and the reward of its picture the reward of each of them:

    L = E max(-A r, -A clip(r, 1 - c, 1 + c)),    r = p_student(x' | x) / p_drawn(x' | x),

with A the reward whitened by the last ones of its prompt. Log-ratios are means over C, H, W, which the published clip
ranges are for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_ray.algorithms.advantages import PromptStatistics, combined
from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Stepwise
from opd_ray.config import DdpoConfig
from opd_ray.diffusion import clipped_surrogate
from opd_ray.types import Experience, WorkItem

__all__ = ["Ddpo"]


class Ddpo(Stepwise):
    """The baseline of reward learning: one reward a picture, every step alike."""

    needs_velocities: ClassVar[bool] = True

    def __init__(self, config: DdpoConfig) -> None:
        super().__init__(config)
        self.config = config
        self._statistics = PromptStatistics(config.buffer, config.buffer_least)
        self._advantages: dict[int, Tensor] = {}

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Whiten the round's rewards by the last ones of their prompts."""
        rewards = torch.cat([combined(item, found, self.settings.reward_weights) for item, found in scores])
        prompts = [prompt for item, _ in scores for prompt in item.prompts]
        whitened = self._statistics.advantages(prompts, rewards[:, None])
        parts = whitened.split([len(item.prompts) for item, _ in scores])
        self._advantages = {item.position: part for (item, _), part in zip(scores, parts, strict=True)}

    def inputs(self, experience: Experience) -> Mapping[str, Tensor]:
        """What the drawing's policy would have done, and the picture's advantage at every step."""
        path = experience.trajectory
        assert path is not None and path.velocities is not None
        limit = self.config.advantage_clip
        advantage = self._advantages[experience.item.position].to(path.latents.device).clamp(-limit, limit)
        return {"drawn": path.velocities, "advantage": advantage.expand(-1, len(path.sigmas) - 1)}

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Eq. 6, mean over the batch."""
        ratio, clip = self.log_ratio(forward, velocity["student"], forward.inputs["drawn"]), self.config.clip_range
        drift = self.require_same_policy(forward, ratio, clip)
        value = clipped_surrogate(ratio, forward.inputs["advantage"], clip).mean()
        clipped = (ratio.detach().expm1().abs() > clip).float().mean()
        return Loss(value, {"ratio": drift, "clipped": clipped})

    def state_dict(self) -> dict[str, Any]:
        """The last rewards of each prompt."""
        return {"rewards": self._statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._statistics.load_state_dict(state.get("rewards", {}))  # --force may come from another algorithm
