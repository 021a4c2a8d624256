"""Stepwise diffusion policy optimization (SDPO, arXiv 2411.11727): rewards at every step, differences within pairs.

Two images a and b of a prompt begin with the same noise. Each of their clean predictions x0_i = x_i - t_i v_i is an
image in its own right, so few steps will do as well. Three of them are scored: the first, the last, and the anchor,
which is least like these two; the others' rewards are interpolated by cosine similarity:

    R_i = sum_k s_k(i) R_k / sum_k s_k(i),  k in {first, anchor, last},   G_i = R_i + gamma G_{i+1}

A is G whitened by the last ones of the same prompt and step. With d = rho_a - rho_b the difference of log-ratios to the
policy that drew, and clip(d) that of log-ratios clipped to +-c:

    L_i = E max((w_i d - dA)^2, (w_i clip(d) - dA)^2),   dA = clip(A_a) - clip(A_b),   w_i = lambda^i / eta_s

Steps are trained on in an order of their own for each pair (step-shuffled updates).
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from opd_ray.algorithms.advantages import combined, over_scored
from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Whitened
from opd_ray.config import SdpoConfig
from opd_ray.diffusion import x0_from_velocity
from opd_ray.errors import ConfigError
from opd_ray.types import Trajectory, WorkItem

__all__ = ["Sdpo", "discounted", "interpolation", "reward_difference"]

SHARES = "shares"
"""What is told of a drawing beside its scores."""
LEAST_SIMILARITY = 1e-3
"""Cosines may be negative, and their sum then zero."""


class Sdpo(Whitened):
    """Learns few-step quality from many-step drawings."""

    remembered = "returns"
    paired: ClassVar[bool] = True
    shared_noise = True
    pictures = 3

    def __init__(self, config: SdpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def check(self, sigmas: Tensor) -> None:
        """As ``Stepwise``, and images come in pairs."""
        super().check(sigmas)
        if self.facts.images_per_prompt % 2:
            raise ConfigError(
                f"algorithm sdpo_stepwise compares pairs, and batch.images_per_prompt is "
                f"{self.facts.images_per_prompt}; set it to 2, or another even number"
            )

    def pictured(self, trajectory: Trajectory) -> Tensor:
        """The clean predictions at the first step, at the anchor and at the last: [B, 3, C, H, W]."""
        x0 = clean_predictions(trajectory)
        rows = torch.arange(len(x0), device=x0.device)
        return torch.stack([x0[:, 0], x0[rows, anchor(x0)], x0[:, -1]], dim=1)

    def remarks(self, trajectory: Trajectory) -> dict[str, "array[float]"]:
        """The shares of the three rewards at each step."""
        return {SHARES: array("f", interpolation(clean_predictions(trajectory)).flatten().tolist())}

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Interpolate, sum up and whiten the round's rewards."""
        returns = list[tuple[WorkItem, Tensor]]()
        for item, found in scores:
            three = combined(item, {n: one for n, one in found.items() if n != SHARES}, self.config.reward_weights)
            shares = found[SHARES].reshape(len(item.prompts), -1, 3).double()  # float32 shares add up to 1 but for 6e-8
            rewards = (shares * three[:, None]).sum(-1) / shares.sum(-1)
            # Where a reward failed on one of a pair, there is no difference to learn from.
            failed = rewards.isnan().any(1).reshape(-1, 2).any(1).repeat_interleave(2)
            rewards[failed] = float("nan")
            returns.append((item, discounted(rewards, self.config.gamma)))
        self.whiten(returns)

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """The regression of reward differences at one step of each pair, mean over the pairs that have scores."""
        ratio = self.log_ratio(forward, velocity["student"], forward.inputs["drawn"])
        drift, refused = self.drift(forward, ratio, self.config.clip_range)
        each = reward_difference(
            ratio,
            forward.inputs["advantage"],
            self.config.step_decay ** forward.inputs["step"][::2] / self.config.log_scale,
            self.config.clip_range,
        )
        clipped = (ratio.detach().abs() > self.config.clip_range).float().mean()
        return Loss(over_scored(each, forward.inputs["scored"][::2]), {"ratio": drift, "clipped": clipped}, refused)


def clean_predictions(trajectory: Trajectory) -> Tensor:
    """x0 at every step of a whole drawing, [B, N, C, H, W]."""
    assert trajectory.velocities is not None
    steps = trajectory.velocities.shape[1]
    found = [
        x0_from_velocity(trajectory.latents[:, j], trajectory.velocities[:, j], float(trajectory.sigmas[j]))
        for j in range(steps)
    ]
    return torch.stack(found, dim=1)


def anchor(x0: Tensor) -> Tensor:
    """The step [B] whose clean prediction is least like the first and the last one together."""
    return (_similarity(x0, x0[:, 0]) + _similarity(x0, x0[:, -1])).argmin(1)


def interpolation(x0: Tensor) -> Tensor:
    """Shares [B, N, 3] of the first, the anchor's and the last reward at each step; exactly one at its own.

    Args:
        x0: [B, N, C, H, W], clean predictions in the order of drawing.
    """
    rows, middle = torch.arange(len(x0)), anchor(x0).cpu()
    ends = (x0[:, 0], x0[rows, middle], x0[:, -1])
    similar = torch.stack([_similarity(x0, one) for one in ends], dim=-1).cpu().clamp(min=LEAST_SIMILARITY)
    shares = similar / similar.sum(-1, keepdim=True)
    own = torch.eye(3)
    shares[rows, middle] = own[1]
    shares[:, 0], shares[:, -1] = own[0], own[2]
    return shares


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """G_i = R_i + gamma G_{i+1} over the steps of [B, N]."""
    found = rewards.clone()
    for i in reversed(range(found.shape[1] - 1)):
        found[:, i] += gamma * found[:, i + 1]
    return found


def reward_difference(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip: float) -> Tensor:
    """max((w d - dA)^2, (w clip(d) - dA)^2) of each pair.

    Args:
        log_ratio: [2 P], to the policy that drew; the two of a pair are neighbours.
        advantage: [2 P].
        weight: [P].
        clip: of each log-ratio; 0: the first square alone.

    Returns:
        [P].
    """
    target = advantage[::2] - advantage[1::2]
    plain = (weight * (log_ratio[::2] - log_ratio[1::2]) - target).square()
    if not clip:
        return plain
    held = log_ratio.clamp(-clip, clip)
    return torch.maximum(plain, (weight * (held[::2] - held[1::2]) - target).square())


def _similarity(x0: Tensor, other: Tensor) -> Tensor:
    """Cosine [B, N] of each step's clean prediction with one of each row."""
    return cosine_similarity(x0.flatten(2), other.flatten(1)[:, None], dim=-1)
