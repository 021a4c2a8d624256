"""What Diffusion-DPO and offline PSO share: two images of a prompt, noised alike, and how well each is predicted.

Both images of a pair get the same noise at the same time: what the predictions' errors then differ by is the images.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_ray.algorithms.advantages import preferences
from opd_ray.algorithms.base import Algorithm, Forward
from opd_ray.config import NoisedPairsConfig
from opd_ray.diffusion import add_noise, over_samples
from opd_ray.errors import ConfigError
from opd_ray.seeds import fold, noise
from opd_ray.types import Conditioning, Experience, Trajectory

__all__ = ["Errors", "NoisedPairs", "drawn_images", "errors"]


END = 1e-3
"""Nearer to a picture there is nothing to predict."""


class Pairs(NamedTuple):
    """Clean latents [P, C, H, W] of the better and the worse images, and their prompts' conditioning."""

    better: Tensor
    worse: Tensor
    cond: Conditioning
    empty: Conditioning
    decided: Tensor
    """[P]: 0 where the two are equally good."""


class Errors(NamedTuple):
    """Mean squared errors [P], of the better images and of the worse ones."""

    better: Tensor
    worse: Tensor
    reference_better: Tensor
    reference_worse: Tensor
    gain_better: Tensor
    """The student's minus the reference's, from the difference of their predictions."""
    gain_worse: Tensor


class NoisedPairs(Algorithm):
    """Pairs of a data set, or of the student's own drawings with rewards to say which is better."""

    velocities: tuple[str, ...] = ("reference",)
    guided = False
    worse = True
    """Whether the worse image is looked at."""

    def __init__(self, config: NoisedPairsConfig) -> None:
        self.settings = config
        online = config.pairs == "online"
        self.needs_rollouts = self.needs_rewards = online
        self.streams = not online
        self.kernel, self.noise_level = config.kernel, config.noise_level
        self.task_weights = config.task_weights

    @property
    def space(self) -> str:
        """As asked for, or the network's own: a table of training times is that of one that predicts noise."""
        return self.settings.space or ("eps" if self.facts.times else "velocity")

    def weight(self, t: Tensor) -> Tensor:
        """What makes an error of the velocity one of that space; t is [B, 1, 1, 1]."""
        return {"velocity": torch.ones_like(t), "eps": (1 - t).square(), "x0": t.square()}[self.space]

    def check(self, sigmas: Tensor) -> None:
        """Images to compare come in pairs, and captions can be dropped where there is an empty one."""
        settings, name = self.settings, self.settings.name  # type: ignore[attr-defined]  # of every subclass
        if settings.pairs == "online" and self.facts.images_per_prompt < 2:
            raise ConfigError(
                f"algorithm {name} compares images of one prompt, and batch.images_per_prompt is "
                f"{self.facts.images_per_prompt}; set it to 2 or more, or give recorded pairs"
            )
        if settings.pairs == "online" and settings.caption_dropout:
            raise ConfigError("algorithm.caption_dropout needs recorded pairs; set it to 0, or pairs: recorded")
        if settings.space == "eps" and settings.times == "steps" and float(sigmas[0]) >= 1:
            raise ConfigError(
                f"algorithm {name}: errors of the noise vanish at t = 1, which is one of this model's steps; set "
                "algorithm.space: velocity"
            )

    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """The student at the noised images of each draw: the better ones, then the worse ones."""
        pairs, item = self._pairs(experience), experience.item
        shape, device = pairs.better.shape, pairs.better.device
        for draw in range(self.settings.draws):
            names = (item.round, item.task, item.index, update, draw)
            rows = [fold(self.facts.seed, "learner_noise", *names, row) for row in range(len(pairs.better))]
            eps = noise(rows, shape[1:]).to(device)
            t, dropped = (one.to(device) for one in self._times_and_drops(rows))
            x0 = torch.cat([pairs.better, pairs.worse]) if self.worse else pairs.better
            copies = len(x0) // len(eps)
            t, dropped, both = t.repeat(copies), dropped.repeat(copies), torch.cat([eps] * copies)
            cond = {
                name: torch.where(over(dropped, tensor), pairs.empty[name], tensor) if bool(dropped.any()) else tensor
                for name, one in pairs.cond.items()
                for tensor in [torch.cat([one] * copies)]
            }
            inputs = {"target": both - x0, "decided": pairs.decided.repeat(copies)}
            yield Forward(add_noise(x0, both, t), t, torch.zeros_like(t), draw, cond, {}, inputs)

    def _pairs(self, experience: Experience) -> Pairs:
        if experience.trajectory is not None:
            return self._drawn(experience)
        recorded = experience.recorded
        cond, empty = (
            {name.removeprefix(prefix): one for name, one in recorded.items() if name.startswith(prefix)}
            for prefix in ("cond.", "empty.")
        )
        better = recorded["winner"]
        return Pairs(better, recorded["loser"], cond, empty, torch.ones(len(better), device=better.device))

    def _drawn(self, experience: Experience) -> Pairs:
        """Best and worst image of each prompt."""
        path, scores = experience.trajectory, {name: one.cpu() for name, one in experience.scores.items()}
        assert path is not None
        found = preferences(
            experience.item, scores, self.settings.reward_weights, self.facts.images_per_prompt, pareto=False
        ).to(path.latents.device)
        images, best = drawn_images(path), found[:, 0]
        cond = {name: tensor[best] for name, tensor in path.cond.items()}
        return Pairs(images[best], images[found[:, 1]], cond, path.uncond, found[:, 2].float())

    def _times_and_drops(self, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """The time of each pair [P], and whether its caption is dropped [P]."""
        settings, times, drops = self.settings, list[float](), list[bool]()
        known = self.facts.sigmas[:-1] if settings.times == "steps" else self.facts.times
        for seed in seeds:
            rng = np.random.default_rng((seed, 1))
            if settings.times == "steps" or (settings.times == "model" and known):
                times.append(known[int(rng.integers(len(known)))])
            elif settings.times == "uniform":
                times.append(float(rng.uniform(END, 1)))
            else:
                times.append(float(1 / (1 + np.exp(-rng.standard_normal()))))
            drops.append(bool(rng.random() < settings.caption_dropout))
        return torch.tensor(times, dtype=torch.float32), torch.tensor(drops)

    def errors(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Errors:
        """Of student and reference, in the space that the configuration names."""
        weight = self.weight(over_samples(forward.t, forward.x))
        return errors(velocity["student"], velocity["reference"], forward.inputs["target"], weight)

    def error(self, forward: Forward, velocity: Tensor) -> Tensor:
        """Of one policy, at each image of a forward."""
        squared = (velocity - forward.inputs["target"]).square()
        return (self.weight(over_samples(forward.t, forward.x)) * squared).flatten(1).mean(1)


def errors(student: Tensor, reference: Tensor, target: Tensor, weight: Tensor) -> Errors:
    """Squared errors of two predictions of one target, and how they differ.

    e_s - e_r = mean(w (v_s - v_r) (v_s + v_r - 2 v)): exactly 0 where the two predictions are equal.

    Args:
        student: [2 P, C, H, W] velocities, those of the better images first.
        reference: the same shape; a constant.
        target: eps - x0, the same shape.
        weight: [2 P, 1, 1, 1]; (1 - t)^2 gives errors of the noise, t^2 those of the clean prediction.
    """
    reference = reference.detach()
    gain = (weight * (student - reference) * (student + reference - 2 * target)).flatten(1).mean(1)
    of_reference = (weight * (reference - target).square()).flatten(1).mean(1)
    of_student = (weight * (student.detach() - target).square()).flatten(1).mean(1)
    return Errors(*of_student.chunk(2), *of_reference.chunk(2), *gain.chunk(2))


def drawn_images(path: Trajectory) -> Tensor:
    """Clean latents [B, C, H, W] of a whole drawing.

    A path that ends above 0 ends in a little noise, at the size of that time; recorded images are whole.
    """
    end = float(path.sigmas[-1])
    return path.state(path.last) / math.hypot(1 - end, end)


def over(rows: Tensor, tensor: Tensor) -> Tensor:
    """A flag of each row, shaped to choose among whole rows."""
    return rows.reshape(-1, *[1] * (tensor.ndim - 1))
