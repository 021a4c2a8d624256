"""Denoising diffusion policy optimization, importance sampled (DDPO-IS, arXiv 2305.13301 Eq. 6).

Each step of a drawing is an action, and the reward of its picture the reward of each of them:

    L = E max(-A r, -A clip(r, 1 - c, 1 + c)),    r = p_student(x' | x) / p_drawn(x' | x),

with A the reward whitened by the last ones of its prompt. Log-ratios are means over C, H, W, which the published clip
ranges are for.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from opd_ray.algorithms.advantages import combined, over_scored
from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Whitened
from opd_ray.config import DdpoConfig
from opd_ray.diffusion import clipped_surrogate
from opd_ray.types import WorkItem

__all__ = ["Ddpo"]


class Ddpo(Whitened):
    """The baseline of reward learning: one reward a picture, every step alike."""

    remembered = "rewards"

    def __init__(self, config: DdpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Whiten the round's rewards by the last ones of their prompts."""
        weights = self.config.reward_weights
        self.whiten([(item, combined(item, found, weights)[:, None]) for item, found in scores])

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Eq. 6, mean over those of the batch that have a score."""
        ratio, clip = self.log_ratio(forward, velocity["student"], forward.inputs["drawn"]), self.config.clip_range
        drift, refused = self.drift(forward, ratio, clip)
        each = clipped_surrogate(ratio, forward.inputs["advantage"], clip)
        clipped = (ratio.detach().expm1().abs() > clip).float().mean()
        return Loss(over_scored(each, forward.inputs["scored"]), {"ratio": drift, "clipped": clipped}, refused)
