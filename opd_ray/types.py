"""What crosses a border between roles: frozen, and checked when it is made.

Shapes: B image, S state (steps + 1, index 0 = noise), T trained step, C H W latent. ``t`` and sigma are the same
number in [0, 1]; 1 is noise. velocity = eps - x0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # records travel through processes that compute nothing
    from torch import Tensor

__all__ = [
    "Conditioning",
    "Experience",
    "Prompt",
    "TeacherAnswer",
    "Trajectory",
    "WeightVersion",
    "WorkItem",
]

Conditioning = Mapping[str, "Tensor"]
"""What the text encoders made of the prompts, by the denoiser's argument name; each tensor is [B, ...]."""


@dataclass(frozen=True, slots=True, order=True)
class WeightVersion:
    """Identity of published weights. Orders by attempt, then generation, then version."""

    attempt: int
    """Rises when the run is started again."""
    generation: int
    """Rises when the learner is rebuilt."""
    version: int
    """Rises with every publish."""

    def __str__(self) -> str:
        return f"{self.attempt}.{self.generation}.{self.version}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt file."""

    id: str
    """Folded into seeds: the same prompt draws the same noise in any file order."""
    text: str
    task: str


@dataclass(frozen=True, slots=True)
class WorkItem:
    """The forward batch on every role: fixed prompts, fixed size, cut by the driver from the configuration alone."""

    round: int
    task: str
    index: int
    """Position among the items of this task in this round."""
    position: int
    """Position among all items of this round: the order in which the learner accumulates."""
    prompts: tuple[Prompt, ...]
    samples: tuple[int, ...]
    """Which image of its prompt each row is; with the prompt's id it names the row's noise."""
    steps: tuple[int, ...]
    """The denoising steps that are trained on, ascending; teachers are asked for these alone."""

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.samples):
            raise ValueError(f"{self}: {len(self.prompts)} prompts and {len(self.samples)} samples")

    def __str__(self) -> str:
        return f"round {self.round} {self.task}[{self.index}]"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What the behaviour policy drew for one work item."""

    item: WorkItem
    weights: WeightVersion
    """The version that drew it."""
    sigmas: "Tensor"  # [S] float32, descending from 1 to 0
    latents: "Tensor"  # [B, S, C, H, W] float32, index 0 = noise; fewer states where nobody reads the later ones
    cond: Conditioning
    uncond: Conditioning  # of the empty prompt, each tensor [1, ...]; {} when nobody's guidance differs from 1

    def __post_init__(self) -> None:
        shape = tuple(self.latents.shape)
        states = range(max(self.item.steps, default=-1) + 1, len(self.sigmas) + 1)
        if len(shape) != 5 or shape[0] != len(self.item.prompts) or shape[1] not in states:
            raise ValueError(
                f"latents of {self.item} are {shape}, expected {len(self.item.prompts)} rows of "
                f"{states[0]} to {states[-1]} states of C, H, W"
            )

    def to(self, device: str) -> Self:
        """The same on another device. The schedule stays on the CPU, where steps read their numbers."""
        cond, uncond = ({name: tensor.to(device) for name, tensor in side.items()} for side in (self.cond, self.uncond))
        return replace(self, latents=self.latents.to(device), cond=cond, uncond=uncond)


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """A frozen teacher's guided velocity at the student's own states."""

    teacher: str
    steps: tuple[int, ...]
    velocity: "Tensor"  # [B, T, C, H, W] float32, T = the item's trained steps

    def __post_init__(self) -> None:
        if self.velocity.shape[1] != len(self.steps):
            raise ValueError(f"{self.teacher} answered {self.velocity.shape[1]} steps, asked {len(self.steps)}")

    def to(self, device: str) -> Self:
        """The same on another device."""
        return replace(self, velocity=self.velocity.to(device))


@dataclass(frozen=True, slots=True)
class Experience:
    """One annotated work item, as the learner receives it. ``recorded`` holds a data set's own tensors."""

    item: WorkItem
    trajectory: Trajectory | None = None
    answer: TeacherAnswer | None = None
    scores: Mapping[str, "Tensor"] = field(default_factory=dict)  # reward name -> [B] float32
    recorded: Mapping[str, "Tensor"] = field(default_factory=dict)

    def to(self, device: str) -> Self:
        """The same on another device."""
        return replace(
            self,
            trajectory=self.trajectory and self.trajectory.to(device),
            answer=self.answer and self.answer.to(device),
            scores={name: tensor.to(device) for name, tensor in self.scores.items()},
            recorded={name: tensor.to(device) for name, tensor in self.recorded.items()},
        )
