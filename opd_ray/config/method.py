"""What a run is: the model, what is trained on what and how, and how it is judged."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from opd_ray.config.alignment import (
    DdpoConfig,
    DpoConfig,
    Kernel,
    PsoConfig,
    PsoOfflineConfig,
    SdpoConfig,
    SftConfig,
    StepwiseConfig,
)
from opd_ray.config.matching import DmdConfig, TdmConfig
from opd_ray.config.reinforcement import FlowGrpoConfig, GrpoGuardConfig, NftConfig
from opd_ray.config.section import Frozen
from opd_ray.config.stages import SPECIALISTS

__all__ = [
    "ATTENTION",
    "AlgorithmConfig",
    "BatchConfig",
    "CheckpointConfig",
    "EmaConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OpdConfig",
    "OpdPpoConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PluginAlgorithmConfig",
    "Precision",
    "PrecisionConfig",
    "PromptsConfig",
    "SamplingConfig",
    "StudentConfig",
    "TeacherConfig",
    "WandbConfig",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""auto: fp32 on the CPU; on a GPU bf16 where it has it, else fp16."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[int, Field(ge=1)]
ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""The eight attention projections of SD3 that the paper trains."""


class ModelConfig(Frozen):
    """The base model that student and LoRA teachers share."""

    family: str = "sd3"
    """A built-in family (sd3; sd for Stable Diffusion 1.5, 2, Turbo; sdxl) or your own as package.module:Class."""
    path: str
    """A diffusers folder, a hub id, or `world` for the built-in tiny model."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; its newest where not given."""
    subfolder: str | None = None
    """Of the folder or repository, where the pipeline is not at its root."""
    resolution: int | None = Field(None, ge=8)
    """Height and width of the pictures in pixels; the model's own where not given."""
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How a path of few steps goes through the timesteps of `sd` and `sdxl`; as its scheduler says where not given."""
    distilled_steps: tuple[Steps, ...] | None = None
    """The numbers of steps that a distilled model knows (such as [1, 2, 4]), one of which sampling.steps has to be."""
    max_sequence_length: int = Field(128, ge=1, le=512)
    """Tokens of the T5 encoder (the paper's 128); never more than its tokenizer's own limit."""


class PrecisionConfig(Frozen):
    """What each role's denoiser computes in. Latents, step arithmetic, adapters and the VAE are float32 always."""

    rollout: Precision = "auto"
    """`auto`: fp32 on the CPU; on a card bf16 where it has it, else fp16."""
    teacher: Precision = "auto"
    """A teacher may have its own."""
    learner: Precision = "auto"
    """fp16 scales the loss, and skips a step whose gradient overflows."""


class LoraConfig(Frozen):
    """The student's adapter. Defaults are the paper's."""

    rank: int = Field(32, ge=1)
    """Of each pair of matrices A and B."""
    alpha: float = Field(64, gt=0)
    """The adapter's strength: its update B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Module name endings that get an adapter; where not given the family's own: every projection of its attention."""
    start: str | None = None
    """A LoRA of that rank and those targets that training begins with (a run folder, folder, file or hub id), in place
    of a fresh one that changes nothing. It is then also the frozen start (`reference`) that losses compare with or keep
    near: the initial policy of this run. What is scored as `base` stays the model without any."""


class StudentConfig(Frozen):
    """What is trained."""

    lora: LoraConfig | None = LoraConfig()
    """The adapter that is trained; null trains the denoiser itself, every weight of it in float32."""
    guidance: float = Field(4.5, ge=0)
    """Classifier-free guidance of the student: one value for rollout, training and evaluation."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""


class SamplingConfig(Frozen):
    """The student's denoising path."""

    steps: int = Field(10, ge=1)
    """Denoising steps of a rollout (paper: 10)."""


class OpdConfig(Frozen):
    """On-policy distillation (arXiv 2605.15055)."""

    name: Literal["opd"] = "opd"
    """`opd`; your own algorithm as package.module:Class, with `args` in place of the other keys."""
    objective: Literal["mean", "kl"] = "mean"
    """`mean`: 1/2 |mu_S - mu_T|^2 (Eq. 12, default). `kl`: divided by the kernel's variance (Eq. 11), needs noise."""
    loss_target: Literal["xt", "v", "x0"] = "xt"
    """The space in which `mean` compares: next state (paper), velocity, or clean prediction."""
    states: Literal["student", "recorded"] = "student"
    """`student`: of its own drawings (on-policy). `recorded`: of the teachers', as `opd-ray record` wrote them with
    their velocities (offline); no teacher is loaded to train."""
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


class OpdPpoConfig(StepwiseConfig):
    """On-policy distillation by PPO: the baseline of its closed form (arXiv 2605.15055 Eq. 16 to 23)."""

    noiseless: ClassVar[str] = "algorithm opd with objective: mean, which needs no noise"

    name: Literal["opd_ppo"]
    """`opd_ppo`."""
    form: Literal["differentiable_kl", "per_step", "return_to_go", "sampled"] = "differentiable_kl"
    """What a drawn step costs. `differentiable_kl`: the KL from the teacher's, with its gradient (the paper's);
    `per_step`: the same as a constant, by which nothing is learned; `return_to_go`: the sum of those from this step on;
    `sampled`: the log-ratio of the two likelihoods of what was drawn."""
    likelihood: Literal["mean", "sum"] = "mean"
    """How a step's log-ratio is taken over C, H, W: `mean`, as in Flow-GRPO, or the `sum` that a likelihood is, by
    which costs that are KLs add C H W times the noise to the same expected gradient."""
    clip_range: float = Field(1e-4, gt=0, lt=1)
    """Of the likelihood's ratio: 1 in a round's first update, so of no account where that is the only one. The default
    is Flow-GRPO's, for `mean`; PPO's own for the ratio of a `sum` is 0.2."""
    kernel: Kernel = "flow"
    """The step that draws, and whose likelihood is compared."""
    noise_level: float = Field(0.7, ge=0)
    """Stochasticity of the kernel, above 0 (the paper's ablation: 0.7)."""
    steps_per_update: int | None = Field(None, ge=1)
    """Trained steps of each image in one optimizer step; null: all of them, as in `opd`."""
    shuffle_steps: bool = False
    """Each image goes through its steps in an order of its own; of no account where an update has all of them."""


class PluginAlgorithmConfig(Frozen):
    """Your own algorithm: name is package.module:Class, args are its keyword arguments."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    """package.module:Class, importable on every node."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""


ALGORITHMS = (
    *("opd", "opd_ppo", "ddpo", "sdpo_stepwise", "pso_pairwise", "pso_offline", "diffusion_dpo", "sft"),
    *("diffusion_nft", "flow_grpo", "grpo_guard", "dmd", "tdm"),
)


def _algorithm_tag(value: Any) -> str:
    # `algorithm: opd` is text, not a section.
    name = value.get("name", "opd") if isinstance(value, dict) else getattr(value, "name", "")
    return "plugin" if ":" in str(name) else str(name)


AlgorithmConfig = Annotated[
    Annotated[OpdConfig, Tag("opd")]
    | Annotated[OpdPpoConfig, Tag("opd_ppo")]
    | Annotated[DmdConfig, Tag("dmd")]
    | Annotated[TdmConfig, Tag("tdm")]
    | Annotated[DdpoConfig, Tag("ddpo")]
    | Annotated[SdpoConfig, Tag("sdpo_stepwise")]
    | Annotated[PsoConfig, Tag("pso_pairwise")]
    | Annotated[PsoOfflineConfig, Tag("pso_offline")]
    | Annotated[DpoConfig, Tag("diffusion_dpo")]
    | Annotated[SftConfig, Tag("sft")]
    | Annotated[NftConfig, Tag("diffusion_nft")]
    | Annotated[FlowGrpoConfig, Tag("flow_grpo")]
    | Annotated[GrpoGuardConfig, Tag("grpo_guard")]
    | Annotated[PluginAlgorithmConfig, Tag("plugin")],
    Discriminator(
        _algorithm_tag,
        custom_error_type="unknown_algorithm",
        custom_error_message=f"unknown algorithm; known: {', '.join(ALGORITHMS)}. "
        "For your own use package.module:Class",
    ),
]
"""By its name."""


class OptimizerConfig(Frozen):
    """AdamW. Defaults are the reference's."""

    lr: float = Field(3e-4, gt=0)
    """Learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second average, against division by zero."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled; each step takes lr * weight_decay of every weight."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm; a larger gradient is scaled down to it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; `cosine` decays to zero over the run's rounds."""


class EmaConfig(Frozen):
    """Exponential moving average of the trained weights: what is saved, sampled and scored when it is on."""

    decay: float = Field(0.9, gt=0, lt=1)
    """average <- decay * average + (1 - decay) * weights. Less at first: at most (1 + n) / (10 + n) at step n."""
    every: int = Field(8, ge=1)
    """The student's optimizer steps between two averages."""


class BatchConfig(Frozen):
    """How experience is cut. A work item is the forward batch on every role."""

    images_per_task: int = Field(24, ge=1)
    """Images of each task in a round (paper: 24)."""
    item_size: int = Field(8, ge=1)
    """Images of one work item; divides images_per_task."""
    images_per_prompt: int = Field(1, ge=1)
    """Images of one prompt, all in one work item; divides item_size."""
    tasks: Literal["together", "in_turn"] = "together"
    """`together`: a round has images of every task (paper). `in_turn`: of one task, the next round of the next one, so
    that as many images are as many times more rounds as there are tasks."""


class TeacherConfig(Frozen):
    """One frozen specialist."""

    lora: str | None = None
    """A LoRA in diffusers' or PEFT's format over the student's base: folder, file, hub id, `world/<name>`, or
    `specialists/<name>` of one that this run trains first."""
    model: str | None = None
    """Instead of a LoRA: a full checkpoint with the student's latent space and schedule (folder or hub id)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository; its newest where not given."""
    subfolder: str | None = None
    """Of the folder or repository."""
    alpha: float | None = Field(None, gt=0)
    """Of a LoRA whose file does not say it."""
    guidance: float = Field(4.5, ge=0)
    """Classifier-free guidance of its own velocity; 1 is without. What it was trained for."""
    tasks: tuple[str, ...] = ()
    """The tasks it teaches; its own name when empty."""
    precision: Precision | None = None
    """precision.teacher where not given."""

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if (self.lora is None) == (self.model is None):
            raise ValueError("give either lora (over the student's base) or model (a full checkpoint)")
        if self.model is not None and self.alpha is not None:
            raise ValueError("alpha is of a LoRA, and model is a full checkpoint; leave one of them out")
        return self

    @property
    def path(self) -> str:
        """Its LoRA or its checkpoint, as the configuration names it."""
        return str(self.lora or self.model)

    @property
    def specialist(self) -> str | None:
        """Which of the run's own specialists it is, where it is one."""
        return self.lora.removeprefix(SPECIALISTS) if self.lora and self.lora.startswith(SPECIALISTS) else None


class PromptsConfig(Frozen):
    """Prompt files: one file whose rows name their task, or one file a task. Either key, or both."""

    train: str | dict[str, str] | None = None
    """Each file .txt, .csv, .jsonl or .parquet, or `world/<task>/train`; null where nothing is drawn to learn from. The
    text is in a column prompt, text or caption; `task`, `id` and `weight` are optional (a weight of 2: twice in every
    epoch; 0.5: in every other), and rewards get the other columns as metadata."""
    eval: str | dict[str, str] | None = None
    """Held-out prompts; tasks without a teacher are allowed here and are only scored."""
    deduplicate: bool = False
    """Take each text of a task once: its first row. Otherwise a text that comes n times is n prompts."""
    on_bad: Literal["stop", "skip"] = "stop"
    """A malformed row (without a text, no JSON): refuse the run and say where it is, or leave it out and say so."""

    @model_validator(mode="after")
    def _says_something(self) -> "PromptsConfig":
        if self.train is None and self.eval is None:
            raise ValueError("give train (what rollouts draw), eval (what is scored), or both")
        return self


class PairsConfig(Frozen):
    """Preference pairs as experience: of two pictures of one caption, which is the better one."""

    files: tuple[str, ...] = Field(min_length=1)
    """One or several: .parquet with Pick-a-Pic v2's columns (jpg_0, jpg_1, label_0, label_1, caption), .jsonl with rows
    {prompt, winner, loser} of a caption and two paths, or a folder with pairs.jsonl or .parquet files."""
    task: str = Field("pairs", min_length=1)
    """What metrics call them."""
    flip: bool = False
    """Mirror each picture left to right with probability 1/2: not where a caption names sides, or asks for writing."""
    ties: Literal["drop"] = "drop"
    """Pairs without a better picture, or without a label, are left out and counted."""
    on_bad: Literal["skip", "stop"] = "skip"
    """A pair without a caption, or with a picture that cannot be read: leave it out and count it, or end the run."""
    max_bad: float = Field(0.1, ge=0, le=1)
    """The part of a window's pairs whose pictures may be broken before the run ends whatever `on_bad` says."""
    window: int = Field(1024, ge=1)
    """Pairs among which an epoch shuffles rows, after it has shuffled the files' row groups: as many whole row groups
    as hold so many. A worker holds their undecoded pictures in memory."""
    decoders: int = Field(1, ge=1)
    """Tasks of Ray Data that read and decode ahead of each reader at one time (runtime: ray)."""

    @field_validator("files", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class EvaluationConfig(Frozen):
    """Scores of base, teachers and student on the same prompts and seeds."""

    images_per_task: int = Field(64, ge=0)
    """Pictures of each held-out task, a prompt each; 0: no evaluation."""
    steps: tuple[Steps, ...] = Field((40,), min_length=1)
    """Denoising steps of a scored picture (paper: 40). Of several, as in [4, 1, 2, 8], all are scored at the end; the
    first is that of pictures, gaps and evaluations on the way."""
    batch: int = Field(32, ge=1)
    """Pictures in one forward."""
    every: int = Field(0, ge=0)
    """Rounds between two evaluations of the student; 0: only at the end."""
    rewards: dict[str, tuple[str, ...]] = {}
    """Task -> the rewards that score it, its own first; the reward of the task's own name where not given."""

    @field_validator("steps", mode="before", json_schema_input_type=Steps | tuple[Steps, ...])
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value


class CheckpointConfig(Frozen):
    """When a resumable state is written."""

    every: int = Field(10, ge=1)
    """Rounds between two checkpoints; the last round writes one too."""
    keep: int = Field(3, ge=1)
    """Checkpoints that stay; older ones are removed."""


class WandbConfig(Frozen):
    """A run of Weights & Biases; who you are is its own business (`wandb login`)."""

    project: str
    """Name of the project there."""
    entity: str | None = None
    """A team or user; the account's own default where not given."""


class LoggingConfig(Frozen):
    """Where the rows of metrics.jsonl are shown too; TensorBoard always, where its package is installed."""

    wandb: WandbConfig | None = None
    """Off where null; needs the package (`opd-ray[wandb]`)."""
