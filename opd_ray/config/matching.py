"""Distillation that matches distributions in place of steps: the baselines `dmd` and `tdm`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from opd_ray.config.alignment import Kernel
from opd_ray.config.section import Frozen

__all__ = ["DmdConfig", "MatchingConfig", "TdmConfig"]

Time = Annotated[float, Field(gt=0, lt=1)]


class MatchingConfig(Frozen):
    """What `dmd` and `tdm` have in common."""

    fake_updates: int = Field(1, ge=1)
    """Optimizer steps of the adapter `fake`, which follows the student's distribution, for each one of the student
    (DMD2: 5). The last of them is one step of both, each by a loss, a gradient and a clipped norm of its own."""
    kernel: Kernel = "flow"
    """The step that draws; the loss does not know it. `cps` at noise_level 1 is DMD2's own few-step sampler."""
    noise_level: float = Field(0.0, ge=0)
    """Stochasticity of that kernel; 0 is the ODE."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """The first int(fraction * steps) steps of a drawing are trained on, as in `opd`."""
    steps_per_item: int | None = Field(None, ge=1)
    """At how many of them each work item's clean predictions are matched, drawn at random from the item's seed (DMD2:
    1); null: all."""
    task_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Relative weight of each task's losses; 1 where not given."""


class DmdConfig(MatchingConfig):
    """Distribution matching distillation (DMD2, arXiv 2405.14867): on the student's paths, without a discriminator."""

    name: Literal["dmd"]
    """`dmd`."""
    times: tuple[Time, Time] = (0.02, 0.98)
    """Clean predictions are noised to times between these, uniformly (DMD2's)."""

    @model_validator(mode="after")
    def _in_order(self) -> "DmdConfig":
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times {list(self.times)}: the first has to be the smaller one, as in [0.02, 0.98]")
        return self


class TdmConfig(MatchingConfig):
    """Trajectory distribution matching (TDM, arXiv 2503.06674): each step of a drawing at its own times alone."""

    name: Literal["tdm"]
    """`tdm`."""
