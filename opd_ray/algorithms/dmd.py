"""Distillation by matching distributions: DMD2 (arXiv 2405.14867) and TDM (arXiv 2503.06674), the baselines of `opd`.

The student draws its own path; p = x_j - t_j v_S(x_j) is its clean prediction at a state of it, noised to a time t:

    x_t = (1 - t) p + t eps.

There the task's teacher gives its guided velocity, and so does an adapter `fake`, which follows the distribution of the
student's p by flow matching on them:

    L_fake    = E |v_fake(x_t) - (eps - p)|^2
    g         = [x0_fake(x_t) - x0_teacher(x_t)] / mean |p - x0_teacher(x_t)|,      x0 = x_t - t v
    L_student = E 1/2 |p - sg(p - g)|^2,    whose gradient is g dp / dtheta          (DMD Eq. 7 and 8, DMD2 Eq. 1)

Means are over C, H, W, the samples and the trained steps; g is a constant, so it reaches the student through p alone.
Where `fake` is the teacher it is exactly 0. The path has no gradient: p is predicted once more at a stored state of it,
which is DMD2's backward simulation. Teacher and learner noise the p that was drawn, each for itself by the item's seed.

    dmd   t uniform in (0.02, 0.98), whatever the step: each p is to be a clean image
    tdm   t uniform in (t_j+1, t_j], the step's own times: drawings are to have the teacher's distribution at each time

so that in `tdm` no two steps share a time, and one `fake` can tell their distributions apart (TDM Sec. 3.2).

What is ours: teachers, guidance, batches and tasks are those of `opd`; one task's samples see one teacher. There is no
discriminator, and no regression on drawings. Student and `fake` step together, unless ``fake_updates`` gives `fake`
more (DMD2: 5); they share the learning rate. `tdm` noises p where the paper noises the next state x_j+1 on: an ODE step
ends at (1 - t_j+1) p + t_j+1 eps_S, so the two differ by whose noise that is, and `fake` needs none of the paper's
importance weights. It has `dmd`'s scale of g in place of the pseudo-Huber metric.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from opd_ray.algorithms.base import Algorithm, Forward, Loss, State, first_steps
from opd_ray.config import DmdConfig, MatchingConfig, TdmConfig
from opd_ray.diffusion import add_noise, over_samples, x0_from_velocity
from opd_ray.errors import ConfigError
from opd_ray.seeds import fold, noise
from opd_ray.types import Experience, Trajectory

__all__ = ["Dmd", "Matching", "Tdm", "direction"]

FAKE = "fake"
LEAST = 1e-5
"""Of the mean absolute difference that a direction is divided by."""


class Matching(Algorithm):
    """Subclasses say to which times a step's clean predictions are noised."""

    adapters: ClassVar[tuple[str, ...]] = (FAKE,)
    trained: ClassVar[tuple[str, ...]] = (FAKE,)
    needs_teachers = True
    needs_velocities: ClassVar[bool] = True
    whole_paths: ClassVar[bool] = False

    def __init__(self, config: MatchingConfig) -> None:
        self.settings = config
        self.kernel, self.noise_level = config.kernel, config.noise_level
        self.steps_per_item = config.steps_per_item
        self.task_weights = config.task_weights
        self.updates_per_round = config.fake_updates
        self.streams = config.fake_updates == 1

    @property
    def student_updates(self) -> int:
        """The last of a round's: those before it train `fake` alone."""
        return 1

    def times(self, sigmas: Tensor, step: int) -> tuple[float, float]:
        """To which times the clean predictions of a step are noised: above the first, up to the second."""
        raise NotImplementedError

    def trained_steps(self, num_steps: int) -> tuple[int, ...]:
        """The first int(fraction * N), as in ``Opd``."""
        return first_steps(num_steps, self.settings.timestep_fraction)

    def check(self, sigmas: Tensor) -> None:
        """The kernel takes the noise level, and what is trained is what drew."""
        for _ in self.transitions(sigmas):
            pass
        if self.facts.max_staleness:
            name = self.settings.name  # type: ignore[attr-defined]  # of every subclass
            raise ConfigError(
                f"algorithm {name} asks teachers about what the student predicts now; set cluster.max_staleness "
                f"(now {self.facts.max_staleness}) to 0, or use opd"
            )

    def asked(self, trajectory: Trajectory) -> Iterator[State]:
        """The clean predictions of the trained steps, noised."""
        for j in trajectory.item.steps:
            _, x, t = self._noised(trajectory, j, "student")
            yield x, t

    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """`fake` at predictions that are noised otherwise each time; in the last update the student at its states."""
        path, answer = experience.trajectory, experience.answer
        assert path is not None and answer is not None
        for j in answer.steps:
            target, x, t = self._noised(path, j, FAKE, update)
            yield Forward(x, t, torch.zeros_like(t), j, path.cond, {}, {"target": target}, policy=FAKE)
        if update < self.updates_per_round - 1:
            return
        for k, j in enumerate(answer.steps):
            now, then = float(path.sigmas[j]), float(path.sigmas[j + 1])
            _, x, t = self._noised(path, j, "student")
            inputs = {"noised": x, "t": t, "teacher": answer.velocity[:, k]}
            yield Forward(path.state(j), now, then, j, path.cond, path.uncond, inputs, beside={FAKE: (x, t)})

    def _noised(self, path: Trajectory, step: int, *names: int | str) -> tuple[Tensor, Tensor, Tensor]:
        """Clean predictions as they were drawn, noised by a draw of these names.

        Returns:
            Velocities eps - p [B, C, H, W], noised states of that shape, and their times [B].
        """
        assert path.velocities is not None
        p = x0_from_velocity(path.state(step), path.velocities[:, step], float(path.sigmas[step]))
        item, (low, high) = path.item, self.times(path.sigmas, step)
        seeds = [
            fold(self.facts.seed, "learner_noise", item.round, item.task, item.index, step, *names, row)
            for row in range(len(p))
        ]
        shares = [np.random.default_rng((seed, 1)).random() for seed in seeds]
        t = torch.tensor([high - (high - low) * share for share in shares], dtype=torch.float32, device=p.device)
        eps = noise(seeds, p.shape[1:]).to(p.device)
        return eps - p, add_noise(p, eps, t), t

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """That of the forward's policy, mean over the batch and C, H, W."""
        if forward.policy == FAKE:
            error = (velocity[FAKE] - forward.inputs["target"]).square().mean()
            return Loss(error, {"fake_error": error.detach()})
        fake, teacher = velocity[FAKE].detach(), forward.inputs["teacher"].detach()
        p = x0_from_velocity(forward.x, velocity["student"], forward.t)
        g = direction(p.detach(), forward.inputs["noised"], fake, teacher, forward.inputs["t"])
        value = 0.5 * (p - (p - g).detach()).square().mean()
        return Loss(value, {"mismatch": (fake - teacher).square().mean()})


class Dmd(Matching):
    """Every clean prediction is to be an image as the teacher draws them."""

    def __init__(self, config: DmdConfig) -> None:
        super().__init__(config)
        self.config = config

    def times(self, sigmas: Tensor, step: int) -> tuple[float, float]:
        """The same for every step."""
        return self.config.times


class Tdm(Matching):
    """Drawings are to have the teacher's distribution at every time."""

    def __init__(self, config: TdmConfig) -> None:
        super().__init__(config)

    def times(self, sigmas: Tensor, step: int) -> tuple[float, float]:
        """Those that the step goes through."""
        return float(sigmas[step + 1]), float(sigmas[step])


def direction(p: Tensor, x: Tensor, fake: Tensor, teacher: Tensor, t: Tensor) -> Tensor:
    """The gradient g by a clean prediction, [B, C, H, W]; exactly 0 where the two velocities are equal.

    Args:
        p: clean predictions [B, C, H, W].
        x: what they were noised to.
        fake: velocities there, of the student's distribution.
        teacher: velocities there, of the distribution to match.
        t: [B], the times.
    """
    size = (p - x0_from_velocity(x, teacher, t)).abs().flatten(1).mean(1).clamp(min=LEAST)
    return over_samples(t, x) * (teacher - fake) / over_samples(size, x)  # the noised states cancel
