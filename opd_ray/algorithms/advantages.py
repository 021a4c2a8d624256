"""What a reward is compared with: those of the same prompt, earlier ones or the round's."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_ray.config import GroupsConfig
from opd_ray.errors import ConfigError, RewardError
from opd_ray.types import Prompt, WorkItem

__all__ = ["Groups", "PromptStatistics", "Standing", "combined", "group_advantages", "over_scored", "preferences"]

Scores = Mapping[str, Tensor]


def combined(item: WorkItem, scores: Scores, weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of the rewards that apply to each prompt.

    Args:
        item: whose pictures were scored.
        scores: reward -> [B] or [B, K]; NaN where one does not apply, infinity where it failed.
        weights: reward -> weight; 1 where it is not named, 0 for one that does not count.

    Returns:
        [B] or [B, K] float32; NaN where one of the rewards that apply failed: the others would be another reward.

    Raises:
        RewardError: none applies to a prompt.
    """
    stacked = torch.stack([scores[name] for name in sorted(scores)])
    weight = torch.tensor([weights.get(name, 1.0) for name in sorted(scores)]).reshape(-1, *[1] * (stacked.ndim - 1))
    applies, failed = ~stacked.isnan(), (stacked.isinf() & (weight > 0)).any(0)
    total = (applies * weight).sum(0)
    if not (total > 0).all():
        row = int((total <= 0).reshape(len(item.prompts), -1).any(1).nonzero()[0])
        raise RewardError(
            f"no reward of {', '.join(sorted(scores))} scores prompt {item.prompts[row].text!r} of task {item.task}; "
            "add one that does, or take the task's prompts out"
        )
    mean = (stacked.nan_to_num(0, 0, 0) * weight).sum(0) / total
    return mean.masked_fill(failed, float("nan"))


def preferences(item: WorkItem, scores: Scores, weights: Mapping[str, float], group: int, *, pareto: bool) -> Tensor:
    """The best and the worst image of each prompt.

    Args:
        item: whose pictures were scored.
        scores: reward -> [B].
        weights: of ``combined``.
        group: neighbouring rows that are of one prompt.
        pareto: the best has to be at least as good by every single reward, else it is a tie.

    Returns:
        [P, 3] int64 for P prompts: row of the best, row of the worst, and 1, or 0 where they tie, or where a reward
        failed on all images but one.
    """
    total, found = combined(item, scores, weights), list[tuple[int, int, int]]()
    for first in range(0, len(total), group):
        rows = [row for row in range(first, first + group) if not bool(total[row].isnan())]
        if len(rows) < 2:
            found.append((first, first + 1, 0))
            continue
        values = total[rows]
        best, worst = rows[int(values.argmax())], rows[int(values.argmin())]
        better = bool(total[best] > total[worst])
        if pareto:
            counted = [score for name, score in scores.items() if weights.get(name, 1.0)]
            better &= all(not bool(score[best] < score[worst]) for score in counted)
        found.append((best, worst, int(better)))
    return torch.tensor(found)


class PromptStatistics:
    """Whitens rewards by the last ones of their prompt, as DDPO and SDPO do.

    Args:
        length: how many of each prompt are remembered.
        least: with fewer of them mean and deviation of the round's own values of the task stand in.
        eps: added to the deviation.
    """

    def __init__(self, length: int, least: int, eps: float = 1e-6) -> None:
        self._length, self._least, self._eps = length, least, eps
        self._seen: dict[str, deque[list[float]]] = {}

    def advantages(self, prompts: Sequence[Prompt], values: Tensor) -> Tensor:
        """Remember a round's values, then compare each with those of its prompt.

        In float64: the mean of equal float32 numbers is then exactly that number, and a tie no advantage. Rows with
        NaN, on which a reward failed, are not remembered and have no advantage.

        Args:
            prompts: N of them.
            values: [N, T], a value a step, or [N, 1]; steps are compared among themselves.

        Returns:
            [N, T] float32: (value - mean) / (deviation + eps).
        """
        values = values.double()
        failed = values.isnan().any(1)
        some = next(iter(self._seen.values()), None)  # all are as long
        if some and len(some[0]) != values.shape[1]:
            self._seen.clear()  # of a run with other steps
        for prompt, row, lacks in zip(prompts, values.tolist(), failed.tolist(), strict=True):
            if lacks:
                continue
            self._seen.setdefault(prompt.id, deque(maxlen=self._length)).append(row)
        of_task: dict[str, tuple[Tensor, Tensor]] = {}
        for task in {prompt.task for prompt, lacks in zip(prompts, failed.tolist(), strict=True) if not lacks}:
            rows = [number for number, prompt in enumerate(prompts) if prompt.task == task and not failed[number]]
            of_task[task] = _mean_and_deviation(values[rows])  # tasks have rewards of their own, on scales of their own
        found = list[Tensor]()
        for prompt, row, lacks in zip(prompts, values, failed.tolist(), strict=True):
            if lacks:
                found.append(torch.zeros_like(row))
                continue
            own = self._seen[prompt.id]
            known = len(own) >= self._least
            mean, deviation = _mean_and_deviation(row.new_tensor([*own])) if known else of_task[prompt.task]
            found.append((row - mean) / (deviation + self._eps))
        return torch.stack(found).float()

    def state_dict(self) -> dict[str, Any]:
        """What was remembered, as JSON values."""
        return {name: [*rows] for name, rows in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._seen = {name: deque(rows, maxlen=self._length) for name, rows in state.items()}


class Standing(NamedTuple):
    """How the images of a work item stand within their groups, each [B] float32."""

    advantage: Tensor
    """Within the clip; 0 where a reward failed."""
    tied: Tensor
    """1 where two or more of the group have a reward, and all of them the same, else 0."""
    scored: Tensor
    """1, or 0 where a reward failed: such an image is not learned from."""


def over_scored(each: Tensor, scored: Tensor) -> Tensor:
    """The mean of a batch's rows, as if those on which a reward failed were not in it.

    Args:
        each: [B].
        scored: of ``Standing``.

    Returns:
        [], which is exactly 0, and so is its gradient, where a reward failed on every row.
    """
    return (each * scored).sum() / scored.sum().clamp(min=1)


class Groups:
    """A round's rewards, compared within the images of each prompt."""

    def __init__(self, config: GroupsConfig, weights: Mapping[str, float]) -> None:
        self._config, self._weights = config, weights
        self._known: dict[int, Standing] = {}

    def check(self, algorithm: str, size: int) -> None:
        """Refuse groups of one image, whose reward is its own mean.

        Raises:
            ConfigError: says what to set.
        """
        if size < 2:
            raise ConfigError(
                f"algorithm {algorithm} compares images of one prompt, and batch.images_per_prompt is {size}, so that "
                "every advantage would be 0; set it to 2 or more (published runs: 24)"
            )

    def observe(self, scores: Sequence[tuple[WorkItem, Scores]]) -> None:
        """Take a round's rewards."""
        prompts = [prompt for item, _ in scores for prompt in item.prompts]
        settings = self._config
        rewards = torch.cat([combined(item, self._of_task(item, found), self._weights) for item, found in scores])
        advantages, ties = group_advantages(prompts, rewards, per_prompt=settings.advantage_std == "prompt")
        clip = settings.advantage_clip
        whole = torch.stack([advantages.clamp(-clip, clip), ties, (~rewards.isnan()).float()])
        parts = whole.split([len(item.prompts) for item, _ in scores], dim=1)
        self._known = {item.position: Standing(*part) for (item, _), part in zip(scores, parts, strict=True)}

    def _of_task(self, item: WorkItem, scores: Scores) -> Scores:
        chosen = self._config.task_rewards.get(item.task)
        return scores if chosen is None else {name: scores[name] for name in chosen}

    def known(self, item: WorkItem) -> Standing:
        """How its images stand."""
        return self._known[item.position]


def group_advantages(
    prompts: Sequence[Prompt], rewards: Tensor, *, per_prompt: bool, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """(R - mean of the prompt) / (deviation + eps), GRPO's advantage (arXiv 2505.05470 Eq. 4).

    In float64: the mean of equal float32 numbers is then exactly that number, and a tie no advantage.

    Args:
        prompts: N of them.
        rewards: [N]; NaN where one failed: such a row is compared with nothing.
        per_prompt: the deviation is that of the prompt's own rewards; else of all of the task's.
        eps: added to the deviation.

    Returns:
        [N] float32 advantages; and [N] float32, 1 where the prompt has two rewards or more, all the same.
    """
    rewards = rewards.double()
    groups, tasks = dict[tuple[str, str], list[int]](), dict[str, list[int]]()
    for row, prompt in enumerate(prompts):
        if bool(rewards[row].isnan()):
            continue
        groups.setdefault((prompt.task, prompt.id), []).append(row)
        tasks.setdefault(prompt.task, []).append(row)
    of_task = {task: _mean_and_deviation(rewards[rows])[1] for task, rows in tasks.items()}
    advantages, ties = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for (task, _), rows in groups.items():
        own = rewards[rows]
        mean, deviation = _mean_and_deviation(own)
        advantages[rows] = (own - mean) / ((deviation if per_prompt else of_task[task]) + eps)
        ties[rows] = float(len(rows) > 1 and bool((own == own[0]).all()))
    return advantages.float(), ties.float()


def _mean_and_deviation(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column; the deviation is that of a population, as numpy's."""
    return values.mean(0), values.std(0, correction=0)
