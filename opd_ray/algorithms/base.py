"""What an algorithm declares: everything the loop has to know about it, so that the loop needs no ``if``.

An algorithm is a loss over a batch and what that loss needs. It knows no model and no Ray: the learner hands it
experience, runs the forwards it asks for, and gives it the velocities.
"""

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_ray.config import LoraConfig
from opd_ray.diffusion import KERNELS, Step, choose_steps, trained_steps
from opd_ray.errors import ConfigError, DriftError
from opd_ray.seeds import fold
from opd_ray.types import Conditioning, Experience, Trajectory, WorkItem

__all__ = ["Algorithm", "Facts", "Forward", "Loss", "State", "first_steps", "own_states", "part_of"]

State = tuple[Tensor, float | Tensor]
"""[B, C, H, W] float32, and its time: one for the batch, or [B]."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass with a gradient, the student's unless it says so, and what its loss needs beside it."""

    x: Tensor  # [B, C, H, W] float32
    t: float | Tensor  # one for the batch, or [B]
    t_next: float | Tensor
    step: int  # for metrics: of the path, or the forward's place where rows are at different ones
    cond: Conditioning
    uncond: Conditioning
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # each [B, ...]
    policy: str = "student"
    """Whose pass and gradient it is: the student's, or one of ``Algorithm.trained``, which have no guidance."""
    beside: Mapping[str, State] = field(default_factory=dict)
    """Extra adapters whose velocity the loss needs at states of their own, without guidance; no gradient."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar to descend, and numbers to look at (means over the batch)."""

    value: Tensor  # []
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # each []
    refused: DriftError | None = None
    """Why nothing may be learned from this round, in its first update alone: every rank then stops before a step."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an algorithm may want to know of its run."""

    seed: int = 0
    num_steps: int = 10
    """Denoising steps of a drawing."""
    images_per_prompt: int = 1
    """Neighbouring rows of a work item."""
    max_staleness: int = 0
    sigmas: tuple[float, ...] = ()
    """Of a drawing, where the model is at hand."""
    reference: bool = False
    """Whether a teacher called `reference` gives the frozen start's velocities at the states of drawings."""
    times: tuple[float, ...] = ()
    """That the model was trained at, where these are a table and it is at hand."""


class Algorithm(ABC):
    """One way to learn from experience. Subclasses set what differs from these defaults."""

    behaviour: ClassVar[str] = "student"
    """The adapter that rollouts draw with."""
    velocities: tuple[str, ...] = ()
    """Policies whose velocities the loss needs beside the student's: extra adapters, or `reference` (the frozen start:
    the adapter off, or the LoRA that the student began as)."""
    adapters: ClassVar[tuple[str, ...]] = ()
    """Extra adapters that start as copies of the student and follow it (`follow`)."""
    trained: ClassVar[tuple[str, ...]] = ()
    """Those of them that follow nobody: they have forwards, losses and gradients of their own (``Forward.policy``)."""
    needs_rollouts: bool = True
    """False: experience is recorded, and comes from a data set."""
    whole_paths: ClassVar[bool] = True
    """False: it reads no state behind the last trained step, so that a drawing without pictures stops there; where it
    needs the step's velocity, one state later, which that leads to."""
    needs_teachers: bool = False
    needs_rewards: bool = False
    needs_velocities: ClassVar[bool] = False
    """The behaviour policy's velocities travel with its drawings (``Trajectory.velocities``)."""
    guided: bool = True
    """False: forwards are of the plain conditional prediction, whatever guidance the student draws with."""
    shared_noise: bool = False
    """Images that are compared, the ``images_per_prompt`` neighbours of a prompt, begin with the same noise."""
    pictures: int = 1
    """How many pictures of each image are scored: those of ``pictured``."""
    streams: bool = False
    """True: one update a round, over all its items, which needs neither scores nor other items: gradients accumulate
    while later items are still drawn and marked. ``observe`` comes after them then."""
    updates_per_round: int = 1
    kernel: str = "flow"
    noise_level: float = 0.0
    steps_per_item: int | None = None
    task_weights: Mapping[str, float] = {}
    facts: Facts = Facts()
    """Of the run; ``make_algorithm`` gives them before anything is asked."""

    @property
    def student_updates(self) -> int:
        """How many of a round's updates have forwards of the student."""
        return self.updates_per_round

    def check(self, sigmas: Tensor) -> None:  # noqa: B027  (most algorithms have nothing to refuse)
        """Refuse a schedule that this algorithm cannot train on, before anything starts.

        Args:
            sigmas: [S] float32, descending from 1 to 0.

        Raises:
            ConfigError: what does not fit and what to do.
        """

    def trained_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps that may be trained on, ascending."""
        return tuple(range(num_steps))

    def transitions(self, sigmas: Tensor) -> Iterator[tuple[int, Step]]:
        """Each step that may be trained on, as the kernel makes it at a single number.

        Raises:
            ConfigError: the kernel does not take the noise level.
        """
        point = torch.zeros(1, 1, 1, 1)
        for j in self.trained_steps(len(sigmas) - 1):
            try:
                yield j, KERNELS[self.kernel](point, point, float(sigmas[j]), float(sigmas[j + 1]), self.noise_level)
            except ValueError as error:
                raise ConfigError(f"algorithm.noise_level with kernel {self.kernel}: {error}") from None

    def steps(self, num_steps: int, seed: int, *names: int | str) -> tuple[int, ...]:
        """The steps that the work item called ``names`` trains on."""
        seed = fold(seed, "steps", *names)
        return choose_steps(self.trained_steps(num_steps), self.steps_per_item, seed)

    def asked(self, trajectory: Trajectory) -> Iterable[State]:
        """Where a teacher is asked for its velocity, on the teacher's worker: a state for each trained step.

        Of a drawing that is handed over in parts: for those whose state is in this one.
        """
        return own_states(trajectory)

    def pictured(self, trajectory: Trajectory) -> Tensor | None:
        """What rewards are to see of a whole drawing.

        Returns:
            Latents [B, ``pictures``, C, H, W] float32; None for its last state alone.
        """
        return None

    def remarks(self, trajectory: Trajectory) -> Mapping[str, "array[float]"]:
        """Numbers about a whole drawing, a few a row: ``observe`` gets those of every item, on every rank.

        Returns:
            Name -> [B * n] in the order of rows. They travel through the driver, so they have to be few.
        """
        return {}

    def select(self, items: Sequence[WorkItem], update: int) -> Sequence[WorkItem]:
        """The items of a round that its update number ``update`` trains on; all of them unless overridden."""
        return items

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:  # noqa: B027
        """See every item's scores once a round, in item order and alike on every rank: update own state here.

        Args:
            scores: by reward [B] or [B, K]; and what ``remarks`` told, by its name [B, n].
        """

    @abstractmethod
    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """The student's forward passes over one work item, in step order."""

    @abstractmethod
    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """The loss of one forward, a mean over its batch.

        Args:
            forward: what was asked for.
            velocity: policy -> guided velocity [B, C, H, W] float32; that of the forward's own carries the gradient.
        """

    def follow(self, adapter: str, round: int) -> float:
        """After each round adapter <- d * adapter + (1 - d) * student: this is d."""
        return 0.0

    def beside(self, lora: LoraConfig | None) -> tuple[str, ...]:
        """The adapters that a learner has beside the student: its own, and a frozen start that is a LoRA itself."""
        started = lora is not None and lora.start is not None and "reference" in self.velocities
        return (*self.adapters, "reference") if started else self.adapters

    def item_weight(self, item: WorkItem, items: Sequence[WorkItem]) -> float:
        """The share of one item in an update's loss: weighted mean over tasks, mean over a task's items."""
        weights = {other.task: self.task_weights.get(other.task, 1.0) for other in items}
        of_task = sum(other.task == item.task for other in items)
        return weights[item.task] / sum(weights.values()) / of_task

    def state_dict(self) -> dict[str, Any]:
        """Own state as JSON values, which later rounds leave as they are; it goes into the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what ``state_dict`` gave."""


def own_states(trajectory: Trajectory) -> Iterator[State]:
    """Those of the drawing itself, at the trained steps that are in it."""
    for j in trajectory.item.steps:
        if trajectory.first <= j <= trajectory.last:
            yield trajectory.state(j), float(trajectory.sigmas[j])


def first_steps(num_steps: int, fraction: float) -> tuple[int, ...]:
    """The first int(fraction * N) steps, which are trained on.

    Raises:
        ConfigError: there is none.
    """
    try:
        return trained_steps(num_steps, fraction)
    except ValueError:
        raise ConfigError(
            f"algorithm.timestep_fraction {fraction} of {num_steps} steps leaves no step to train on; raise one of them"
        ) from None


def part_of(items: Sequence[WorkItem], number: int, parts: int) -> list[WorkItem]:
    """The items of one of a round's ``parts`` equal parts, each of which has items of every task."""
    of_task = Counter(item.task for item in items)
    return [item for item in items if item.index * parts // of_task[item.task] == number]
