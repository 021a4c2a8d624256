"""Flow matching in its three spellings (velocity, eps, x0), and classifier-free guidance.

x_t = (1 - t) x0 + t eps with t in [0, 1], t = 1 pure noise, and velocity v = eps - x0, as in
arXiv 2605.15055. Latents are [B, C, H, W] or [B, C, F, H, W]; t is one number or one per sample.
Results are fp32 whatever came in, but fp64 stays fp64.
"""

import torch
from torch import Tensor

from opd_ray.diffusion.shapes import PerSample, full, over_samples, require_same_shape

END_TOLERANCE = 1e-6
"""A t this close to 0 or 1 is that end: what is left of the distance in fp32 is rounding error."""


def add_noise(x0: Tensor, eps: Tensor, t: PerSample) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    require_same_shape(x0=x0, eps=eps)
    t = over_samples(t, x0)
    return (1 - t) * full(x0) + t * full(eps)


def x0_from_velocity(x: Tensor, v: Tensor, t: PerSample) -> Tensor:
    """x0 = x - t v, the clean prediction."""
    require_same_shape(x=x, v=v)
    return full(x) - over_samples(t, x) * full(v)


def eps_from_velocity(x: Tensor, v: Tensor, t: PerSample) -> Tensor:
    """Eps = x + (1 - t) v, the noise prediction."""
    require_same_shape(x=x, v=v)
    return full(x) + (1 - over_samples(t, x)) * full(v)


def velocity_from_x0(x: Tensor, x0: Tensor, t: PerSample) -> Tensor:
    """V = (x - x0) / t, for t > 0: at t = 0 the state is x0 and says nothing about the noise."""
    require_same_shape(x=x, x0=x0)
    if bool((torch.as_tensor(t) < END_TOLERANCE).any()):
        raise ValueError(f"velocity from x0 needs t > 0, got {t}: at t = 0 every velocity fits")
    return (full(x) - full(x0)) / over_samples(t, x)


def velocity_from_eps(x: Tensor, eps: Tensor, t: PerSample) -> Tensor:
    """V = (eps - x) / (1 - t), for t < 1: at t = 1 the state is eps and says nothing about x0."""
    require_same_shape(x=x, eps=eps)
    if bool((torch.as_tensor(t) > 1 - END_TOLERANCE).any()):
        raise ValueError(f"velocity from eps needs t < 1, got {t}: at t = 1 every velocity fits")
    return (full(eps) - full(x)) / (1 - over_samples(t, x))


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, uncond + scale (cond - uncond), in fp32.

    Written from the conditional side, so that scale 1 is `cond` to the last bit and agrees with a
    model that runs the conditional branch alone.
    """
    require_same_shape(uncond=uncond, cond=cond)
    return full(cond) + (scale - 1) * (full(cond) - full(uncond))
