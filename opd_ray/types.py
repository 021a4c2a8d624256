"""What crosses a border between roles: frozen, and checked when it is made.

Shapes: B image, S state (steps + 1, index 0 = noise), T trained step, C H W latent. ``t`` and sigma are the same
number in [0, 1]; 1 is noise. velocity = eps - x0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # records travel through processes that compute nothing
    from torch import Tensor

__all__ = [
    "Conditioning",
    "Experience",
    "Prompt",
    "Scored",
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
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The other columns of its row, as they are there: what a reward may need, such as GenEval's ``include``."""
    weight: float = field(default=1.0, compare=False)
    """How often an epoch takes it: 2 is twice, 0.5 in every other epoch."""


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
    """What the behaviour policy drew for one work item, or a run of its states where it is drawn in parts."""

    item: WorkItem
    weights: WeightVersion
    """The version that drew it."""
    sigmas: "Tensor"  # [S] float32, descending from 1 to 0
    latents: "Tensor"  # [B, S, C, H, W] float32, index 0 = noise; fewer states where nobody reads the later ones
    cond: Conditioning  # {} in parts after the first
    uncond: Conditioning  # of the empty prompt, each tensor [1, ...]; {} when nobody's guidance differs from 1
    first: int = 0
    """Index of the first state of ``latents``: 0 but in parts after the first."""
    velocities: "Tensor | None" = None
    """[B, steps, C, H, W] float32: the behaviour policy's guided velocity at each step that led to one of these states;
    where the algorithm asks for it."""

    def __post_init__(self) -> None:
        shape, states = tuple(self.latents.shape), len(self.sigmas) - self.first
        if len(shape) != 5 or shape[0] != len(self.item.prompts) or not 0 < shape[1] <= states or self.first < 0:
            raise ValueError(
                f"latents of {self.item} are {shape} from state {self.first} on, expected {len(self.item.prompts)} "
                f"rows of 1 to {states} states of C, H, W"
            )
        if self.velocities is not None:
            steps, seen = shape[1] - (self.first == 0), tuple(self.velocities.shape)
            if seen != (shape[0], steps, *shape[2:]):
                raise ValueError(f"velocities of {self.item} are {seen}, expected {(shape[0], steps, *shape[2:])}")

    @property
    def last(self) -> int:
        """Index of the last state of ``latents``."""
        return self.first + self.latents.shape[1] - 1

    def state(self, index: int) -> "Tensor":
        """One state [B, C, H, W]."""
        if not self.first <= index <= self.last:
            raise IndexError(f"{self.item} has states {self.first} to {self.last} here, not {index}")
        return self.latents[:, index - self.first]

    def to(self, device: str) -> Self:
        """The same on another device. The schedule stays on the CPU, where steps read their numbers."""
        cond, uncond = ({name: tensor.to(device) for name, tensor in side.items()} for side in (self.cond, self.uncond))
        velocities = self.velocities.to(device) if self.velocities is not None else None
        return replace(self, latents=self.latents.to(device), cond=cond, uncond=uncond, velocities=velocities)


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
class Scored:
    """What rewards made of pictures. A failure is no score: it is NaN, and its error stands beside."""

    scores: dict[str, list[float]]
    """Reward -> a number a picture; NaN where it does not apply, or failed."""
    errors: dict[str, dict[int, str]]
    """Reward -> place of each picture that it failed on, and why."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One annotated work item, as the learner receives it. ``recorded`` holds a data set's own tensors."""

    item: WorkItem
    trajectory: Trajectory | None = None
    answer: TeacherAnswer | None = None
    scores: Mapping[str, "Tensor"] = field(default_factory=dict)
    """Reward name -> [B] float32, or [B, K] where K pictures of each image are scored. NaN where it does not apply,
    infinity where it failed."""
    recorded: Mapping[str, "Tensor"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path, needed = self.trajectory, max(self.item.steps, default=0)
        if path is not None and not path.first == 0 <= needed <= path.last:
            raise ValueError(f"{self.item} has states {path.first} to {path.last}, expected 0 to {needed} at least")

    def to(self, device: str) -> Self:
        """The same on another device."""
        return replace(
            self,
            trajectory=self.trajectory and self.trajectory.to(device),
            answer=self.answer and self.answer.to(device),
            scores={name: tensor.to(device) for name, tensor in self.scores.items()},
            recorded={name: tensor.to(device) for name, tensor in self.recorded.items()},
        )
