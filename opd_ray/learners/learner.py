"""One learner rank: accumulates the algorithm's loss over its work items, steps the optimizer, publishes weights."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.actors.rollout import probe_velocity
from opd_ray.algorithms.base import Algorithm, Forward
from opd_ray.config import EmaConfig, LoraConfig, OptimizerConfig
from opd_ray.digest import Digest
from opd_ray.errors import DriftError, NotFiniteError, OutOfOrderError, RunFolderError
from opd_ray.learners.engine import Engine, LossScale, split_key
from opd_ray.learners.sums import Sums, UpdateReport
from opd_ray.models.base import Family
from opd_ray.seeds import fold
from opd_ray.types import Experience, WorkItem

__all__ = ["Learner", "LearnerState", "Training"]


Held = tuple[nn.Parameter, Tensor]
"""A parameter, and this rank's part of it or of what is shaped like it."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a learner has to know of the configuration."""

    lora: LoraConfig | None
    """None trains the network itself."""
    guidance: float
    optimizer: OptimizerConfig
    ema: EmaConfig | None
    seed: int
    rounds: int
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class LearnerState:
    """All that a learner needs to go on bit-identically: tensors by group and name, and JSON values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)


class Learner:
    """Owns what the student trains, the algorithm's extra adapters, the optimizer and the moving average."""

    def __init__(self, family: Family, algorithm: Algorithm, training: Training, engine: Engine) -> None:
        self.family, self.algorithm, self.training, self.engine = family, algorithm, training, engine
        self.beside = algorithm.beside(training.lora)
        for name in ("student", *self.beside):  # one seed: extra adapters start as copies
            family.add_student(name, training.lora, fold(training.seed, "lora"))
        self._policies = (*algorithm.trained, "student")
        family.use("student")
        family.train_adapter(*self._policies)
        if training.gradient_checkpointing:
            family.save_memory()
        family.denoiser = engine.prepare(family.network, self._trained, training.optimizer)
        family.device = engine.device  # the engine has taken there what was loaded elsewhere
        self.student = family.adapter_parameters("student")
        self.scale = LossScale(enabled=family.dtype == torch.float16)
        self.ema = {name: engine.part(p).clone() for name, p in self.student.items()} if training.ema else None
        self.updates = 0
        self.student_updates = 0
        """Those of them that had forwards of the student: its average is of its weights after these."""
        self._items: tuple[WorkItem, ...] = ()
        self._own: tuple[WorkItem, ...] = ()
        self._taken = 0
        self._experience: dict[int, Experience] = {}
        self._sums = Sums()
        self._unobserved: dict[str, Any] = {}
        """The algorithm's state from before the round's scores."""

    def begin(self, items: Sequence[WorkItem]) -> None:
        """A round begins, or begins once more: there is nothing of it yet, and no gradient.

        Args:
            items: all of the round, the same on every rank.
        """
        self._items = tuple(items)
        self._own = tuple(item for item in items if self.owner(item) == self.engine.rank)
        self._taken, self._experience = 0, {}
        self._clear()

    def take(self, experience: Experience) -> None:
        """This rank's next item, in item order; a streaming algorithm accumulates its gradient at once.

        But for the rank's last: its backward reduces the gradients of all ranks, and an ``update`` alone may do that,
        when every rank has everything.

        Raises:
            OutOfOrderError: another item is next; nothing was taken.
        """
        item, awaited = experience.item, self._own[self._taken : self._taken + 1]
        if (item,) != awaited:
            raise OutOfOrderError(f"rank {self.engine.rank} got {item} and waits for {[str(one) for one in awaited]}")
        self._taken += 1
        self._experience[item.position] = experience.to(self.family.device)
        if self._streams and self._taken < len(self._own):
            self._accumulate((item,), self._items, 0)

    def observe(self, scores: Sequence[tuple[WorkItem, Mapping[str, Tensor]]]) -> None:
        """Every item's scores, the same on every rank: once a round, when every rank has its items."""
        self._unobserved = self.algorithm.state_dict()
        self.algorithm.observe(scores)

    def update(self, update: int) -> UpdateReport:
        """One optimizer step over the selected items: gradients in (task, item, step) order, one reduction.

        Raises:
            NotFiniteError: on every rank alike, before any weight changed.
            DriftError: likewise, in a round's first update; the state is that from before the round.
        """
        if self._taken < len(self._own):
            raise ValueError(f"rank {self.engine.rank} has {self._taken} of its {len(self._own)} work items")
        selected = self.algorithm.select(self._items, update)
        by_rank = [[item for item in selected if self.owner(item) == rank] for rank in range(self.engine.ranks)]
        if not all(by_rank):
            raise ValueError(f"{len(selected)} work items leave a rank of {self.engine.ranks} without work")
        own = by_rank[self.engine.rank]
        if self._streams:
            own = own[-1:]
        else:
            self._clear()
        due = self._accumulate(own, selected, update, last=True)
        sums = self._sums
        lr = self._set_lr()
        norm, skipped = self._step(sums)
        self.updates += 1
        if "student" in due:
            self.student_updates += 1
            self._average()
        return sums.report(norm, lr, skipped)

    @property
    def _streams(self) -> bool:
        """Whether items are trained on as they come: not where a forward waits for one on every other rank."""
        return self.algorithm.streams and not self.engine.lockstep

    def _clear(self) -> None:
        self._sums = Sums()
        self.engine.zero()

    def _accumulate(
        self, items: Sequence[WorkItem], selected: Sequence[WorkItem], update: int, *, last: bool = False
    ) -> list[str]:
        """Add these items' share of an update over ``selected``; the update's last also reduce the gradients.

        Returns:
            The policies that had forwards.
        """
        forwards = {item: list(self.algorithm.forwards(self._experience[item.position], update)) for item in items}
        due = [name for name in self._policies if any(one.policy == name for one in forwards[items[0]])]
        for policy in due:
            self.family.use(policy)  # also in backwards, and another role of this process may share the family
            work = []
            for item, every in forwards.items():
                own = [forward for forward in every if forward.policy == policy]
                work += [(item, forward, len(own)) for forward in own]
            self._descend(work, selected, last=last and policy == due[-1])
        if self.algorithm.streams:
            for item in items:
                del self._experience[item.position]  # nobody asks for it again
        return due

    def _descend(
        self, work: Sequence[tuple[WorkItem, Forward, int]], selected: Sequence[WorkItem], *, last: bool
    ) -> None:
        """Forward and backward of one policy, each with how many of them its item has."""
        idle = self.engine.most(len(work)) - len(work) if self.engine.lockstep else 0
        for number, (item, forward, count) in enumerate([*work, *[work[-1]] * idle], start=1):
            with self.engine.accumulate(last=last and number == len(work) + idle):
                loss = self.algorithm.loss(forward, self._velocities(forward))
                value = float(loss.value.detach())
                # An infinite loss may have a finite gradient: NaN travels to the other ranks as well.
                usable = math.isfinite(value) and loss.refused is None
                weight = self.algorithm.item_weight(item, selected) / count if usable else math.nan
                # Another rank has more: this one's last again, for nothing, so that the other is not left waiting.
                share = loss.value * (weight if number <= len(work) else 0.0)
                self.engine.backward(share, self.scale.value)
            if number <= len(work):
                self._sums.add(item, forward.step, loss, float(share.detach()), count)

    def _step(self, sums: Sums) -> tuple[float, bool]:
        """Clip and step; returns the gradient's norm, and whether an overflow in fp16 made this a step of nothing.

        The norm is that of all ranks, and all of them are asked for a loss that is broken or refused, so that every one
        decides alike.
        """
        norm = self.engine.step(self.scale.value)
        overflow = not math.isfinite(norm)
        if overflow and self.engine.most(int(sums.refused is not None)):
            self.algorithm.load_state_dict(self._unobserved)
            raise sums.refused or DriftError(
                "rollout and learner compute differently on another learner rank; give all of them the same precision, "
                "device and attention kernels, then go on with --resume --force"
            )
        if overflow and (self.engine.most(len(sums.broken)) or not self.scale.enabled or self.scale.value <= 1):
            raise NotFiniteError(
                f"the gradient of update {self.updates} is not finite{sums.broken}; no weight was changed"
            )
        self.scale.update(overflow=overflow)
        return (0.0 if overflow else norm), overflow

    def finish_round(self, round: int) -> None:
        """Let the extra adapters follow the student, and let go of the round's inputs."""
        with torch.no_grad():
            for name in (one for one in self.algorithm.adapters if one not in self.algorithm.trained):
                keep = self.algorithm.follow(name, round)
                for key, parameter in self.family.adapter_parameters(name).items():
                    self.engine.part(parameter).lerp_(self.engine.part(self.student[key]), 1 - keep)
        self._items, self._own, self._experience = (), (), {}

    def _trained(self) -> dict[str, nn.Parameter]:
        """The student's parameters by name, and those of other policies with theirs in front."""
        return {
            name if policy == "student" else f"{policy}/{name}": parameter
            for policy in self._policies
            for name, parameter in self.family.adapter_parameters(policy).items()
        }

    def owner(self, item: WorkItem) -> int:
        """The rank that trains on an item."""
        return item.position % self.engine.ranks

    def layout(self) -> dict[str, Tensor]:
        """Names, shapes and formats of the weights in their order, without their numbers (on the meta device)."""
        parameters = self.family.adapter_parameters(self.algorithm.behaviour)
        return {
            name: torch.empty(self.engine.shape(parameter), dtype=parameter.dtype, device="meta")
            for name, parameter in sorted(parameters.items())
        }

    def gather(self, names: Iterable[str] | None = None, *, average: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The behaviour policy's raw weights, or the student's moving average (raw until one was taken), one by one.

        Those of these ``names``, or all that ``layout`` has. Each is whole, and on a backend that shards a new tensor:
        every rank has to go through all of them.
        """
        held = self._mean() if average else self._parts(self.family.adapter_parameters(self.algorithm.behaviour))
        yield from self._whole({name: held[name] for name in (self.layout() if names is None else names)})

    def collect(self, whole: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """What comes one by one, together: on the first rank alone, and in CPU memory where it was gathered.

        So a device holds one gathered tensor at a time. Every rank has to go through all of them.
        """
        kept = {}
        for name, tensor in whole:
            if self.engine.rank == 0:
                kept[name] = tensor.cpu() if self.engine.gathers else tensor
            del tensor  # before the next one is gathered
        return kept

    def probe(self, *, average: bool = False) -> Tensor:
        """The velocity of what ``gather`` gives, at the fixed probe input [1, C, H, W]; on every rank, too."""
        with self.family.adapter("student" if average else self.algorithm.behaviour), self._averaged(average):
            return probe_velocity(self.family, self.training.guidance, self.training.seed)

    @contextmanager
    def _averaged(self, average: bool) -> Iterator[None]:
        """The moving average in the student's place, where there is one."""
        if not average:
            yield
            return
        live = self._parts(self.student)
        raw = {name: part.clone() for name, (_, part) in live.items()}
        try:
            for name, (_, mean) in self._mean().items():
                live[name][1].copy_(mean)
            yield
        finally:
            for name, (_, part) in self._parts(self.student).items():
                part.copy_(raw[name])

    def hashes(self) -> dict[str, str | None]:
        """Identity of the raw student and of its moving average; on every rank, too."""
        average = self._digest(self._mean()) if self.ema is not None else None
        return {"student_sha256": self._digest(self._parts(self.student)), "ema_sha256": average}

    def _digest(self, held: Mapping[str, Held]) -> str:
        """``digest`` of the whole tensors, of which there is one at a time."""
        total = Digest()
        for name in sorted(held):
            total.add(name, self.engine.whole(*held[name]))
        return total.hex()

    def export(self, folder: Path) -> None:
        """Write what users load, on the first rank: the moving average where it is on. Every rank takes part."""
        weights = self.collect(self.gather(average=True))
        if self.engine.rank == 0 and self.training.lora is None:
            self.family.save_own(folder, weights)
        elif self.engine.rank == 0:
            self.family.save_lora("student", folder, weights=weights)

    def state(self) -> LearnerState:
        """Everything whole, by parameter name: live tensors, so write or copy them before the next update.

        Every rank has to ask for it; the first alone gets the tensors.
        """
        tensors = {group: self.collect(self._whole(held)) for group, held in self._groups().items()}
        tensors["optimizer"] = self.collect(self.engine.moments())
        counts = {"updates": self.updates, "student_updates": self.student_updates}
        own = {"algorithm": self.algorithm.state_dict(), "scaler": self.scale.state_dict()}
        return LearnerState(tensors, counts | own)

    def load_state(self, state: LearnerState) -> None:
        """Take back what ``state`` gave.

        Raises:
            RunFolderError: it holds other tensors than this learner has; nothing was taken.
        """
        own, saved = self._groups(), dict(state.tensors)
        moments = saved.pop("optimizer", {})
        for group in own.keys() | saved.keys():
            mine = {name: self.engine.shape(parameter) for name, (parameter, _) in own.get(group, {}).items()}
            theirs = {name: tuple(tensor.shape) for name, tensor in saved.get(group, {}).items()}
            if mine != theirs:
                other = min(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
                raise RunFolderError(
                    f"the checkpoint's {group} is not this run's: {other} is {theirs.get(other, 'missing')} there and "
                    f"{mine.get(other, 'missing')} here"
                )
        shapes = {name: self.engine.shape(parameter) for name, parameter in self.engine.trained.items()}
        for key, value in moments.items():
            name, _ = split_key(key)
            if name not in shapes or tuple(value.shape) not in {(), shapes[name]}:
                raise RunFolderError(f"the checkpoint's optimizer has {key}, which belongs to no trained parameter")
        for group, held in own.items():
            for name, (parameter, part) in held.items():
                self.engine.write(parameter, part, saved[group][name])
        self.engine.written()
        self.engine.load_moments(moments)
        self.updates = int(state.values["updates"])
        rounds = self.updates // self.algorithm.updates_per_round  # checkpoints did not always have the other count
        self.student_updates = int(state.values.get("student_updates", rounds * self.algorithm.student_updates))
        self.algorithm.load_state_dict(state.values["algorithm"])
        self.scale.load_state_dict(state.values["scaler"])

    def _parts(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Held]:
        return {name: (parameter, self.engine.part(parameter)) for name, parameter in parameters.items()}

    def _whole(self, held: Mapping[str, Held]) -> Iterator[tuple[str, Tensor]]:
        for name, (parameter, part) in held.items():
            yield name, self.engine.whole(parameter, part)

    def _groups(self) -> dict[str, Mapping[str, Held]]:
        """What is saved beside the optimizer: the live parts by group and name."""
        groups: dict[str, Mapping[str, Held]] = {"student": self._parts(self.student)}
        for name in self.beside:
            groups[f"adapter.{name}"] = self._parts(self.family.adapter_parameters(name))
        return groups if self.ema is None else groups | {"ema": self._averages(self.ema)}

    def _averages(self, ema: Mapping[str, Tensor]) -> dict[str, Held]:
        return {name: (self.student[name], part) for name, part in ema.items()}

    def _velocities(self, forward: Forward) -> dict[str, Tensor]:
        """Velocities [B, C, H, W] of the forward's policy (with gradient) and of those that the loss compares with."""
        guided, velocities = self.algorithm.guided and forward.policy == "student", dict[str, Tensor]()
        guidance = self.training.guidance if guided else 1.0
        for name, (x, t) in forward.beside.items():
            with torch.no_grad(), self.family.adapter(name):
                velocities[name] = self.family.velocity(x, t, forward.cond, {}, 1.0)
        for name in self.algorithm.velocities:
            with torch.no_grad(), self.family.adapter(name if name in self.beside else None):
                velocities[name] = self.family.velocity(forward.x, forward.t, forward.cond, forward.uncond, guidance)
        x, t, cond, uncond = forward.x, forward.t, forward.cond, forward.uncond
        velocities[forward.policy] = self.family.velocity(x, t, cond, uncond, guidance)
        return velocities

    def _set_lr(self) -> float:
        chosen, total = self.training.optimizer, self.training.rounds * self.algorithm.updates_per_round
        lr = chosen.lr
        if chosen.schedule == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * min(self.updates / total, 1.0)))
        self.engine.set_lr(lr)
        return lr

    def _mean(self) -> Mapping[str, Held]:
        """The student's moving average, or its weights until there is one: before that it is the untrained start."""
        if self.ema is not None and self.training.ema is not None and self.student_updates >= self.training.ema.every:
            return self._averages(self.ema)
        return self._parts(self.student)

    def _average(self) -> None:
        """EMA once a step of the student, at its interval; the decay warms up, since the start is the base."""
        done = self.student_updates
        if self.ema is None or self.training.ema is None or done % self.training.ema.every:
            return
        decay = min(self.training.ema.decay, (1 + done) / (10 + done))
        for name, average in self.ema.items():
            average.lerp_(self.engine.part(self.student[name]), 1 - decay)
