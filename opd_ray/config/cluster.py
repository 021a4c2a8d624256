"""Where a run runs: the workers of each role and what they get."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from opd_ray.config.section import Frozen

__all__ = ["Autoscale", "ClusterConfig", "LearnerPlacement", "Placement", "RewardPlacement", "RolePlacement"]


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


class Autoscale(Frozen):
    """How far a role's workers may follow its load."""

    min: int = Field(1, ge=1)
    """Fewest workers."""
    max: int = Field(ge=1)
    """Most workers."""
    target: float = Field(0.1, gt=0, lt=1)
    """Share of wall time in which work of this role may find no free worker: more of it starts another worker, less
    than a quarter of it ends one whose work fits into the others."""


class RolePlacement(Placement):
    """Workers of one elastic role."""

    workers: int = Field(1, ge=1)
    """At the start; `opd-ray scale` and autoscale change it while the run goes on."""
    autoscale: Autoscale | None = None
    """Off where null, and with `runtime: local`."""

    @model_validator(mode="after")
    def _within(self) -> "RolePlacement":
        limits = self.autoscale
        if limits is not None and not limits.min <= self.workers <= limits.max:
            raise ValueError(
                f"workers {self.workers} is not within autoscale.min {limits.min} and autoscale.max {limits.max}; "
                "set workers to where it begins"
            )
        return self


class RewardPlacement(RolePlacement):
    """Workers of a reward of its own name, or of all that have no entry (`default`)."""

    runtime_env: dict[str, Any] = {}
    """Ray's, of these workers alone: pip, uv, conda, image_uri, py_modules, env_vars, config. Rewards whose packages
    do not go together, or not with this program's, each get an environment of their own. `${NAME}` in a variable is
    that of where the run starts: secrets need not stand in a recipe, of which every run folder keeps a copy."""
    batch: int | None = Field(None, ge=1)
    """Pictures that a reward is given at once; as they were drawn where null."""
    deadline_s: float | None = Field(None, gt=0)
    """How long one request (a work item's pictures, with all that is tried again) may take before its worker is
    replaced; `cluster.call_timeout_s` where null."""
    retries: int = Field(2, ge=0)
    """How often a picture is tried again on which a reward raised. Then it is set aside: it has no score, and is listed
    with its error. A request whose worker is lost goes to as many others, two at least."""
    max_failed: float = Field(0.05, ge=0, le=1)
    """Share of a round's or an evaluation's pictures that a reward may fail on, of those that it applies to; above it
    the run stops."""

    @field_validator("runtime_env")
    @classmethod
    def _known(cls, env: dict[str, Any]) -> dict[str, Any]:
        known = ("pip", "uv", "conda", "image_uri", "py_modules", "env_vars", "config")
        if wrong := [name for name in env if name not in known]:
            raise ValueError(f"{wrong[0]} is not among {', '.join(known)}")
        return env


class LearnerPlacement(Placement):
    """The learner group."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """ddp: each rank holds everything. fsdp2: each holds a part of every weight, for a base that does not fit one card
    (but the memory of its node: each rank reads it there first). deepspeed: ZeRO (the extra opd-ray[deepspeed])."""
    ranks: int = Field(1, ge=1)
    """Processes that learn together, each with its own part of a round's work items; fixed for a run."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed's: parts of the moments (1), of the gradients too (2, where not given), of the weights too (3)."""
    cpu_offload: bool = False
    """DeepSpeed keeps moments in CPU memory, and steps there."""

    @property
    def stage(self) -> int:
        """ZeRO's, with its default."""
        return self.zero_stage or 2

    @property
    def spreads_weights(self) -> bool:
        """Whether a rank holds only a part of each weight between the forwards."""
        return self.backend == "fsdp2" or (self.backend == "deepspeed" and self.stage == 3)

    @field_validator("resources")
    @classmethod
    def _some(cls, resources: dict[str, float]) -> dict[str, float]:
        if not any(resources.values()):
            raise ValueError("ranks meet in a placement group, which needs an amount above 0; for instance cpu: 0.25")
        return resources

    @model_validator(mode="after")
    def _options_of_the_backend(self) -> "LearnerPlacement":
        for name, chosen in (("zero_stage", self.zero_stage), ("cpu_offload", self.cpu_offload)):
            if chosen and self.backend != "deepspeed":
                raise ValueError(
                    f"{name} {str(chosen).lower()} is DeepSpeed's, and backend is {self.backend}; leave it out, or set "
                    "backend: deepspeed"
                )
        return self


class ClusterConfig(Frozen):
    """Where a run runs."""

    runtime: Literal["ray", "local"] = "ray"
    """`local`: every role in this process, one after the other, for debugging."""
    max_staleness: int = Field(0, ge=0)
    """Rounds that the drawing weights may be behind the training ones; 0 is strictly on-policy."""
    step_chunks: int = Field(1, ge=1)
    """Parts in which a drawing is handed over: teachers mark the first steps while the student draws the next. It
    changes no bit of the result."""
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
    """Workers that draw with the student."""
    teachers: dict[str, RolePlacement] = {"default": RolePlacement()}
    """By teacher name; `default` serves the others, and all of them when they are shared."""
    rewards: dict[str, RewardPlacement] = {"default": RewardPlacement()}
    """By reward: those with an entry have workers of their own; those of `default` hold all others."""
    learner: LearnerPlacement = LearnerPlacement()
    """The ranks that train the student."""
    storage: Literal["shared", "ship"] = "shared"
    """`shared`: every node sees the run folder at the driver's path. `ship`: the driver's node alone does; a worker
    beside the driver writes what the others return, and their logs stay on their nodes."""
    start_timeout_s: float = Field(300, gt=0)
    """How long workers may take to start before the run says what is missing and stops."""
    call_timeout_s: float = Field(600, gt=0)
    """How long one request may take before its worker counts as lost."""
    heartbeat_timeout_s: float = Field(60, gt=0)
    """How long a worker may give no sign of life, whatever it does, before it counts as lost."""
    nodes_may_come: bool = False
    """A cluster autoscaler may add nodes: what the present ones have no room for is waited for, not refused."""
    object_store_mb: int = Field(256, ge=80)
    """Object store of a Ray that this run starts itself."""
    plasma_fraction: float = Field(0.7, gt=0, le=1)
    """The part of any node's object store that the rounds under way may fill; fewer are drawn ahead otherwise."""

    def of_teacher(self, name: str = "default") -> RolePlacement:
        """Where a teacher's workers are: its own entry, or the default's."""
        return self.teachers.get(name, self.teachers.get("default", RolePlacement()))

    def of_reward(self, name: str = "default") -> RewardPlacement:
        """Where a reward's workers are: its own entry, or the default's."""
        return self.rewards.get(name, self.rewards.get("default", RewardPlacement()))

    def panels(self, rewards: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Entry of ``rewards`` -> the rewards that its workers hold."""
        held: dict[str, tuple[str, ...]] = {}
        for name in rewards:
            entry = name if name in self.rewards else "default"
            held[entry] = (*held.get(entry, ()), name)
        return held
