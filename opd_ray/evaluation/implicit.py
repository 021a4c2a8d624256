"""Implicit reward accuracy (Diffusion-DPO, arXiv 2311.12908, Table 2): how often a model prefers the better image.

What a model that was aligned likes is in its predictions: the better image of a pair is the likelier one to it,
compared with the model that it started from, if its error there fell by more than at the worse one. Over several times
and noises, which the two images share:

    h = mean over (t, eps) of -1/2 [(e_s^w - e_r^w) - (e_s^l - e_r^l)],     right where h > 0
"""

from collections.abc import Iterable

import torch

from opd_ray.algorithms.noised_pairs import NoisedPairs
from opd_ray.evaluation.statistics import mean
from opd_ray.models.base import Family
from opd_ray.types import Experience

__all__ = ["implicit_accuracy"]


@torch.no_grad()
def implicit_accuracy(
    family: Family, adapter: str, algorithm: NoisedPairs, items: Iterable[Experience], start: str | None = None
) -> dict[str, float | None]:
    """The share of pairs whose better image the adapter prefers.

    Args:
        family: with the adapter on it.
        adapter: what is asked.
        algorithm: times, space, seed and number of draws.
        items: recorded pairs, as a learner gets them.
        start: the adapter that it began as; None began as the family without any.

    Returns:
        Value, 95 % interval and number of pairs, as ``mean``. A pair to which it is indifferent is half right.
    """
    right: list[float] = []
    for experience in items:
        preferred = torch.zeros(len(experience.recorded["winner"]))
        for forward in algorithm.forwards(experience, 0):
            velocities = {}
            for name, policy in (("student", adapter), ("reference", start)):
                with family.adapter(policy):
                    velocities[name] = family.velocity(forward.x, forward.t, forward.cond, {}, 1.0)
            found = algorithm.errors(forward, velocities)
            preferred += (found.gain_worse - found.gain_better).cpu()
        right += ((preferred > 0).float() + 0.5 * (preferred == 0).float()).tolist()
    return mean(right)
