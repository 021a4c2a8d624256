"""One run: all sections together, and whether they fit."""

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from opd_ray.config.alignment import PsoConfig
from opd_ray.config.cluster import ClusterConfig
from opd_ray.config.method import (
    ALGORITHMS,
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    EmaConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OpdConfig,
    OptimizerConfig,
    PairsConfig,
    Precision,
    PrecisionConfig,
    PromptsConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_ray.config.section import Frozen, problems
from opd_ray.config.stages import SPECIALISTS, STUDENT, SpecialistConfig
from opd_ray.errors import ConfigError

__all__ = ["REFERENCE", "Config", "parse"]

REFERENCE = "reference"
"""The teacher that stands for the frozen start, where an algorithm compares with it."""
ROLES = (
    *("rollout", "teacher", "reward", "learner", "default"),
    *("base", "student", "behaviour", "reference", "old", "fake"),
)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class Config(Frozen):
    """One run."""

    name: str = Field(pattern=NAME)
    """The run folder is runs/<name>."""
    seed: int = Field(0, ge=0)
    """All of a run's noise, and the order of its prompts, come from this one number."""
    rounds: int = Field(ge=1)
    """Batches of experience; each is one optimizer step in on-policy distillation."""
    model: ModelConfig
    """The base model."""
    precision: PrecisionConfig = PrecisionConfig()
    """One of auto, fp32, bf16, fp16 for all roles, or a section with one for each."""
    student: StudentConfig = StudentConfig()
    """The model that is trained."""
    sampling: SamplingConfig = SamplingConfig()
    """How the student draws."""
    algorithm: AlgorithmConfig = OpdConfig()
    """What it learns from the drawings."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights follow gradients."""
    ema: EmaConfig | None = EmaConfig()
    """Moving average of the student; off where null."""
    batch: BatchConfig = BatchConfig()
    """The size of a round and of its work items."""
    teachers: dict[str, TeacherConfig] = {}
    """By a name of your choice, which is also the task where `tasks` is empty."""
    specialists: dict[str, SpecialistConfig] = {}
    """Runs that train teachers before this one begins, by a name of your choice; a teacher with `lora:
    specialists/<name>` is what the one of that name leaves."""
    rewards: dict[str, dict[str, Any]] = {}
    """By built-in name or package.module:attr; the value holds its keyword arguments, and `probe: finite` for one
    that has no pairs of pictures to prove itself by."""
    prompts: PromptsConfig | None = None
    """What rollouts draw (`train`) and what is scored (`eval`, which recorded experience and pairs may have, too)."""
    recorded: str | None = None
    """Folder of recorded experience (<task>/<name>.safetensors), for algorithms that need no rollouts."""
    pairs: PairsConfig | None = None
    """Preference pairs to learn from, for algorithms that need no rollouts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How base, teachers and student are compared."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the run can be resumed from."""
    logging: LoggingConfig = LoggingConfig()
    """Where its numbers are shown too."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it runs: in a recipe also the name or path of a file that says it (configs/cluster)."""

    @field_validator("precision", mode="before")
    @classmethod
    def _for_all_roles(cls, value: Any) -> Any:
        known = get_args(Precision)
        if isinstance(value, str) and value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, or a section with one for each role, got {value!r}")
        return dict.fromkeys(PrecisionConfig.model_fields, value) if isinstance(value, str) else value

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
        known_steps = self.model.distilled_steps
        scored = self.evaluation.steps if self.evaluated else ()
        for key, steps in (("sampling.steps", self.sampling.steps), *(("evaluation.steps", n) for n in scored)):
            if known_steps is not None and steps not in known_steps:
                raise ValueError(
                    f"{key} {steps}: the model was distilled to "
                    f"{', '.join(map(str, known_steps)) or 'no'} steps (model.distilled_steps); take one of these"
                )
        if isinstance(self.algorithm, OpdConfig):
            self._check_opd(self.algorithm)
        self._check_weights()
        for name in self.teachers:
            if (name in ROLES and not self._is_reference(name)) or not re.match(NAME, name):
                raise ValueError(f"teacher name {name!r} is not free; roles are {', '.join(ROLES)}. Choose another")
        self._check_specialists()
        self._check_placement()
        self._check_items()
        known = ", ".join(self.teachers) or "none"
        for name in sorted(self.cluster.teachers.keys() - {"default"}):
            if name not in self.teachers:
                raise ValueError(f"cluster.teachers.{name}: no such teacher; known: {known}")
            if self.cluster.share_teachers:
                raise ValueError(f"cluster.teachers.{name}: teachers are shared, so only `default` applies")
        self._check_rewards()
        if sum(source is not None for source in (self.drawn, self.recorded, self.pairs)) != 1:
            raise ValueError(
                "give one of prompts.train (rollouts draw on them), recorded (experience to read) and pairs "
                "(preferences)"
            )
        if self._own_files():
            self.check_tasks(self._own_files())
        return self

    def _check_specialists(self) -> None:
        """Each teaches somebody, and each that is to teach is trained."""
        known = ", ".join(self.specialists) or "none"
        for name, teacher in self.teachers.items():
            if self.specialists and teacher.specialist is not None and teacher.specialist not in self.specialists:
                raise ValueError(
                    f"teachers.{name}.lora {teacher.lora}: no such specialist; known: {known}. A folder of that name "
                    f"is ./{teacher.lora}"
                )
        for name in self.specialists:
            if name == STUDENT or not re.match(NAME, name):
                raise ValueError(f"specialist name {name!r} is not free: it names a run folder beside {STUDENT}'s")
            if name not in {teacher.specialist for teacher in self.teachers.values()}:
                raise ValueError(
                    f"specialists.{name} teaches nobody; give a teacher lora: {SPECIALISTS}{name}, or take it out"
                )

    def _check_items(self) -> None:
        """Every rank has work in every update."""
        tasks, ranks = self._tasks(), self.cluster.learner.ranks
        of_task, in_turn = self.batch.images_per_task // self.batch.item_size, self.batch.tasks == "in_turn"
        if in_turn and self.drawn is None:
            raise ValueError("batch.tasks in_turn is of what is drawn (prompts.train); set it to together")
        if in_turn and getattr(self.algorithm, "task_weights", {}):
            raise ValueError(
                "algorithm.task_weights weigh the tasks of one round, and with batch.tasks in_turn it has but one; "
                "leave them out, or set batch.tasks: together"
            )
        if tasks and (1 if in_turn else len(tasks)) * of_task < ranks:
            raise ValueError("cluster.learner.ranks: a round has fewer work items than ranks; lower batch.item_size")
        parts = getattr(self.algorithm, "item_parts", 1)
        if parts > 1 and of_task // parts < ranks:
            raise ValueError(
                f"algorithm.item_parts {parts}: each part needs a work item of each task for each of {ranks} learner "
                f"ranks, and a task has {of_task} (batch.images_per_task / batch.item_size); lower batch.item_size, or "
                "set algorithm.item_parts: 1"
            )

    def _check_weights(self) -> None:
        """A misspelt name must not become a weight of 1."""
        rewards: dict[str, float] = getattr(self.algorithm, "reward_weights", {})
        for name in sorted(rewards.keys() - self.rewards.keys()):
            known = ", ".join(self.rewards) or "none"
            raise ValueError(f"algorithm.reward_weights.{name}: no such reward; known: {known}")
        if self.rewards and not any(rewards.get(name, 1.0) for name in self.rewards):
            raise ValueError(
                "algorithm.reward_weights are all 0, so that nothing is rewarded; give one of them a weight"
            )
        chosen: dict[str, tuple[str, ...]] = getattr(self.algorithm, "task_rewards", {})
        for task, names in sorted(chosen.items()):
            for name in (name for name in names if name not in self.rewards):
                known = ", ".join(self.rewards) or "none"
                raise ValueError(f"algorithm.task_rewards.{task}: no reward {name!r}; known: {known}")
            if not any(rewards.get(name, 1.0) for name in names):
                raise ValueError(
                    f"algorithm.task_rewards.{task}: the weight of {', '.join(names)} is 0 (algorithm.reward_weights), "
                    "so that nothing is rewarded; give one of them a weight"
                )
        known_tasks = self._tasks()  # none where they are known once their file is read
        for key in ("task_weights", "task_rewards"):
            tasks: dict[str, Any] = getattr(self.algorithm, key, {})
            for task in sorted(tasks.keys() - set(known_tasks)) if known_tasks else ():
                raise ValueError(f"algorithm.{key}.{task}: no such task; known: {', '.join(known_tasks)}")

    def _check_rewards(self) -> None:
        for name, placement in sorted(self.cluster.rewards.items()):
            if name not in {"default", *self.rewards}:
                known = ", ".join(self.rewards) or "none"
                raise ValueError(f"cluster.rewards.{name}: no such reward; known: {known}, and default for all others")
            if placement.runtime_env and self.cluster.runtime == "local":
                raise ValueError(
                    f"cluster.rewards.{name}.runtime_env: with runtime local every reward is in this process; "
                    "set runtime: ray, or take it out"
                )

    def _is_reference(self, name: str) -> bool:
        """Whether a teacher stands for the frozen start; the only one there is, and drawn from as the student is."""
        if name != REFERENCE or not isinstance(self.algorithm, PsoConfig):
            return False
        if self.batch.images_per_prompt > 2:
            raise ValueError(
                f"teachers.{name} marks every image, and of batch.images_per_prompt {self.batch.images_per_prompt} two "
                "are trained on; set it to 2, or leave the reference to the learner"
            )
        if len(self.teachers) > 1 or self.teachers[name].guidance != self.student.guidance:
            raise ValueError(
                f"teachers.{name} stands for the frozen start of algorithm {self.algorithm.name}: it is the only "
                f"teacher, its tasks are all tasks, and its guidance is student.guidance ({self.student.guidance:g})"
            )
        return True

    def _check_placement(self) -> None:
        learner = self.cluster.learner
        if self.cluster.runtime == "local" and learner.ranks > 1:
            raise ValueError("cluster.learner.ranks: runtime local has one rank; use runtime: ray")
        if learner.ranks > 1 and 0 < learner.resources.get("gpu", 0) < 1:
            raise ValueError("cluster.learner.resources.gpu: ranks cannot share a card; give each of them a whole one")
        if self.cluster.share_base:
            self._check_sharing()

    def _check_sharing(self) -> None:
        """One network serves all roles, so it is in one process, on one device and in one number format."""
        if self.cluster.runtime != "local":
            raise ValueError("cluster.share_base: workers of Ray are processes of their own; use runtime: local")
        if self.cluster.learner.backend != "ddp":
            raise ValueError(
                f"cluster.share_base: backend {self.cluster.learner.backend} spreads the base over ranks, and other "
                "roles use it whole; set cluster.learner.backend: ddp"
            )
        if self.student.lora is None:
            raise ValueError(
                "cluster.share_base: student.lora null trains the base itself, and other roles use it as it was; set "
                "share_base: false, or train a LoRA"
            )
        cluster, teachers = self.cluster, self.cluster.teachers.values()
        if max(p.workers for p in (cluster.rollout, *teachers)) > 1:
            raise ValueError("cluster.share_base: all roles are in one process; set the workers of each to 1")
        own = {teacher.precision for teacher in self.teachers.values() if teacher.lora is not None} - {None}
        formats = {*self.precision.model_dump().values(), *own}
        devices = {p.device for p in (cluster.rollout, cluster.learner, *teachers)}
        if len(formats) > 1 or len(devices) > 1:
            raise ValueError(
                f"cluster.share_base: all roles use one copy, so precision ({', '.join(sorted(formats))}) and device "
                f"({', '.join(sorted(devices))}) have to be the same for all"
            )

    def _tasks(self) -> tuple[str, ...]:
        """As far as the configuration alone says."""
        return tuple(self.teacher_of_task) or self._own_files() or ((self.pairs.task,) if self.pairs else ())

    def _own_files(self) -> tuple[str, ...]:
        """The tasks that have a prompt file of their own; the others are known once their file is read."""
        return tuple(self.drawn) if isinstance(self.drawn, dict) else ()

    def _check_opd(self, opd: OpdConfig) -> None:
        if not self.teachers and opd.states == "student":
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

    @property
    def drawn(self) -> str | dict[str, str] | None:
        """The files of prompts that rollouts draw to learn from; None where experience is recorded, or is pairs."""
        return self.prompts.train if self.prompts else None

    @property
    def evaluated(self) -> bool:
        """Whether models are drawn with, and scored."""
        return bool(self.prompts and self.prompts.eval and self.evaluation.images_per_task)

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
        raise ConfigError(f"{where}: {problems(error, {*ALGORITHMS, 'plugin'})}") from None
