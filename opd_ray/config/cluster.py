"""Where a run runs: the workers of each role and what they get."""

from typing import Literal

from pydantic import Field, field_validator

from opd_ray.config.section import Frozen

__all__ = ["ClusterConfig", "LearnerPlacement", "Placement", "RolePlacement"]


class Placement(Frozen):
    """What each worker of a role gets."""

    threads: int = Field(1, ge=1)
    """Torch threads."""
    resources: dict[str, float] = {"cpu": 1.0}
    """Of each worker: cpu, gpu, and custom Ray resources such as teacher_node. Ray only counts them."""

    @field_validator("resources")
    @classmethod
    def _amounts(cls, resources: dict[str, float]) -> dict[str, float]:
        if any(amount < 0 for amount in resources.values()):
            raise ValueError("amounts are 0 or more")
        return resources

    @property
    def device(self) -> str:
        """Where its workers compute: on a card where they ask for one, or for a part of one."""
        return "cuda" if self.resources.get("gpu") else "cpu"


class RolePlacement(Placement):
    """Workers of one elastic role."""

    workers: int = Field(1, ge=1)


class LearnerPlacement(Placement):
    """The learner group."""

    backend: Literal["ddp"] = "ddp"
    ranks: int = Field(1, ge=1)


class ClusterConfig(Frozen):
    """Where a run runs."""

    runtime: Literal["ray", "local"] = "ray"
    """`local`: every role in this process, one after the other, for debugging."""
    max_staleness: int = Field(0, ge=0)
    """Rounds that the drawing weights may be behind the training ones; 0 is strictly on-policy."""
    share_teachers: bool = False
    """One pool whose workers hold every teacher; otherwise each teacher has workers of its own."""
    teacher_memory_gb: float | None = Field(None, gt=0)
    """Weights that one teacher worker may hold (1e9 bytes): full checkpoints come when asked for, and those not asked
    for the longest go. Not given: everything is loaded at the start and stays."""
    share_base: bool = False
    """One copy of the frozen base for all roles, in one process (runtime: local): for a single card."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Of each card; where given, roles whose estimate does not fit are refused before anything is loaded."""
    rollout: RolePlacement = RolePlacement()
    teachers: dict[str, RolePlacement] = {"default": RolePlacement()}
    """By teacher name; `default` serves the others, and all of them when they are shared."""
    rewards: dict[str, RolePlacement] = {"default": RolePlacement()}
    learner: LearnerPlacement = LearnerPlacement()
    start_timeout_s: float = Field(300, gt=0)
    """How long workers may take to start before the run says what is missing and stops."""
    call_timeout_s: float = Field(600, gt=0)
    """How long one request may take before its worker counts as lost."""
    object_store_mb: int = Field(256, ge=80)
    """Object store of a Ray that this run starts itself."""

    def of_teacher(self, name: str = "default") -> RolePlacement:
        """Where a teacher's workers are: its own entry, or the default's."""
        return self.teachers.get(name, self.teachers.get("default", RolePlacement()))
