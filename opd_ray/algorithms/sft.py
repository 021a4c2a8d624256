"""Supervised fine-tuning on recorded drawings: flow matching (arXiv 2210.02747) on what the teachers drew.

    L = E_{x0 ~ recorded, t, eps} w(t) |v(x_t) - (eps - x0)|^2      x_t = (1 - t) x0 + t eps

mean over C, H, W, the images and their draws of (t, eps). w(t) is 1 for errors of the velocity. The prediction is the
plain conditional one; what a teacher drew with guidance is learned in place of guidance.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.noised_pairs import NoisedPairs, Pairs
from opd_ray.config import SftConfig
from opd_ray.types import Experience

__all__ = ["Sft"]


class Sft(NoisedPairs):
    """Learns pictures, whoever drew them."""

    velocities = ()
    worse = False

    def __init__(self, config: SftConfig) -> None:
        super().__init__(config)

    def _pairs(self, experience: Experience) -> Pairs:
        recorded = experience.recorded
        if "latents" not in recorded:  # preference pairs
            return super()._pairs(experience)
        end = float(recorded["sigmas"][-1])  # a path that ends above 0 ends in a little noise
        images = recorded["latents"][:, -1] / math.hypot(1 - end, end)
        cond, empty = (
            {name.removeprefix(prefix): one for name, one in recorded.items() if name.startswith(prefix)}
            for prefix in ("cond.", "empty.")
        )
        return Pairs(images, images, cond, empty, torch.ones(len(images), device=images.device))

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """The error of each image, mean over the batch."""
        error = self.error(forward, velocity["student"]).mean()
        return Loss(error, {"error": error.detach()})
