"""What one rank's forwards of an update add up to, and what is told of it."""

import math
from dataclasses import dataclass, field

from opd_ray.algorithms.base import Loss
from opd_ray.errors import DriftError
from opd_ray.types import WorkItem

__all__ = ["Sums", "UpdateReport"]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One rank's numbers of one update. Sums over ranks give the update's."""

    loss: float
    """This rank's share of the update's loss."""
    tasks: dict[str, tuple[float, int]]
    """Task -> (sum of item losses, items)."""
    steps: dict[str, dict[int, dict[str, tuple[float, int]]]]
    """Task -> step -> metric -> (sum, forwards)."""
    grad_norm: float
    lr: float
    skipped: bool = False
    """The fp16 gradient overflowed: no weight was changed, and the loss is scaled by less from now on."""


@dataclass(slots=True)
class Sums:
    """What the forwards of one update have added up to on one rank."""

    loss: float = 0.0
    tasks: dict[str, float] = field(default_factory=dict)
    items: dict[str, set[int]] = field(default_factory=dict)
    steps: dict[str, dict[int, dict[str, tuple[float, int]]]] = field(default_factory=dict)
    broken: str = ""
    """Where the loss was not finite for the first time."""
    refused: DriftError | None = None
    """The first one of the losses'."""

    def add(self, item: WorkItem, step: int, loss: Loss, share: float, count: int) -> None:
        """One of an item's ``count`` forwards; ``share`` is its part of the update's loss."""
        value = float(loss.value.detach())
        if not math.isfinite(value) and not self.broken:
            self.broken = f"; first in {item} step {step}, prompt {item.prompts[0].text!r}"
        self.refused = self.refused or loss.refused
        self.loss += share
        self.tasks[item.task] = self.tasks.get(item.task, 0.0) + value / count
        self.items.setdefault(item.task, set()).add(item.position)
        by_step = self.steps.setdefault(item.task, {}).setdefault(step, {})
        for name, metric in loss.metrics.items():
            seen, times = by_step.get(name, (0.0, 0))
            by_step[name] = (seen + float(metric), times + 1)

    def report(self, grad_norm: float, lr: float, skipped: bool) -> UpdateReport:
        """The numbers of the update that they belong to."""
        tasks = {task: (total, len(self.items[task])) for task, total in self.tasks.items()}
        return UpdateReport(self.loss, tasks, self.steps, grad_norm, lr, skipped)
