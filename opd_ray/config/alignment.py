"""Algorithms that learn from preferences, and what those have in common that learn from rewards.

Defaults are the vetted settings of their papers' code.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from opd_ray.config.section import Frozen

__all__ = [
    "DdpoConfig",
    "DpoConfig",
    "NoisedPairsConfig",
    "PartsConfig",
    "PsoConfig",
    "PsoOfflineConfig",
    "RewardedConfig",
    "SdpoConfig",
    "SftConfig",
    "StepwiseConfig",
    "WhitenedConfig",
]

Kernel = Literal["flow", "dance", "cps", "ddim"]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class PartsConfig(Frozen):
    """What algorithms have in common that learn from the student's drawings, a round of them part by part."""

    task_weights: dict[str, Positive] = {}
    """Relative weight of each task's loss; 1 where not given."""
    item_parts: int = Field(1, ge=1)
    """Parts of a round's work items: an optimizer step sees one of them, and later ones their drawings' policy at a
    distance. A task has at least so many items (batch.images_per_task / batch.item_size)."""


class RewardedConfig(PartsConfig):
    """What algorithms have in common that learn from rewards of the student's drawings."""

    reward_weights: dict[str, Weight] = {}
    """Relative weight of each reward; 1 where not given, and 0 for one that is only looked at."""


class StepwiseConfig(PartsConfig):
    """What algorithms have in common that compare the likelihood of the student's own steps."""

    noiseless: ClassVar[str] = "diffusion_nft (rewards) or diffusion_dpo (preferences), which need no noise"
    """What to use instead where steps have no density."""
    kernel: Kernel = "ddim"
    """The step that draws, and whose likelihood is compared. `ddim` at noise_level 1 is DDPM's and Euler's ancestral
    step, `cps` at 1 the one that noises the clean prediction again (LCM, DMD2)."""
    noise_level: float = Field(1.0, ge=0)
    """Stochasticity of the kernel, above 0: without it a step has no density. `eta` of `ddim`, `a` of the others."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """The first int(fraction * steps) steps are trained on; the last one of most kernels has no density."""
    steps_per_update: int | None = Field(1, ge=1)
    """Trained steps of each image in one optimizer step; the round has as many updates as that takes. 1 is SDPO's;
    null: all, as in DDPO's published runs, whose few updates see a part of the images each (`item_parts`)."""
    shuffle_steps: bool = True
    """Each image, or pair, goes through its steps in an order of its own."""

    @model_validator(mode="after")
    def _has_a_density(self) -> "StepwiseConfig":
        if self.noise_level == 0:
            raise ValueError(
                "noise_level 0 leaves steps without a density, whose likelihood is to be compared; raise it, or use "
                f"{self.noiseless}"
            )
        return self


class WhitenedConfig(StepwiseConfig, RewardedConfig):
    """What those have in common that compare a reward with the last ones of its prompt."""

    advantage_clip: float = Field(5.0, gt=0)
    """Largest advantage, in deviations."""
    buffer: int = Field(32, ge=1)
    """Last values of each prompt that its mean and deviation are taken of."""
    buffer_least: int = Field(16, ge=1)
    """With fewer of them the mean and deviation of the round's own values of the task stand in."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> "WhitenedConfig":
        if self.buffer_least > self.buffer:
            raise ValueError(f"buffer_least {self.buffer_least} is more than buffer {self.buffer} ever holds; lower it")
        return self


class DdpoConfig(WhitenedConfig):
    """Denoising diffusion policy optimization with importance sampling (DDPO, arXiv 2305.13301)."""

    name: Literal["ddpo"]
    """`ddpo`."""
    clip_range: float = Field(1e-4, gt=0, lt=1)
    """Of the likelihood's ratio, which is a mean over C, H, W."""


class SdpoConfig(WhitenedConfig):
    """Stepwise diffusion policy optimization (SDPO, arXiv 2411.11727): dense reward differences of pairs."""

    name: Literal["sdpo_stepwise"]
    """`sdpo_stepwise`."""
    clip_range: float = Field(1e-4, ge=0)
    """Of the log-likelihood's ratio, which is a mean over C, H, W; 0: none."""
    gamma: float = Field(0.99, ge=0, le=1)
    """Discount of later steps' rewards in a step's return; 0: a step's reward alone."""
    step_decay: float = Field(0.99, gt=0, le=1)
    """lambda: step i weighs lambda^i, so the noisiest most."""
    log_scale: float = Field(1.0, gt=0)
    """eta_s: the log-ratio is divided by it."""


class PsoConfig(StepwiseConfig, RewardedConfig):
    """Pairwise sample optimization of few-step models (PSO, arXiv 2410.03190); with the full kernel it is D3PO."""

    name: Literal["pso_pairwise"]
    """`pso_pairwise`."""
    steps_per_update: int | None = Field(3, ge=1)
    """Trained steps of each pair in one optimizer step (the code: all three of a four-step model)."""
    beta: float = Field(50.0, gt=0)
    """How strongly the preference is to be met, against staying with the reference."""
    clip_range: float = Field(0.1, gt=0, lt=1)
    """Of the likelihood's ratio to the reference; beyond it a step has no gradient."""
    pareto: bool = False
    """The better image has to be at least as good by every single reward, else the pair is a tie."""
    shared_noise: bool = False
    """Both images of a pair begin with the same noise."""


class NoisedPairsConfig(Frozen):
    """What algorithms have in common that compare predictions at noised pairs of images."""

    pairs: Literal["recorded", "online"] = "recorded"
    """`recorded`: of a data set. `online`: the best and the worst of each prompt's drawings, by the rewards."""
    space: Literal["velocity", "eps", "x0"] | None = None
    """What the errors are errors of; `eps` (Diffusion-DPO) where null and the model is a U-Net, else `velocity`."""
    times: Literal["model", "steps", "uniform", "logit_normal"] = "model"
    """Where pairs are noised to. `model`: the network's own training times, logit-normal where these are continuous;
    `steps`: those of sampling.steps alone, for few-step models."""
    draws: int = Field(1, ge=1)
    """Times and noises of each pair in one optimizer step."""
    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of recorded pairs whose caption is replaced by the empty one."""
    kernel: Kernel = "flow"
    """The step that draws, where pairs are drawn."""
    noise_level: float = Field(0.0, ge=0)
    """Stochasticity of that kernel."""
    reward_weights: dict[str, Weight] = {}
    """Relative weight of each reward, where pairs are drawn; 1 where not given, 0 for one that is only looked at."""
    task_weights: dict[str, Positive] = {}
    """Relative weight of each task's loss; 1 where not given."""


class DpoConfig(NoisedPairsConfig):
    """Diffusion-DPO (arXiv 2311.12908), Flow-DPO, IPO, and fine-tuning on the better images."""

    name: Literal["diffusion_dpo"]
    """`diffusion_dpo`."""
    loss: Literal["dpo", "ipo", "sft"] = "dpo"
    """`dpo`; `ipo`, which does not run away where preferences are certain; `sft`, which sees the better image alone."""
    beta: float | None = Field(None, gt=0)
    """How much a preference counts against staying with the frozen start; 5000 for errors of the noise where null (the
    published code's), else 100 (Flow-DPO's)."""


class SftConfig(NoisedPairsConfig):
    """Supervised fine-tuning: flow matching on recorded drawings, such as the teachers'."""

    name: Literal["sft"]
    """`sft`."""
    pairs: Literal["recorded"] = "recorded"
    """Of a data set: drawings that `opd-ray record` wrote; of preference pairs the better picture."""


class PsoOfflineConfig(NoisedPairsConfig):
    """PSO from recorded pairs: style (pairwise) and concepts (hinge) of few-step models (arXiv 2410.03190)."""

    name: Literal["pso_offline"]
    """`pso_offline`."""
    loss: Literal["pairwise", "hinge"] = "pairwise"
    """`pairwise` against the frozen start; `hinge` without it, for a concept from a handful of pictures."""
    space: Literal["eps", "velocity"] = "eps"
    """Errors of the noise; `velocity` for models of velocity, whose steps begin where noise is all there is."""
    times: Literal["steps"] = "steps"
    """The model's few times alone: elsewhere it would be trained to blur."""
    pairs: Literal["recorded"] = "recorded"
    """Of a data set; `pso_pairwise` draws its own."""
    beta: float = Field(10.0, gt=0)
    """Strength (re-tuned by others: 10; the script's hinge: 5)."""
    gamma: float = Field(1.0, ge=0)
    """Weight of the other image (the script's hinge: 0.1)."""
    keep: float = Field(0.5, ge=0)
    """Weight of the hinge's plain error of the other image, so that the model still draws as it did before."""
