"""Algorithms that compare the rewards of a prompt's images. Defaults are the vetted settings of their papers' code."""

from typing import Annotated, Literal

from pydantic import Field

from opd_ray.config.alignment import Kernel, RewardedConfig, StepwiseConfig
from opd_ray.config.section import Frozen

__all__ = ["FlowGrpoConfig", "GroupsConfig", "GrpoConfig", "GrpoGuardConfig", "NftConfig"]


class GroupsConfig(Frozen):
    """How rewards of one prompt's images become advantages: batch.images_per_prompt of them (published runs: 24)."""

    task_rewards: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    """Task -> the rewards that it learns from, for several tasks with rewards of their own; all of them where not
    given."""
    advantage_clip: float = Field(5.0, gt=0)
    """Largest advantage, in deviations."""
    advantage_std: Literal["global", "prompt"] = "global"
    """The deviation that advantages are in: of all the task's rewards of the round, or of the prompt's own alone, which
    makes much of small differences."""


class GrpoConfig(StepwiseConfig, RewardedConfig, GroupsConfig):
    """What Flow-GRPO and GRPO-Guard have in common."""

    kernel: Kernel = "flow"
    """The step that draws, and whose likelihood is compared."""
    noise_level: float = Field(0.7, ge=0)
    """Stochasticity of the kernel, above 0: without it a step has no density."""
    steps_per_update: int | None = Field(None, ge=1)
    """Trained steps of each image in one optimizer step; null: all of them."""
    item_parts: int = Field(2, ge=1)
    """Parts of a round's work items, each of which gets an optimizer step (the code: two a round). With 1 the student
    is the policy that drew, and nothing is ever clipped. A task has at least so many items."""
    shuffle_steps: bool = False
    """Each image goes through its steps in an order of its own; of no account where an update has all of them."""
    kl: float = Field(0.04, ge=0)
    """Weight of each step's KL to the frozen start, by an SDE kernel (`flow`, `dance`) times the step's length, as in
    the code (0.01 for PickScore)."""


class FlowGrpoConfig(GrpoConfig):
    """Flow-GRPO (arXiv 2505.05470): clipped policy gradients of groups."""

    name: Literal["flow_grpo"]
    """`flow_grpo`."""
    clip_range: float = Field(1e-4, gt=0, lt=1)
    """Of the likelihood's ratio, which is a mean over C, H, W: it varies by 1 / sqrt(C H W) of a latent."""


class GrpoGuardConfig(GrpoConfig):
    """GRPO-Guard (arXiv 2510.22319): Flow-GRPO with ratios that are alike at every step, and steps that weigh alike."""

    name: Literal["grpo_guard"]
    """`grpo_guard`."""
    kernel: Literal["flow", "dance"] = "flow"
    """The step that draws: of an SDE, whose mean moves by the step's length."""
    clip_range: float = Field(2e-6, gt=0, lt=1)
    """Of the normalised ratio, which deviates less than Flow-GRPO's by the step's std."""


class NftConfig(RewardedConfig, GroupsConfig):
    """DiffusionNFT (arXiv 2509.16117): what was drawn well and what was not, on the forward process."""

    name: Literal["diffusion_nft"]
    """`diffusion_nft`."""
    beta: float = Field(1.0, gt=0)
    """How far from the policy that drew the two policies are that the student stands for: 1 is stable, 0.1 (the code's
    for OCR and for several rewards) faster."""
    decay: Literal["copy", "linear_to_0_5", "delayed_to_0_999"] = "linear_to_0_5"
    """How the adapter `old`, which draws, follows the student: old <- d old + (1 - d) student after each round. At n
    optimizer steps d is 0; min(0.001 n, 0.5); or 0 up to 75, then min(0.0075 (n - 75), 0.999) (the code's for OCR)."""
    weighting: Literal["adaptive", "plain"] = "adaptive"
    """`adaptive`: errors of the clean prediction, each over its own mean absolute value; `plain`: of the velocity
    (Eq. 5)."""
    kl: float = Field(1e-4, ge=0)
    """Weight of the squared distance of velocities from the frozen start's."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """Each image is noised to int(fraction * steps) times of the schedule, other ones each round."""
    kernel: Kernel = "flow"
    """The step that draws; the loss does not know it."""
    noise_level: float = Field(0.0, ge=0)
    """Stochasticity of that kernel; 0 is the ODE (the paper's ablation: better than noise)."""
