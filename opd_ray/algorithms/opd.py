"""On-policy distillation (DiffusionOPD, arXiv 2605.15055).

The student draws its own path; a frozen teacher gives its velocity at the states of *that* path; the student's step
means are pulled onto the teacher's in closed form:

    mean   L = E_{x ~ student} 1/2 |mu_S(x) - mu_T(x)|^2               (Eq. 12, default; ODE or SDE)
    kl     L = E_{x ~ student} |mu_S(x) - mu_T(x)|^2 / (2 std^2)       (Eq. 11, = KL of equal-covariance Gaussians)

Offline distillation (``states: recorded``) is the same loss at x ~ teacher: states of the teachers' own drawings.

Both are averaged over C, H, W, the samples, the trained steps and (weighted) the tasks. The path itself carries no
gradient, and the teacher's mean is a constant.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from opd_ray.algorithms.base import Algorithm, Forward, Loss, first_steps
from opd_ray.config import OpdConfig
from opd_ray.diffusion import KERNELS, gaussian_kl, half_squared_distance
from opd_ray.errors import ConfigError
from opd_ray.types import Experience

__all__ = ["Opd"]


class Opd(Algorithm):
    """One optimizer step a round over all tasks, each marked by its own teacher."""

    whole_paths: ClassVar[bool] = False
    streams = True

    def __init__(self, config: OpdConfig) -> None:
        self.config = config
        self.needs_rollouts = self.needs_teachers = config.states == "student"
        self.kernel = config.kernel
        self.noise_level = config.noise_level
        self.steps_per_item = config.steps_per_item
        self.task_weights = config.task_weights

    def trained_steps(self, num_steps: int) -> tuple[int, ...]:
        """The first int(fraction * N): the paper leaves out the last, whose ODE weight is nearly zero."""
        return first_steps(num_steps, self.config.timestep_fraction)

    def check(self, sigmas: Tensor) -> None:
        """The kernel takes the noise level, and objective `kl` finds a positive std at every trained step."""
        for j, step in self.transitions(sigmas):
            if self.config.objective == "kl" and not bool((step.std > 0).all()):
                raise ConfigError(
                    f"algorithm.objective kl divides by the variance of kernel {self.kernel}, which is 0 at trained "
                    f"step {j}; lower algorithm.timestep_fraction, raise noise_level, or use objective: mean"
                )

    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """The student's own states at the trained steps, with the teacher's velocity there."""
        trajectory, answer = experience.trajectory, experience.answer
        if self.config.states == "recorded":
            yield from self._recorded(experience)
            return
        assert trajectory is not None and answer is not None
        for k, j in enumerate(answer.steps):
            yield Forward(
                x=trajectory.latents[:, j],
                t=float(trajectory.sigmas[j]),
                t_next=float(trajectory.sigmas[j + 1]),
                step=j,
                cond=trajectory.cond,
                uncond=trajectory.uncond,
                inputs={"teacher": answer.velocity[:, k]},
            )

    def _recorded(self, experience: Experience) -> Iterator[Forward]:
        """The teacher's own states at the trained steps, with its velocity there: the states are not the student's."""
        recorded = experience.recorded
        cond, uncond = (
            {name.removeprefix(prefix): one for name, one in recorded.items() if name.startswith(prefix)}
            for prefix in ("cond.", "empty.")
        )
        sigmas = recorded["sigmas"].tolist()
        for j in experience.item.steps:
            inputs = {"teacher": recorded["velocity"][:, j]}
            yield Forward(recorded["latents"][:, j], sigmas[j], sigmas[j + 1], j, cond, uncond, inputs)

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Eq. 12 or 11 at one step, mean over the batch and C, H, W; Eq. 10's KL (a sum over C, H, W) as a metric."""
        student, teacher = velocity["student"], forward.inputs["teacher"].detach()
        kernel = KERNELS[self.kernel]
        mine = kernel(forward.x, student, forward.t, forward.t_next, self.noise_level)
        theirs = kernel(forward.x, teacher, forward.t, forward.t_next, self.noise_level)
        gap = (student - teacher).square().mean()
        if self.config.objective == "kl":
            kl = gaussian_kl(mine.mean, theirs.mean, mine.std, reduction="mean").mean()
            return Loss(kl, {"gap": gap.detach(), "kl": kl.detach() * student[0].numel()})
        match self.config.loss_target:
            case "xt":
                value = half_squared_distance(mine.mean, theirs.mean).mean()
            case "v":
                value = 0.5 * gap
            case "x0":  # x0 = x - t v, so the states cancel
                value = 0.5 * forward.t**2 * gap
        return Loss(value, {"gap": gap.detach()})
