"""DiffusionNFT (arXiv 2509.16117): reinforcement on the forward process, without likelihoods or noise in drawings.

The adapter `old` draws, and follows the student slowly. An image x0 of it counts as good with probability
r = 1/2 + 1/2 clip(A / a, -1, 1), A its advantage within its group and a the clip (Sec. 3.3). Noised to
x_t = (1 - t) x0 + t eps, with v = eps - x0, the student stands for two policies at once, of which one is drawn to good
and one to bad images:

    v+ = (1 - beta) v_old + beta v_student,   v- = (1 + beta) v_old - beta v_student
    L  = a / beta E [r e(v+) + (1 - r) e(v-)] + kl E |v_student - v_start|^2                    (Eq. 5)

    adaptive   e(u) = |x(u) - x0|^2 / sg(mean |x(u) - x0|),  x(u) = x_t - t u                   (Sec. 3.3)
    plain      e(u) = |u - v|^2

so that the best student is v_old plus 2 / beta times the way to better images (Eq. 6). Squares are means over C, H, W.
The factor a / beta is the published code's. Images that tie have r = 1/2, which draws the student to `old`. One on
which a reward failed is in no mean: a work item's loss is that of its other images.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from opd_ray.algorithms.advantages import Groups, over_scored
from opd_ray.algorithms.base import Algorithm, Forward, Loss, first_steps, part_of
from opd_ray.algorithms.noised_pairs import drawn_images
from opd_ray.config import NftConfig
from opd_ray.diffusion import add_noise, over_samples
from opd_ray.errors import ConfigError
from opd_ray.seeds import fold, generator, noise
from opd_ray.types import Experience, WorkItem

__all__ = ["DiffusionNft", "branch_errors"]

LEAST = 1e-5
"""Of the mean absolute error that an error is divided by."""


class DiffusionNft(Algorithm):
    """Learns from the images of `old` alone, whatever drew them."""

    behaviour: ClassVar[str] = "old"
    adapters: ClassVar[tuple[str, ...]] = ("old",)
    needs_rewards = True

    def __init__(self, config: NftConfig) -> None:
        self.config = config
        self.groups = Groups(config, config.reward_weights)
        self.velocities = ("old", "reference") if config.kl else ("old",)
        self.kernel, self.noise_level = config.kernel, config.noise_level
        self.task_weights = config.task_weights
        self.updates_per_round = config.item_parts

    def check(self, sigmas: Tensor) -> None:
        """The kernel takes the noise level, groups have two images, and what drew them is still there."""
        for _ in self.transitions(sigmas):
            pass
        self.groups.check(self.config.name, self.facts.images_per_prompt)
        if self.facts.max_staleness:
            raise ConfigError(
                f"algorithm {self.config.name} compares with the adapter that drew, and the learner has the newest one "
                f"alone; set cluster.max_staleness (now {self.facts.max_staleness}) to 0, or use flow_grpo"
            )
        self._count(len(sigmas) - 1)

    def select(self, items: Sequence[WorkItem], update: int) -> Sequence[WorkItem]:
        """The part whose turn it is."""
        return part_of(items, update, self.config.item_parts)

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Compare the round's rewards within their groups."""
        self.groups.observe(scores)

    def follow(self, adapter: str, round: int) -> float:
        """The published schedules, by the number of optimizer steps so far."""
        steps = (round + 1) * self.updates_per_round
        match self.config.decay:
            case "copy":
                return 0.0
            case "linear_to_0_5":
                return min(0.001 * steps, 0.5)
            case "delayed_to_0_999":
                return min(0.0075 * max(steps - 75, 0), 0.999)

    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """The student at the images, each noised to times of its own."""
        path, item = experience.trajectory, experience.item
        assert path is not None
        x0, device = drawn_images(path), path.latents.device
        standing = self.groups.known(item)
        good = 0.5 + 0.5 * (standing.advantage / self.config.advantage_clip)  # the advantage is within the clip
        known = {"good": good.to(device), "tied": standing.tied.to(device), "scored": standing.scored.to(device)}
        orders = self._orders(item)
        for place in range(orders.shape[1]):
            seeds = [
                fold(self.facts.seed, "learner_noise", item.round, item.task, item.index, place, row)
                for row in range(len(x0))
            ]
            eps, t = noise(seeds, x0.shape[1:]).to(device), path.sigmas[orders[:, place]].to(device)
            inputs = known | {"target": eps - x0}
            yield Forward(add_noise(x0, eps, t), t, torch.zeros_like(t), place, path.cond, path.uncond, inputs)

    def _count(self, num_steps: int) -> int:
        """To how many times each image is noised."""
        return len(first_steps(num_steps, self.config.timestep_fraction))

    def _orders(self, item: WorkItem) -> Tensor:
        """The steps [B, T] to whose times each row is noised."""
        steps, count, found = torch.tensor(item.steps), self._count(len(item.steps)), []
        for row in range(len(item.prompts)):
            rng = generator(self.facts.seed, "order", "times", item.round, item.position, row)
            found.append(steps[torch.randperm(len(steps), generator=rng)[:count]])
        return torch.stack(found)

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Eq. 5 at one time of each image, mean over those of the batch that have a score."""
        student, config = velocity["student"], self.config
        good, scored = forward.inputs["good"], forward.inputs["scored"]
        positive, negative = branch_errors(
            student,
            velocity["old"],
            forward.inputs["target"],
            config.beta,
            times=over_samples(forward.t, forward.x) if config.weighting == "adaptive" else None,
        )
        value = config.advantage_clip / config.beta * over_scored(good * positive + (1 - good) * negative, scored)
        told = {
            "error_good": over_scored(positive.detach(), scored),
            "error_bad": over_scored(negative.detach(), scored),
            "ties": over_scored(forward.inputs["tied"], scored),
        }
        if config.kl:
            drift = over_scored((student - velocity["reference"]).square().flatten(1).mean(1), scored)
            value, told = value + config.kl * drift, told | {"drift": drift.detach()}
        return Loss(value, told if bool(scored.any()) else {})


def branch_errors(
    student: Tensor, old: Tensor, target: Tensor, beta: float, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Errors [B] of the policies v+ and v- that the student stands for; equal where it is `old`.

    Args:
        student: [B, C, H, W] velocities; carries the gradient.
        old: the same shape; a constant.
        target: eps - x0, the same shape.
        beta: the student's part in either.
        times: [B, 1, 1, 1] of the noised images, for errors of clean predictions over their own mean absolute value;
            None: squared errors of velocities.
    """
    old = old.detach()
    found = []
    for sign in (1, -1):
        gap = old + sign * beta * (student - old) - target
        if times is not None:
            gap = times * gap  # x(u) - x0 = t (v - u)
        squared = gap.square().flatten(1).mean(1)
        size = gap.detach().abs().flatten(1).mean(1).clamp(min=LEAST) if times is not None else 1.0
        found.append(squared / size)
    return found[0], found[1]
