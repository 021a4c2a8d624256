"""Flow-GRPO (arXiv 2505.05470): each step of a drawing is an action, and a prompt's images are each other's baseline.

With A the advantage within the group (Eq. 4), clipped to +-a, and r = p_student(x' | x) / p_drawn(x' | x),

    L = E [ max(-A r, -A clip(r, 1 - c, 1 + c)) + kl w KL(p_student || p_start) ]             (Eq. 5)

over images and trained steps; an image on which a reward failed is in no mean. Log-ratios are means over C, H, W, which
the published clip ranges are for, and so is the KL, |mu - mu_start|^2 / (2 std^2). The published code leaves |dt| out
of an SDE's std^2 = sigma^2 |dt|, which weighs each step by w = |dt|; the published weights are for that, so it is
written out here. A step of `cps` or `ddim` is no SDE's: its std has no |dt| that the code could leave out, and w is 1.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from opd_ray.algorithms.advantages import Groups, over_scored
from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Compared
from opd_ray.config import FlowGrpoConfig, GrpoGuardConfig
from opd_ray.diffusion import clipped_surrogate, gaussian_kl
from opd_ray.types import WorkItem

__all__ = ["FlowGrpo"]

SDES = ("flow", "dance")
"""Kernels whose variance is that of a unit of time, times the step's length."""


class FlowGrpo(Compared):
    """Clipped policy gradients, with what was drawn for the same prompt as the baseline."""

    evened: ClassVar[bool] = False
    """Each step's policy loss is divided by its length."""

    def __init__(self, config: FlowGrpoConfig | GrpoGuardConfig) -> None:
        super().__init__(config)
        self.config = config
        self.groups = Groups(config, config.reward_weights)
        self.velocities = ("reference",) if config.kl else ()

    def check(self, sigmas: Tensor) -> None:
        """As ``Stepwise``, and groups have two images at least."""
        super().check(sigmas)
        self.groups.check(self.config.name, self.facts.images_per_prompt)

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Compare the round's rewards within their groups."""
        self.groups.observe(scores)

    def known(self, item: WorkItem) -> Mapping[str, Tensor]:
        """Advantages, which groups tie, and which images have a score."""
        return {name: one[:, None] for name, one in self.groups.known(item)._asdict().items()}

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Eq. 5 at one step of each image, mean over those of the batch that have a score."""
        scored = forward.inputs["scored"]
        ratio, clip = self.log_ratio(forward, velocity["student"], forward.inputs["drawn"]), self.config.clip_range
        drift, refused = self.drift(forward, ratio, clip)
        length = torch.as_tensor(forward.t - forward.t_next)  # |dt|, [B] or one number
        each = clipped_surrogate(ratio, forward.inputs["advantage"], clip)
        value = over_scored(each / length if self.evened else each, scored)
        told = {
            "ratio": drift,
            "clipped": (ratio.detach().expm1().abs() > clip).float().mean(),
        }
        if bool(scored.any()):
            told["ties"] = over_scored(forward.inputs["tied"], scored)
        if self.config.kl:
            kl = self._divergence(forward, velocity["student"], velocity["reference"])
            weighted = length * kl if self.kernel in SDES else kl
            value = value + self.config.kl * over_scored(weighted, scored)
            told["kl"] = over_scored(kl.detach(), scored)
        return Loss(value, told, refused)

    def _divergence(self, forward: Forward, student: Tensor, start: Tensor) -> Tensor:
        """The KL [B] of the student's step from the frozen start's, a mean over C, H, W."""
        mine, theirs = self.both(forward, student, start)
        return gaussian_kl(mine.mean, theirs.mean, mine.std, reduction="mean")
