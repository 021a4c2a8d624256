"""The configuration: what a run is (method) and where it runs (cluster), as frozen pydantic models.

Unknown keys are errors, so a typo never becomes a default. An algorithm is a named variant whose defaults are the
vetted run. ``recipes.load`` turns a recipe's name or a YAML file into one ``Config``.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from opd_ray.errors import ConfigError

__all__ = [
    "AlgorithmConfig",
    "BatchConfig",
    "ClusterConfig",
    "Config",
    "EmaConfig",
    "EvaluationConfig",
    "LearnerPlacement",
    "LoraConfig",
    "ModelConfig",
    "OpdConfig",
    "OptimizerConfig",
    "Placement",
    "PluginAlgorithmConfig",
    "RolePlacement",
    "SamplingConfig",
    "TeacherConfig",
    "parse",
]

ROLES = ("rollout", "teacher", "reward", "learner", "default", "base", "student", "reference", "old")
Beta = Annotated[float, Field(ge=0, lt=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""The eight attention projections that the paper trains."""


class Frozen(BaseModel):
    """Base of every section: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        """Name what is allowed where a key is unknown; pydantic's own message does not."""
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"unknown key {key!r}{hint}; allowed: {', '.join(cls.model_fields)}")
        return data


class ModelConfig(Frozen):
    """The base model that student and LoRA teachers share."""

    family: str = "sd3"
    """A built-in family (sd3) or your own as package.module:Class."""
    path: str
    """A diffusers folder, a hub id, or `world` for the built-in tiny model."""
    revision: str | None = None
    subfolder: str | None = None
    max_sequence_length: int = Field(128, ge=1, le=512)
    """Tokens of the T5 encoder (the paper's 128); never more than its tokenizer's own limit."""


class LoraConfig(Frozen):
    """The student's adapter. Defaults are the paper's."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64, gt=0)
    targets: tuple[str, ...] = ATTENTION
    """Module name endings that get an adapter."""


class StudentConfig(Frozen):
    """What is trained."""

    lora: LoraConfig = LoraConfig()
    guidance: float = Field(4.5, ge=0)
    """Classifier-free guidance of the student: one value for rollout, training and evaluation."""


class SamplingConfig(Frozen):
    """The student's denoising path."""

    steps: int = Field(10, ge=1)
    """Denoising steps of a rollout (paper: 10)."""


class OpdConfig(Frozen):
    """On-policy distillation (arXiv 2605.15055)."""

    name: Literal["opd"] = "opd"
    objective: Literal["mean", "kl"] = "mean"
    """`mean`: 1/2 |mu_S - mu_T|^2 (Eq. 12, default). `kl`: divided by the kernel's variance (Eq. 11), needs noise."""
    loss_target: Literal["xt", "v", "x0"] = "xt"
    """The space in which `mean` compares: next state (paper), velocity, or clean prediction."""
    kernel: Literal["flow", "dance", "cps", "ddim"] = "flow"
    """The step that draws and that the loss compares."""
    noise_level: float = Field(0.0, ge=0)
    """Stochasticity `a` of the kernel; 0 is the ODE (paper's default)."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """The first int(fraction * steps) steps are trained on (paper: 0.99, so that the last is left out)."""
    steps_per_item: int | None = Field(None, ge=1)
    """How many of the trained steps each work item uses, drawn at random from the item's seed; null: all."""
    task_weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Relative weight of each task's loss; 1 where not given."""


class PluginAlgorithmConfig(Frozen):
    """Your own algorithm: name is package.module:Class, args are its keyword arguments."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    args: dict[str, Any] = {}


def _algorithm_tag(value: Any) -> str:
    if isinstance(value, dict):
        name = value.get("name", "opd")
    else:  # `algorithm: opd` is text, not a section
        name = value.name if isinstance(value, OpdConfig | PluginAlgorithmConfig) else ""
    return "plugin" if ":" in str(name) else str(name)


AlgorithmConfig = Annotated[
    Annotated[OpdConfig, Tag("opd")] | Annotated[PluginAlgorithmConfig, Tag("plugin")],
    Discriminator(
        _algorithm_tag,
        custom_error_type="unknown_algorithm",
        custom_error_message="unknown algorithm; known: opd. For your own use package.module:Class",
    ),
]


class OptimizerConfig(Frozen):
    """AdamW. Defaults are the reference's."""

    lr: float = Field(3e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` decays to zero over the run's rounds."""


class EmaConfig(Frozen):
    """Exponential moving average of the trained weights: what is saved, sampled and scored when it is on."""

    decay: float = Field(0.9, gt=0, lt=1)
    every: int = Field(8, ge=1)
    """Optimizer steps between two averages."""


class BatchConfig(Frozen):
    """How experience is cut. A work item is the forward batch on every role."""

    images_per_task: int = Field(24, ge=1)
    """Images of each task in a round (paper: 24)."""
    item_size: int = Field(8, ge=1)
    images_per_prompt: int = Field(1, ge=1)


class TeacherConfig(Frozen):
    """One frozen specialist."""

    lora: str
    """A LoRA in diffusers' format over the same base: folder, file, hub id, or `world/<name>`."""
    revision: str | None = None
    subfolder: str | None = None
    guidance: float = Field(4.5, ge=0)
    tasks: tuple[str, ...] = ()
    """The tasks it teaches; its own name when empty."""


class PromptsConfig(Frozen):
    """Prompt files: one file whose rows name their task, or one file a task."""

    train: str | dict[str, str]
    eval: str | dict[str, str] | None = None
    """Held-out prompts; tasks without a teacher are allowed here and are only scored."""


class EvaluationConfig(Frozen):
    """Scores of base, teachers and student on the same prompts and seeds."""

    images_per_task: int = Field(64, ge=0)
    """0: no evaluation."""
    steps: int = Field(40, ge=1)
    batch: int = Field(32, ge=1)
    every: int = Field(0, ge=0)
    """Rounds between two evaluations of the student; 0: only at the end."""
    rewards: dict[str, tuple[str, ...]] = {}
    """Task -> the rewards that score it, its own first; the reward of the task's own name where not given."""


class CheckpointConfig(Frozen):
    """When a resumable state is written."""

    every: int = Field(10, ge=1)
    """Rounds."""
    keep: int = Field(3, ge=1)


class Placement(Frozen):
    """What each worker of a role gets."""

    threads: int = Field(1, ge=1)
    """Torch threads."""
    resources: dict[str, float] = {"cpu": 1.0}
    """Of each worker: cpu, gpu, and custom Ray resources such as teacher_node. Ray only counts them."""

    @field_validator("resources")
    @classmethod
    def _runs_on_cpu(cls, resources: dict[str, float]) -> dict[str, float]:
        if any(amount < 0 for amount in resources.values()):
            raise ValueError("amounts are 0 or more")
        if resources.get("gpu"):
            raise ValueError("this version computes on CPU; set gpu to 0")
        return resources


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
    """One pool whose workers hold every teacher LoRA; otherwise each teacher has workers of its own."""
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


class Config(Frozen):
    """One run."""

    name: str = Field(pattern=NAME)
    """The run folder is runs/<name>."""
    seed: int = Field(0, ge=0)
    rounds: int = Field(ge=1)
    model: ModelConfig
    precision: Literal["auto", "fp32"] = "auto"
    student: StudentConfig = StudentConfig()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = OpdConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig | None = EmaConfig()
    batch: BatchConfig = BatchConfig()
    teachers: dict[str, TeacherConfig] = {}
    rewards: dict[str, dict[str, Any]] = {}
    """By built-in name or package.module:attr; the value holds its keyword arguments."""
    prompts: PromptsConfig | None = None
    recorded: str | None = None
    """Folder of recorded experience (<task>/<name>.safetensors), for algorithms that need no rollouts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.batch.images_per_task % self.batch.item_size:
            raise ValueError(
                f"batch.item_size {self.batch.item_size} does not divide batch.images_per_task "
                f"{self.batch.images_per_task}; every work item has the same size"
            )
        if self.batch.item_size % self.batch.images_per_prompt:
            raise ValueError(
                f"batch.images_per_prompt {self.batch.images_per_prompt} does not divide batch.item_size "
                f"{self.batch.item_size}; a prompt's images stay in one work item"
            )
        if isinstance(self.algorithm, OpdConfig):
            self._check_opd(self.algorithm)
        for name in self.teachers:
            if name in ROLES or not re.match(NAME, name):
                raise ValueError(f"teacher name {name!r} is not free; roles are {', '.join(ROLES)}. Choose another")
        if self.cluster.runtime == "local" and self.cluster.learner.ranks > 1:
            raise ValueError("cluster.learner.ranks: runtime local has one rank; use runtime: ray")
        tasks = self.teacher_of_task or self._own_files()
        items = len(tasks) * (self.batch.images_per_task // self.batch.item_size)
        if tasks and items < self.cluster.learner.ranks:
            raise ValueError("cluster.learner.ranks: a round has fewer work items than ranks; lower batch.item_size")
        known = ", ".join(self.teachers) or "none"
        for name in sorted(self.cluster.teachers.keys() - {"default"}):
            if name not in self.teachers:
                raise ValueError(f"cluster.teachers.{name}: no such teacher; known: {known}")
            if self.cluster.share_teachers:
                raise ValueError(f"cluster.teachers.{name}: teachers are shared, so only `default` applies")
        if (self.prompts is None) == (self.recorded is None):
            raise ValueError("give either prompts (rollouts draw on them) or recorded (experience to read)")
        if self._own_files():
            self.check_tasks(self._own_files())
        return self

    def _own_files(self) -> tuple[str, ...]:
        """The tasks that have a prompt file of their own; the others are known once their file is read."""
        train = self.prompts.train if self.prompts else {}
        return tuple(train) if isinstance(train, dict) else ()

    def _check_opd(self, opd: OpdConfig) -> None:
        if not self.teachers:
            raise ValueError("teachers is empty; algorithm opd learns from at least one")
        if int(opd.timestep_fraction * self.sampling.steps) < 1:
            raise ValueError(
                f"algorithm.timestep_fraction {opd.timestep_fraction} of {self.sampling.steps} steps leaves no step to "
                "train on; raise one of them"
            )
        if opd.objective == "kl" and opd.noise_level == 0:
            raise ValueError(
                "algorithm.objective kl divides by the kernel's variance, which is 0 at noise_level 0; set "
                "algorithm.noise_level (paper's ablation: 0.7) or objective: mean"
            )
        if opd.objective == "kl" and opd.loss_target != "xt":
            raise ValueError(f"algorithm.loss_target {opd.loss_target} belongs to objective mean; kl compares xt")
        known = ", ".join(self.teacher_of_task)
        for task in sorted(opd.task_weights.keys() - self.teacher_of_task.keys()):
            raise ValueError(f"algorithm.task_weights.{task}: no such task; known: {known}")

    @property
    def teacher_of_task(self) -> dict[str, str]:
        """Routing: task -> teacher."""
        routes: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for task in teacher.tasks or (name,):
                if task in routes:
                    raise ValueError(f"task {task!r} has two teachers, {routes[task]} and {name}; give it one")
                routes[task] = name
        return routes

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Every trained task has a teacher and every teacher a task, where there are teachers at all."""
        if not self.teachers:
            return
        routes = self.teacher_of_task
        for task in tasks:
            if task not in routes:
                raise ConfigError(
                    f"task {task!r} of prompts.train has no teacher; teachers serve {', '.join(sorted(routes))}. "
                    f"Add it to a teacher's tasks or remove the prompts"
                )
        for task, name in routes.items():
            if task not in tasks:
                raise ConfigError(
                    f"teacher {name!r} serves task {task!r}, which has no training prompts; "
                    f"prompts.train has {', '.join(sorted(tasks))}. Add prompts or remove the teacher"
                )


def parse(data: dict[str, Any], where: str) -> Config:
    """A configuration from plain data; ``where`` names it in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_problem(item) for item in error.errors())) from None


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in {"opd", "plugin"})
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{where} is missing"
    value = item["input"]
    if item["type"] == "unknown_algorithm" and isinstance(value, dict):
        value = value["name"]
    seen = "" if item["type"] == "value_error" else f", got {value!r}"
    return f"{where}: {message}{seen}" if where else message
