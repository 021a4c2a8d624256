"""The mathematics of flow matching as pure functions of tensors: no model, no loss, no Ray."""

from opd_ray.diffusion.divergence import gaussian_kl, half_squared_distance
from opd_ray.diffusion.kernels import (
    KERNELS,
    Kernel,
    Step,
    cps,
    dance,
    ddim,
    flow,
    log_prob,
    sample,
)
from opd_ray.diffusion.prediction import (
    add_noise,
    eps_from_velocity,
    guide,
    velocity_from_eps,
    velocity_from_x0,
    x0_from_velocity,
)
from opd_ray.diffusion.ratios import clipped_surrogate, log_ratio, normalised_log_ratio
from opd_ray.diffusion.schedule import choose_steps, flow_sigmas, trained_steps
from opd_ray.diffusion.shapes import PerSample, Reduction, over_samples

__all__ = [
    "KERNELS",
    "Kernel",
    "PerSample",
    "Reduction",
    "Step",
    "add_noise",
    "choose_steps",
    "clipped_surrogate",
    "cps",
    "dance",
    "ddim",
    "eps_from_velocity",
    "flow",
    "flow_sigmas",
    "gaussian_kl",
    "guide",
    "half_squared_distance",
    "log_prob",
    "log_ratio",
    "normalised_log_ratio",
    "over_samples",
    "sample",
    "trained_steps",
    "velocity_from_eps",
    "velocity_from_x0",
    "x0_from_velocity",
]
