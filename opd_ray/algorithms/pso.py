"""Pairwise sample optimization of few-step models (PSO, arXiv 2410.03190), online.

The student draws several images of each prompt in its own few steps; rewards say which is the best and which the worst.
At each step of these two, with the model's own few-step kernel and the frozen start as reference,

    L = -log sigmoid(beta (log q_w - log q_l)),   q = clip(p_student(x' | x) / p_reference(x' | x), 1 - c, 1 + c)

so the likelihood is raised where the model is used and nowhere else: fine-tuning on noised pictures instead blurs what
few steps draw. With a many-step kernel this is D3PO (arXiv 2311.13231).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from opd_ray.algorithms.advantages import preferences
from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Stepwise
from opd_ray.config import PsoConfig
from opd_ray.types import Experience

__all__ = ["Pso", "pairwise_loss"]


class Pso(Stepwise):
    """Prefers the better of the student's own images."""

    paired: ClassVar[bool] = True

    def __init__(self, config: PsoConfig) -> None:
        super().__init__(config)
        self.config = config
        self.shared_noise = config.shared_noise

    @property
    def needs_teachers(self) -> bool:  # type: ignore[override]  # follows from the run's teachers
        """Where one of them is the reference."""
        return self.facts.reference

    @property
    def velocities(self) -> tuple[str, ...]:  # type: ignore[override]  # as above
        """The learner's own reference, its adapter switched off, unless a teacher is it."""
        return () if self.facts.reference else ("reference",)

    def rows(self, experience: Experience) -> Tensor:
        """The best image of each prompt, then the worst ones: [2 P]."""
        found = self._preferences(experience)
        return torch.cat([found[:, 0], found[:, 1]])

    def inputs(self, experience: Experience) -> Mapping[str, Tensor]:
        """Whether the prompt's best and worst image differ in reward, at every step."""
        path, found = experience.trajectory, self._preferences(experience)
        assert path is not None
        decided = torch.zeros(len(path.latents), len(path.sigmas) - 1, device=path.latents.device)
        decided[found[:, 0]] = decided[found[:, 1]] = found[:, 2:].float()
        if experience.answer is None:
            return {"decided": decided}
        reference = path.latents.new_zeros(len(path.latents), len(path.sigmas) - 1, *path.latents.shape[2:])
        reference[:, list(experience.answer.steps)] = experience.answer.velocity
        return {"decided": decided, "reference": reference}

    def _preferences(self, experience: Experience) -> Tensor:
        item, scores = experience.item, {name: one.cpu() for name, one in experience.scores.items()}
        assert experience.trajectory is not None
        found = preferences(
            item, scores, self.config.reward_weights, self.facts.images_per_prompt, pareto=self.config.pareto
        )
        return found.to(experience.trajectory.latents.device)

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """The loss of each pair at one step; a tie weighs nothing, and counts in the mean."""
        reference = forward.inputs["reference"] if self.facts.reference else velocity["reference"]
        ratio = self.log_ratio(forward, velocity["student"], reference)
        decided = forward.inputs["decided"].chunk(2)[0]
        each, margin = pairwise_loss(ratio, self.config.beta, self.config.clip_range)
        right = ((margin.detach() > 0).float() * decided).sum() / decided.sum().clamp(min=1)
        return Loss(
            (each * decided).mean(),
            {"ratio": ratio.detach().abs().max(), "ties": 1 - decided.mean(), "accuracy": right},
        )


def pairwise_loss(log_ratio: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """-log sigmoid of each pair's margin, and the margin beta (log q_w - log q_l).

    Args:
        log_ratio: [2 P] to the reference: those of the better images, then those of the worse ones.
        beta: weight of the preference.
        clip: of the ratio.

    Returns:
        [P] and [P].
    """
    low, high = torch.log1p(torch.tensor([-clip, clip], dtype=log_ratio.dtype, device=log_ratio.device))
    better, worse = log_ratio.clamp(low, high).chunk(2)
    margin = beta * (better - worse)
    return -logsigmoid(margin), margin
