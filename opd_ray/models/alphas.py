"""The time of a variance-preserving model (Stable Diffusion's U-Nets), told on the flow path.

Such a model knows states x = a x0 + b eps with a = sqrt(abar), b = sqrt(1 - abar) at integer timesteps. Divided by
a + b they are flow states, and nothing that steps, compares or stores states has to know more than one kind:

    z = x / (a + b) = (1 - t) x0 + t eps        t = b / (a + b)
    x = z / n       a = (1 - t) / n     b = t / n      n = sqrt((1 - t)^2 + t^2) = 1 / (a + b)
    sigma of k-diffusion's coordinates = b / a = t / (1 - t), and its state x / a = z / (1 - t)

The kernels of ``opd_ray.diffusion`` are functions of x0, eps and the two times, so in these coordinates they are the
stock samplers: `ddim` at noise level eta is DDIM(eta) (arXiv 2010.02502, Eq. 12 and 16), at noise level 1 also
k-diffusion's Euler-ancestral step, and `cps` at noise level 1 noises x0 again (multistep consistency sampling, arXiv
2303.01469, Algorithm 1; LCM, DMD2): mean (1 - t') x0, std t'. Solvers of a higher order (PNDM, DPM) are not
followed: of their files the betas, the spacing and the ends are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opd_ray.config import ModelConfig
from opd_ray.diffusion import over_samples
from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import read_config
from opd_ray.models.schedule import Schedule

__all__ = ["AlphaSchedule", "read_alpha_schedule"]

Spacing = Literal["leading", "trailing", "linspace", "lcm"]
EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
EULER_ZERO = 2**-24
"""What those classes put in the place of a last abar of 0, at which their own coordinates would be infinite."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "LCMScheduler": {
        "timestep_spacing": "lcm",
        "clip_sample": False,
        "original_inference_steps": 50,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
}
"""The schedulers that are known, with their own defaults of what they read beyond COMMON, or otherwise."""
COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "interpolation_type": ("linear",),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
}
"""Options under which states or times would be others, and the values that leave them alone."""
IDLE = (
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),  # of what is refused where it is on
    *("skip_prk_steps", "variance_type"),  # of solvers and kernels, which a run chooses itself
    *("original_inference_steps", "final_sigmas_type", "set_alpha_to_one"),  # left over, where another class has them
    "timestep_scaling",  # LCM's boundary scalings: below 1e-5 of x0 at its own timesteps
)


@dataclass(frozen=True, slots=True, eq=False)
class AlphaSchedule(Schedule):
    """A table of abar, and how a path goes through it."""

    path: str
    """Of the model, for messages."""
    times: Tensor
    """[timesteps] float32, rising: t of each timestep of the network."""
    prediction: str
    """`epsilon` or `v_prediction`: what the network answers."""
    spacing: Spacing
    offset: int
    """Added to each timestep of spacing `leading`."""
    whole: bool
    """Whether the timesteps of spacing `linspace` are rounded."""
    ends_at_zero: bool
    """Whether the last step goes to the clean picture, or to the first timestep of the table."""
    euler: bool
    """Whether the first state of spacings `trailing` and `linspace` is t noise, and not noise of variance 1."""
    original_steps: int
    """Of spacing `lcm`: the grid that its steps are taken from."""

    def timesteps(self, num_steps: int) -> Tensor:
        """The network's timesteps of a path, [num_steps] float64, falling; as diffusers' ``set_timesteps``."""
        count, number = len(self.times), torch.arange(num_steps, dtype=torch.float64)
        match self.spacing:
            case "leading":
                return (number * (count // num_steps) + self.offset).flip(0)
            case "trailing":
                return (count - number * (count / num_steps)).round() - 1
            case "linspace":
                found = torch.linspace(0, count - 1, num_steps, dtype=torch.float64).flip(0)
                return found.round() if self.whole else found
            case "lcm":
                grid = torch.arange(1, self.original_steps + 1).flip(0) * (count // self.original_steps) - 1
                return grid[(number * (self.original_steps / num_steps)).floor().long()].double()

    def sigmas(self, num_steps: int) -> Tensor:
        """The times of ``timesteps``, and the end: 0 or the table's first.

        Raises:
            ModelError: this spacing has no such number of steps.
        """
        count = self.original_steps if self.spacing == "lcm" else len(self.times)
        at = self.timesteps(num_steps) if 1 <= num_steps <= count else torch.zeros(0)
        if len(at) and float(at.min()) >= 0 and float(at.max()) <= len(self.times) - 1:
            low = at.floor().long()
            high = (low + 1).clamp(max=len(self.times) - 1)
            # An integer timestep gives its entry, to the last bit.
            visited = torch.lerp(self.times[low].double(), self.times[high].double(), at - low).float()
            end = torch.zeros(1) if self.ends_at_zero else self.times[:1]
            sigmas = torch.cat([visited, end])
            if bool((sigmas.diff() < 0).all()):
                return sigmas
        raise ModelError(
            f"model {self.path!r} cannot go {num_steps} steps with timestep spacing {self.spacing}"
            f"{f' and offset {self.offset}' if self.spacing == 'leading' else ''}, which ends at "
            f"{'the clean picture' if self.ends_at_zero else 'timestep 0'}: there are {count} timesteps, and each step "
            "has to go down; take fewer steps, or another model.spacing (leading, trailing, linspace)"
        )

    def training_times(self) -> tuple[float, ...]:
        """The table's."""
        return tuple(self.times.tolist())

    def clock(self, t: Tensor) -> Tensor:
        """The timestep whose time is t, linear between two entries; exact for those of the table."""
        times = self.times.to(t.device)
        above = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        low, high = times[above - 1], times[above]
        return (above - 1 + (t - low) / (high - low)).clamp(0, len(times) - 1)

    def initial(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What diffusers begins with: x = eps; for the Euler kinds but `leading`, x = b eps (init_noise_sigma)."""
        t = float(sigmas[0])
        return noise * (t if self.euler and self.spacing != "leading" else math.hypot(1 - t, t))

    def final(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """What diffusers decodes: x in the model's own coordinates, where the path ends above 0."""
        t = float(sigmas[-1])
        return x / math.hypot(1 - t, t) if t > 0 else x

    def network_input(self, z: Tensor, t: Tensor) -> Tensor:
        """The state in the model's own coordinates, x = z / n; z [B, C, H, W], t [B]."""
        return z / _norm(over_samples(t, z))

    def velocity(self, answer: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The flow velocity eps - x0 from the network's answer; all [B, C, H, W] float32, t [B].

        epsilon:       (eps - z) / (1 - t), since x0 = (z - t eps) / (1 - t)
        v_prediction:  with v = a eps - b x0: eps = a v + b x and x0 = a x - b v, so eps - x0 = (a + b) v + (b - a) x
                       = v / n + (2 t - 1) z / n^2, which is good at a = 0, too
        """
        t = over_samples(t, z)
        if self.prediction == "epsilon":
            return (answer - z) / (1 - t)
        norm = _norm(t)
        return answer / norm + (2 * t - 1) / norm.square() * z

    def facts(self) -> dict[str, object]:
        """See ``Schedule.facts``; times are told by some of the table."""
        some = [round(float(self.times[k]), 6) for k in (0, len(self.times) // 2, len(self.times) - 1)]
        return {
            "prediction": self.prediction,
            "timesteps": len(self.times),
            "times": some,
            "timestep spacing": f"{self.spacing}{', rounded' if self.whole and self.spacing == 'linspace' else ''}",
            "steps offset": self.offset if self.spacing == "leading" else 0,
            "original steps": self.original_steps if self.spacing == "lcm" else None,
            "last step": "to 0" if self.ends_at_zero else "to timestep 0",
            "first state": "t eps" if self.euler and self.spacing != "leading" else "eps of variance 1",
        }


def _norm(t: Tensor) -> Tensor:
    return ((1 - t).square() + t.square()).sqrt()


def read_alpha_schedule(model: ModelConfig) -> AlphaSchedule:
    """A variance-preserving model's own, from scheduler_config.json alone; ``model.spacing`` goes before the file's.

    Raises:
        ModelError: the file is missing, or has a scheduler or an option of it that is not known.
    """
    config = read_config(model, "scheduler/scheduler_config.json")
    kind = str(config.get("_class_name"))
    what = f"model {model.path!r}: its scheduler {kind}"
    if kind not in DEFAULTS:
        raise ModelError(f"{what} is not known; known: {', '.join(DEFAULTS)}. Save the pipeline with one of these")
    told = _known_options(what, kind, config)
    abar = _abar(what, told, ends_finite=kind in EULER)
    if told["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ModelError(f"{what} has prediction_type {told['prediction_type']!r}; known: epsilon, v_prediction")
    if told["prediction_type"] == "epsilon" and float(abar[-1]) <= EULER_ZERO:
        raise ModelError(
            f"{what} has prediction_type epsilon and abar 0 at its last timestep (rescale_betas_zero_snr): there the "
            "noise says nothing about the picture. Such models predict v_prediction"
        )
    spacing: Spacing = model.spacing or told["timestep_spacing"]
    if spacing not in ("leading", "trailing", "linspace", "lcm"):
        raise ModelError(f"{what} has timestep_spacing {spacing!r}; known: leading, trailing, linspace")
    a, b = abar.double().sqrt(), (1 - abar.double()).sqrt()
    times = (b / (a + b)).float()
    if not bool((times.diff() > 0).all()):
        raise ModelError(f"{what} has betas under which noise does not rise with every timestep")
    return AlphaSchedule(
        path=model.path,
        times=times,
        prediction=told["prediction_type"],
        spacing=spacing,
        offset=int(told["steps_offset"]),
        whole=kind not in EULER,
        ends_at_zero=told.get("set_alpha_to_one", True) and told.get("final_sigmas_type", "zero") == "zero",
        euler=kind in EULER,
        original_steps=int(told.get("original_inference_steps", 50)),
    )


def _known_options(what: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler's class reads of its file, or its defaults; anything that it would do otherwise is refused."""
    told = COMMON | DEFAULTS[kind]
    if kind == "LCMScheduler":
        config = {name: value for name, value in config.items() if name != "timestep_spacing"}  # it has its own
    unknown = [name for name in config if not (name.startswith("_") or name in told or name in NEUTRAL or name in IDLE)]
    if unknown:
        raise ModelError(f"{what} has option {min(unknown)!r} = {config[min(unknown)]!r}, which is not known here")
    told |= {name: config[name] for name in told if name in config}
    for name, values in NEUTRAL.items():
        value = told.get(name, config.get(name, values[0]))
        if value not in values:
            raise ModelError(
                f"{what} has {name} {value!r}, which is not followed; known: {values[0]!r}. Set it in the model's "
                "scheduler/scheduler_config.json"
            )
    return told


def _abar(what: str, told: Mapping[str, Any], *, ends_finite: bool) -> Tensor:
    """The table in float32, computed as diffusers does."""
    count, betas = int(told["num_train_timesteps"]), told["trained_betas"]
    start, end = float(told["beta_start"]), float(told["beta_end"])
    if betas is not None:
        found = torch.tensor(betas, dtype=torch.float32)
    elif told["beta_schedule"] == "linear":
        found = torch.linspace(start, end, count, dtype=torch.float32)
    elif told["beta_schedule"] == "scaled_linear":
        found = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    else:
        raise ModelError(f"{what} has beta_schedule {told['beta_schedule']!r}; known: linear, scaled_linear")
    abar = torch.cumprod(1 - found, 0)
    if not told["rescale_betas_zero_snr"]:
        return abar
    # arXiv 2305.08891, Algorithm 1: sqrt(abar) is shifted to end at 0 and stretched to begin where it did.
    root = abar.sqrt()
    abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    if ends_finite:
        abar[-1] = EULER_ZERO
    return abar
