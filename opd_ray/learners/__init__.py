"""What one learner rank does, as plain classes: nothing here knows Ray."""

from opd_ray.config import LearnerPlacement
from opd_ray.learners.ddp import DdpEngine
from opd_ray.learners.engine import Engine
from opd_ray.learners.learner import Learner, LearnerState
from opd_ray.learners.sums import UpdateReport

__all__ = ["DdpEngine", "Engine", "Learner", "LearnerState", "UpdateReport", "make_engine"]


def make_engine(placement: LearnerPlacement, rank: int) -> Engine:
    """The engine of one rank, as the configuration names it; importing torch's FSDP or DeepSpeed takes a while.

    Raises:
        ConfigError: its package is not installed.
        RuntimeError: it is not what was asked for.
    """
    ranks, device = placement.ranks, placement.device
    match placement.backend:
        case "fsdp2":
            from opd_ray.learners.fsdp2 import FsdpEngine

            return FsdpEngine(rank, ranks, device=device)
        case "deepspeed":
            from opd_ray.learners.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(rank, ranks, device=device, stage=placement.stage, cpu_offload=placement.cpu_offload)
        case _:
            return DdpEngine(rank, ranks, device=device)
