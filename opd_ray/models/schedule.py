"""What a model's scheduler_config.json says of time: which sigmas a path visits, and the network's own clock."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from opd_ray.config import ModelConfig
from opd_ray.diffusion import flow_sigmas
from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import read_config

__all__ = ["FlowSchedule", "Schedule", "read_flow_schedule"]

NUM_TRAIN_TIMESTEPS = 1000
"""The clock of a flow model: timestep = 1000 t."""
# Scheduler options under which the sigmas are not the plain shifted ones.
OTHER_SCHEDULES = (
    "invert_sigmas",
    "shift_terminal",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


class Schedule(ABC):
    """Time along the flow path x_t = (1 - t) x0 + t eps."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """[num_steps + 1] float32 on the CPU, strictly falling within [0, 1]."""

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The network's timestep, float32, for t in [0, 1] of any shape."""

    def initial(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The first state from standard normal noise; the noise itself where the sigmas begin at 1."""
        return noise

    def final(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """What is decoded from the last state; the state itself where the sigmas end at 0."""
        return x

    def training_times(self) -> tuple[float, ...]:
        """The times that the network was trained at; empty where they are continuous."""
        return ()

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What has to agree wherever one trajectory is read."""


@dataclass(frozen=True, slots=True)
class FlowSchedule(Schedule):
    """FlowMatchEulerDiscreteScheduler's with a constant shift."""

    shift: float

    def sigmas(self, num_steps: int) -> Tensor:
        """From 1 down to 0."""
        return flow_sigmas(num_steps, self.shift)

    def clock(self, t: Tensor) -> Tensor:
        """1000 t."""
        return t * NUM_TRAIN_TIMESTEPS

    def facts(self) -> dict[str, object]:
        """See ``Schedule.facts``."""
        return {"scheduler": "FlowMatchEulerDiscreteScheduler", "shift": self.shift}


def read_flow_schedule(model: ModelConfig) -> FlowSchedule:
    """A flow model's own, from scheduler_config.json alone.

    Raises:
        ModelError: the file is missing, or names a schedule that one shift does not describe.
    """
    if model.spacing is not None:
        raise ModelError(
            f"model.spacing {model.spacing} is of the families sd and sdxl; a path of {model.path!r} (family "
            f"{model.family}) has its scheduler's shift alone. Leave it out"
        )
    config = read_config(model, "scheduler/scheduler_config.json")
    options = [option for option in OTHER_SCHEDULES if config.get(option)]
    kind = config.get("_class_name")
    if (
        kind != "FlowMatchEulerDiscreteScheduler"
        or options
        or "shift" not in config
        or config.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS
    ):
        raise ModelError(
            f"model {model.path!r} has scheduler {kind} with "
            f"{', '.join(options) or 'no option'}; only FlowMatchEulerDiscreteScheduler "
            f"with a constant shift over {NUM_TRAIN_TIMESTEPS} timesteps is known"
        )
    return FlowSchedule(float(config["shift"]))
