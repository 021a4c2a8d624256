"""One denoising step as a Gaussian: p(x_next | x) = N(mean, std^2), from the predicted velocity.

Every kernel is the Euler step plus a pull along the predicted noise eps = x + (1 - t) v:

    mean = x + (t_next - t) v + pull * eps,      pull <= 0

The pull takes away the noise level that std adds again, so at noise level 0 every kernel *is* the
Euler step (ODE), bit for bit. `std` always means the std of the whole transition.

Shapes: x, v [B, C, H, W] or [B, C, F, H, W] of any float type, fp32 inside and out (fp64 where they
are fp64); t and t_next one number or [B], in [0, 1] and falling; `noise_level` is the paper's a >= 0.
"""

import math
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from opd_ray.diffusion.prediction import END_TOLERANCE, eps_from_velocity
from opd_ray.diffusion.shapes import (
    PerSample,
    Reduction,
    full,
    over_samples,
    reduce_dims,
    require_positive_std,
    require_same_shape,
)


class Step(NamedTuple):
    """A transition p(x_next | x) = N(mean, std^2 I)."""

    mean: Tensor
    """[B, C, H, W] or [B, C, F, H, W], fp32 or fp64."""
    std: Tensor
    """The whole transition's, sqrt(-dt) included; 0 is deterministic. [B, 1, ..., 1] where t was
    per sample, else 0-d on the device of t."""


class Kernel(Protocol):
    """From a state and a velocity to the next state's distribution."""

    def __call__(self, x: Tensor, v: Tensor, t: PerSample, t_next: PerSample, noise_level: float) -> Step:
        """See the module's docstring for shapes and units."""


def flow(x: Tensor, v: Tensor, t: PerSample, t_next: PerSample, noise_level: float) -> Step:
    """Flow-SDE, diffusion coefficient sigma_t = a sqrt(t / (1 - t)) (arXiv 2605.15055 Eq. 5-9).

    Eq. 7 in Eq. 5's order: mean = x + [v + sigma_t^2 / (2t) eps] dt, and std = sigma_t sqrt(-dt).
    """
    now, then = _times(x, t, t_next, noise_level, max_noise=math.inf)
    # sigma_t is infinite at t = 1. There, and in this place alone, the second time of the schedule
    # stands in for the first: 1 - t_1 for 1 - t. For a first step t_1 is t_next.
    variance = noise_level**2 * now / torch.where(now > 1 - END_TOLERANCE, 1 - then, 1 - now)
    dt = then - now
    return _step(x, v, now, then, pull=variance / (2 * now) * dt, std=(variance * -dt).sqrt())


def dance(x: Tensor, v: Tensor, t: PerSample, t_next: PerSample, noise_level: float) -> Step:
    """Dance-SDE, constant diffusion coefficient a (arXiv 2505.07818).

    mean = x + v dt - a^2 / 2 score dt with score = -(x - (1 - t) x0) / t^2 = -eps / t, and
    std = a sqrt(-dt).
    """
    now, then = _times(x, t, t_next, noise_level, max_noise=math.inf)
    dt = then - now
    return _step(x, v, now, then, noise_level**2 / (2 * now) * dt, noise_level * (-dt).sqrt())


def cps(x: Tensor, v: Tensor, t: PerSample, t_next: PerSample, noise_level: float) -> Step:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): the noise stays on schedule.

    mean = (1 - t') x0 + sqrt(t'^2 - std^2) eps and std = t' sin(a pi / 2), a in [0, 1]. The root is
    t' cos(a pi / 2), and the pull is what it lacks of t'. The std does not shrink with the step's
    length: unlike the others this is no SDE's discretisation, and images lose a little variety.
    """
    now, then = _times(x, t, t_next, noise_level, max_noise=1.0)
    angle = noise_level * math.pi / 2
    return _step(x, v, now, then, -2 * math.sin(angle / 2) ** 2 * then, math.sin(angle) * then)


def ddim(x: Tensor, v: Tensor, t: PerSample, t_next: PerSample, noise_level: float) -> Step:
    """DDIM with eta = a in [0, 1] on the flow-matching path (arXiv 2010.02502 Eq. 12, 16).

    mean = (1 - t') x0 + sqrt(t'^2 - std^2) eps and std = a t' sqrt(1 - r^2) with
    r = t' (1 - t) / (t (1 - t')); a = 1 is the ancestral (DDPM) step.
    """
    now, then = _times(x, t, t_next, noise_level, max_noise=1.0)
    # 1 - r, then (1 - r)(1 + r), then sqrt(1 - q) - 1, in forms that subtract no nearly equal
    # numbers: fp32 suffices. gap (2 - gap) rounds to at most 1, so no root sees a negative number.
    gap = (now - then) / (now * (1 - then))
    renewed = noise_level**2 * gap * (2 - gap)
    return _step(
        x,
        v,
        now,
        then,
        pull=-then * renewed / (1 + (1 - renewed).sqrt()),
        std=then * renewed.sqrt(),
    )


KERNELS: Final[dict[str, Kernel]] = {"flow": flow, "dance": dance, "cps": cps, "ddim": ddim}


def sample(step: Step, noise: Tensor | None = None) -> Tensor:
    """The next state, mean + std * noise.

    Args:
        step: what a kernel returned.
        noise: standard normal, the shape of `step.mean`; may be None only where std is 0.

    Returns:
        The shape of `step.mean`, fp32.
    """
    if noise is None:
        if bool((step.std != 0).any()):
            raise ValueError("this step is random (std is not 0): give it noise")
        return step.mean
    require_same_shape(mean=step.mean, noise=noise)
    return step.mean + over_samples(step.std, step.mean) * full(noise)


def log_prob(x_next: Tensor, step: Step, *, reduction: Reduction = "mean") -> Tensor:
    """The elementwise log N(x_next; mean, std^2), averaged (or summed) over C, H, W.

    Args:
        x_next: the state that was drawn. A constant: no gradient flows into it, since through
            mean + std * noise it would cancel the mean's own.
        step: what a kernel returned.
        reduction: `mean` is what the published clip ranges are tuned for; `sum` is the density.

    Returns:
        [B], fp32; nats, per dimension for `mean`.

    Raises:
        ValueError: where std is 0, because a deterministic step has no density.
    """
    require_same_shape(x_next=x_next, mean=step.mean)
    require_positive_std(step.std)
    std = over_samples(step.std, step.mean)
    standard = (full(x_next.detach()) - step.mean) / std
    return reduce_dims(-0.5 * standard.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def _step(x: Tensor, v: Tensor, now: Tensor, then: Tensor, pull: Tensor, std: Tensor) -> Step:
    euler = full(x) + (then - now) * full(v)
    return Step(mean=euler + pull * eps_from_velocity(x, v, now), std=std)


def _times(x: Tensor, t: PerSample, t_next: PerSample, noise_level: float, max_noise: float) -> tuple[Tensor, Tensor]:
    if not 0 <= noise_level <= max_noise or math.isinf(noise_level):
        raise ValueError(f"noise level {noise_level} must be finite and in [0, {max_noise}]")
    now, then = over_samples(t, x), over_samples(t_next, x)
    if not bool(((then >= 0) & (then < now) & (now <= 1)).all()):
        raise ValueError(f"a step needs 1 >= t > t_next >= 0, got t {t} and t_next {t_next}")
    return now, then
