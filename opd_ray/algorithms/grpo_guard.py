"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO whose clip is as tight at every step, and on both sides.

A step's log-ratio is -|D|^2 / (2 std^2) - D eps / std with D = mu_drawn - mu_student: its mean is below 0, its spread
another at each step, and one clip range hardly ever holds what grows likelier. RatioNorm takes off the bias and the
step's part of the spread; and since a step's mean moves by dt of the velocity, the loss is divided by that:

    log r = std (log p_student / p_drawn + mean(D^2) / (2 std^2)) = -mean(D eps)
    L = E [ max(-A r, -A clip(r, 1 - c, 1 + c)) / |dt| + kl |dt| KL(p_student || p_start) ]

Advantages, KL and everything else are Flow-GRPO's.
"""

from typing import ClassVar

from torch import Tensor

from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.diffusion import normalised_log_ratio

__all__ = ["GrpoGuard"]


class GrpoGuard(FlowGrpo):
    """Flow-GRPO with normalised ratios and evened steps."""

    evened: ClassVar[bool] = True

    @staticmethod
    def ratio(x_next: Tensor, mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
        """RatioNorm's."""
        return normalised_log_ratio(x_next, mean, other, std)
