"""What DDPO, SDPO, PSO, GRPO and distillation by PPO share: the student's own drawings, whose steps have a likelihood.

A round's drawings are gone through step by step: update number u trains on each image's u-th step, in an order that is
shuffled for each image (for each pair where images are compared). An update may also see several steps, or all, and a
part of the images; then the next one goes on with these steps of the next part's.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_ray.algorithms.advantages import PromptStatistics
from opd_ray.algorithms.base import Algorithm, Forward, first_steps, part_of
from opd_ray.config import StepwiseConfig, WhitenedConfig
from opd_ray.diffusion import KERNELS, Step, log_ratio
from opd_ray.errors import ConfigError, DriftError
from opd_ray.seeds import generator
from opd_ray.types import Experience, Prompt, WorkItem

__all__ = ["Compared", "Stepwise", "Whitened"]

DRIFT = 0.1
"""Of the clip range: so much may rollout and learner differ before anything was learned."""


class Stepwise(Algorithm):
    """Subclasses say what a row's step is compared with (``inputs``) and what its loss is."""

    needs_rewards = True
    paired: ClassVar[bool] = False
    """Neighbouring rows are two images of one prompt, and go through their steps together."""

    def __init__(self, config: StepwiseConfig) -> None:
        self.settings = config
        self.kernel = config.kernel
        self.noise_level = config.noise_level
        self.task_weights = config.task_weights

    @property
    def updates_per_round(self) -> int:  # type: ignore[override]  # follows from the run's steps
        """As many as it takes to go through every trained step of every image once."""
        trained = len(self.trained_steps(self.facts.num_steps))
        return -(-trained // (self.settings.steps_per_update or trained)) * self.settings.item_parts

    def select(self, items: Sequence[WorkItem], update: int) -> Sequence[WorkItem]:
        """The part whose turn it is."""
        return part_of(items, update % self.settings.item_parts, self.settings.item_parts)

    def trained_steps(self, num_steps: int) -> tuple[int, ...]:
        """The first int(fraction * N): the last one of most kernels is deterministic."""
        return first_steps(num_steps, self.settings.timestep_fraction)

    def check(self, sigmas: Tensor) -> None:
        """Every trained step has a density, and images to compare come in pairs."""
        name = self.settings.name  # type: ignore[attr-defined]  # of every subclass
        if self.paired and self.facts.images_per_prompt < 2:
            raise ConfigError(
                f"algorithm {name} compares images of one prompt, and batch.images_per_prompt is "
                f"{self.facts.images_per_prompt}; set it to 2 or more"
            )
        for j, step in self.transitions(sigmas):
            if not bool((step.std > 0).all()):
                raise ConfigError(
                    f"algorithm {name} needs the density of every trained step, and kernel {self.kernel} has no noise "
                    f"at step {j}; lower algorithm.timestep_fraction, or use {self.settings.noiseless}"
                )

    def forwards(self, experience: Experience, update: int) -> Iterator[Forward]:
        """The student at its own states: one forward for each step of this update."""
        path, item = experience.trajectory, experience.item
        assert path is not None
        inputs, rows = self.inputs(experience), self.rows(experience)
        order = self.orders(item)[rows.cpu()]
        per = self.settings.steps_per_update or order.shape[1]
        begin = update // self.settings.item_parts * per
        fresh = update == 0 and (not self.facts.max_staleness or item.round == 0)
        for place in range(begin, min(begin + per, order.shape[1])):
            at, device = order[:, place], path.latents.device
            now, then = path.sigmas[at].to(device), path.sigmas[at + 1].to(device)
            own = {name: value[rows, at.to(device)] for name, value in inputs.items()}
            if fresh:
                own["first"] = torch.ones(len(rows), device=device)
            yield Forward(
                x=path.latents[rows, at.to(device)],
                t=now,
                t_next=then,
                step=place if self.settings.shuffle_steps else int(at[0]),
                cond={name: tensor[rows] for name, tensor in path.cond.items()},
                uncond=path.uncond,
                inputs={"x_next": path.latents[rows, at.to(device) + 1], "step": at.to(device)} | own,
            )

    def inputs(self, experience: Experience) -> Mapping[str, Tensor]:
        """What a loss needs beside the velocity, each [B, N, ...] by row of the item and step of the path."""
        return {}

    def rows(self, experience: Experience) -> Tensor:
        """The rows [P] that are trained on; all of them here."""
        assert experience.trajectory is not None
        return torch.arange(len(experience.item.prompts), device=experience.trajectory.latents.device)

    def orders(self, item: WorkItem) -> Tensor:
        """The order [B, T] in which each row goes through the item's trained steps."""
        steps = torch.tensor(item.steps)
        if not self.settings.shuffle_steps:
            return steps.expand(len(item.prompts), -1)
        found = []
        for row in range(len(item.prompts)):
            number = row // self.facts.images_per_prompt if self.paired else row
            rng = generator(self.facts.seed, "order", "steps", item.round, item.position, number)
            found.append(steps[torch.randperm(len(steps), generator=rng)])
        return torch.stack(found)

    def log_ratio(self, forward: Forward, velocity: Tensor, other: Tensor) -> Tensor:
        """How likely the step that was made is with one velocity, against the other one: [B]."""
        mine, theirs = self.both(forward, velocity, other)
        return self.ratio(forward.inputs["x_next"], mine.mean, theirs.mean, mine.std)

    @staticmethod
    def ratio(x_next: Tensor, mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
        """Of two Gaussians' likelihoods of what was drawn, as a logarithm [B]."""
        return log_ratio(x_next, mean, other, std)

    def both(self, forward: Forward, velocity: Tensor, other: Tensor) -> tuple[Step, Step]:
        """The step of a forward with one velocity, and with another."""
        kernel = KERNELS[self.kernel]
        mine = kernel(forward.x, velocity, forward.t, forward.t_next, self.noise_level)
        return mine, kernel(forward.x, other, forward.t, forward.t_next, self.noise_level)

    def drift(self, forward: Forward, ratio: Tensor, clip: float) -> tuple[Tensor, DriftError | None]:
        """The largest log-ratio [] of a forward, which has to vanish in a round's first update.

        There the learner has the very weights that drew: what it finds is how far its arithmetic is from the rollouts'.
        With staleness that holds of the run's first round alone.

        Returns:
            And an error where it is more than a part of the clip range: their difference is what would be learned.
        """
        largest = ratio.detach().abs().max()
        if "first" not in forward.inputs or not clip or float(largest) <= DRIFT * clip:
            return largest, None
        return largest, DriftError(
            f"before the first update the learner finds the likelihood of drawn steps changed by "
            f"{float(largest):.2g}, more than {DRIFT:g} of algorithm.clip_range {clip:g}: rollout and learner "
            "compute differently. Give both the same precision, device and attention kernels, or raise clip_range; "
            "then go on with --resume --force"
        )


class Compared(Stepwise):
    """Compares with the policy that drew, whose velocities travel with its drawings: whatever its staleness."""

    needs_velocities: ClassVar[bool] = True

    def inputs(self, experience: Experience) -> Mapping[str, Tensor]:
        """What the drawing's policy would have done, and what is known of each image, at every step."""
        path = experience.trajectory
        assert path is not None and path.velocities is not None
        known = {name: one.to(path.latents.device) for name, one in self.known(experience.item).items()}
        return {"drawn": path.velocities} | {name: one.expand(-1, len(path.sigmas) - 1) for name, one in known.items()}

    @abstractmethod
    def known(self, item: WorkItem) -> Mapping[str, Tensor]:
        """What a loss needs of an item's images, each [B, N] by step or [B, 1]; their advantages as ``advantage``."""


class Whitened(Compared):
    """Weighs by rewards that are whitened by the last ones of their prompt."""

    remembered: ClassVar[str]
    """What the last values of each prompt are called in a checkpoint."""

    def __init__(self, config: WhitenedConfig) -> None:
        super().__init__(config)
        self._limit = config.advantage_clip
        self._statistics = PromptStatistics(config.buffer, config.buffer_least)
        self._known: dict[int, dict[str, Tensor]] = {}

    def whiten(self, values: Sequence[tuple[WorkItem, Tensor]]) -> None:
        """Remember a round's values, each [B, N] by step or [B, 1] (NaN: failed), and take their advantages."""
        prompts: list[Prompt] = [prompt for item, _ in values for prompt in item.prompts]
        whitened = self._statistics.advantages(prompts, torch.cat([one for _, one in values]))
        parts = whitened.clamp(-self._limit, self._limit).split([len(item.prompts) for item, _ in values])
        self._known = {
            item.position: {"advantage": part, "scored": (~one.isnan().any(1, keepdim=True)).float()}
            for (item, one), part in zip(values, parts, strict=True)
        }

    def known(self, item: WorkItem) -> Mapping[str, Tensor]:
        """The advantages, as far as they go, and which images have a score."""
        return self._known[item.position]

    def state_dict(self) -> dict[str, Any]:
        """The last values of each prompt."""
        return {self.remembered: self._statistics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; nothing of another algorithm, from which --force may come."""
        self._statistics.load_state_dict(state.get(self.remembered, {}))
