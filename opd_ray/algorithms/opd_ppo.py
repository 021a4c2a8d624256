"""PPO in place of the closed form: the baseline of on-policy distillation (arXiv 2605.15055 Eq. 16 to 23).

A step of a drawing is an action, and how far it is from the teacher's is what it costs:

    L = E max(K r, K clip(r, 1 - c, 1 + c)),    r = p_student(x' | x) / p_drawn(x' | x),

where the cost K (the paper's advantage is -K) has one of four forms:

    differentiable_kl   KL(p_student || p_teacher) at x, whose gradient is kept: the paper's
    per_step            KL(p_drawn || p_teacher) at x, a constant
    return_to_go        the sum of those from this step on, a constant
    sampled             log p_drawn(x' | x) - log p_teacher(x' | x), a constant

At r = 1 the gradient is that of K, where it has one, and K eps / std by the step's mean, where x' = mu + std eps. The
latter has the mean 0 for a K that does not know eps: it is noise in the first form (Eq. 21), whose variance is
K^2 d / std^2 in d dimensions (Eq. 23), and all that there is in the second, which learns nothing. The third learns how
a step moves the ones after it, not where itself ought to go. The last has the closed form's expected gradient.

KLs are means over C, H, W, as in ``Opd``, and so is the log-ratio, or the sum (``likelihood``). The sampled cost is the
other one of the two: so the expected gradient is that of objective `kl` in either way.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.stepwise import Stepwise
from opd_ray.config import OpdPpoConfig
from opd_ray.diffusion import KERNELS, clipped_surrogate, gaussian_kl
from opd_ray.types import Experience, TeacherAnswer, Trajectory

__all__ = ["OpdPpo"]


class OpdPpo(Stepwise):
    """Costs come from the teachers; the velocities of the policy that drew travel with its drawings."""

    needs_rewards = False
    needs_teachers = True
    needs_velocities: ClassVar[bool] = True
    whole_paths: ClassVar[bool] = False

    def __init__(self, config: OpdPpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def inputs(self, experience: Experience) -> Mapping[str, Tensor]:
        """Velocities of the policy that drew and of the teacher, and costs that are constants, at each trained step."""
        path, answer = experience.trajectory, experience.answer
        assert path is not None and path.velocities is not None and answer is not None
        assert answer.steps == tuple(range(len(answer.steps)))  # all of them, so a step's number is its place
        known = {"drawn": path.velocities, "teacher": answer.velocity}
        if self.config.form in ("per_step", "return_to_go"):
            known["cost"] = self._costs(path, path.velocities, answer)
        return known

    def _costs(self, path: Trajectory, drawn: Tensor, answer: TeacherAnswer) -> Tensor:
        """KL(p_drawn || p_teacher) [B, T] of each trained step, or the sum from it on."""
        kernel, found = KERNELS[self.kernel], list[Tensor]()
        for j in answer.steps:
            x, now, then = path.latents[:, j], float(path.sigmas[j]), float(path.sigmas[j + 1])
            mine = kernel(x, drawn[:, j], now, then, self.noise_level)
            theirs = kernel(x, answer.velocity[:, j], now, then, self.noise_level)
            found.append(gaussian_kl(mine.mean, theirs.mean, mine.std, reduction="mean"))
        costs = torch.stack(found, dim=1)
        return costs.flip(1).cumsum(1).flip(1) if self.config.form == "return_to_go" else costs

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """PPO's loss at one step of each image, mean over the batch; Eq. 10's KL (a sum over C, H, W) as a metric."""
        student, clip = velocity["student"], self.config.clip_range
        drawn, teacher = forward.inputs["drawn"], forward.inputs["teacher"].detach()
        numbers = student[0].numel()
        ratio = self.log_ratio(forward, student, drawn) * (numbers if self.config.likelihood == "sum" else 1)
        drift, refused = self.drift(forward, ratio, clip)
        mine, theirs = self.both(forward, student, teacher)
        kl = gaussian_kl(mine.mean, theirs.mean, mine.std, reduction="mean")
        match self.config.form:
            case "differentiable_kl":
                cost = kl
            case "sampled":
                cost = self.log_ratio(forward, drawn, teacher) * (1 if self.config.likelihood == "sum" else numbers)
            case "per_step" | "return_to_go":
                cost = forward.inputs["cost"]
        told = {
            "gap": (student - teacher).detach().square().mean(),
            "kl": kl.detach().mean() * numbers,
            "ratio": drift,
            "clipped": (ratio.detach().expm1().abs() > clip).float().mean(),
        }
        return Loss(clipped_surrogate(ratio, -cost, clip).mean(), told, refused)
