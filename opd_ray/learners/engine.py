"""The engine behind a learner rank: who holds which part of the weights, reduces the gradients and steps."""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from opd_ray.config import OptimizerConfig
from opd_ray.errors import RunFolderError

__all__ = ["INSTALL", "LOOPBACK", "MEETING", "MOMENTS", "Engine", "LossScale", "join", "local", "split_key"]

MEETING = "OPD_RAY_MEETING"
"""Environment variable: the file in which ranks of one node meet. Otherwise they meet at torch's MASTER_ADDR."""
LOOPBACK = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo0" if sys.platform == "darwin" else "lo")
"""Environment of ranks that are on one node: nobody else can connect to them."""
INSTALL = "cluster.learner.backend deepspeed: not installed here; run DS_BUILD_OPS=0 pip install 'opd-ray[deepspeed]'"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Data parallelism of one rank, its optimizer included. As it stands here every rank holds whole weights.

    A *part* is what this rank holds of a tensor that is shaped like a parameter: the weights themselves, their average,
    a moment. What is called collective has to be entered by every rank, in the same order.

    Raises:
        RuntimeError: the backend is another than asked for, or has another rank or number of ranks.
    """

    name: ClassVar[str]
    """As the configuration names it."""
    lockstep: bool = False
    """Whether each forward or backward is collective, so that ranks need as many of them as each other."""
    gathers: ClassVar[bool] = False
    """Whether what is whole may have been gathered for whoever asked: a new tensor, on every rank's device."""
    trained: dict[str, nn.Parameter]
    """By canonical name, as they are once ``prepare`` has run; those of a policy beside the student have its name and a
    slash in front. An optimizer's group, and a norm that is clipped, for each policy."""
    optimizer: torch.optim.Optimizer
    """AdamW over the parts."""

    def __init__(self, rank: int, ranks: int, *, device: str = "cpu") -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self._clip = math.inf

    @abstractmethod
    def prepare(
        self, network: nn.Module, trained: Callable[[], dict[str, nn.Parameter]], chosen: OptimizerConfig
    ) -> nn.Module:
        """Spread the network over the ranks, and make the optimizer.

        Args:
            network: whole; on this rank's device, or in CPU memory where that never has to hold all of it.
            trained: reads the trained parameters off it; spreading may replace them.
            chosen: AdamW's settings and the gradient's largest norm.

        Returns:
            The module to call in forwards.
        """

    @abstractmethod
    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around each forward and its backward; the update's last says so, and gradients are reduced by its end."""

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradient of this rank's share of a loss that is summed over the ranks.

        Backends average over ranks, hence the factor.
        """
        (loss * scale * self.ranks).backward()

    def step(self, scale: float) -> float:
        """Unscale, clip each policy's own gradient, and step; collective.

        Returns:
            The norm of the whole gradient before clipping, the same on every rank. Where it is not finite, no weight
            and no moment was changed.
        """
        groups = [group["params"] for group in self.optimizer.param_groups]
        found = [[parameter.grad for parameter in group if parameter.grad is not None] for group in groups]
        if scale != 1:
            for gradient in (gradient for gradients in found for gradient in gradients):
                gradient.mul_(1 / scale)
        totals = [self._norm(gradients) for gradients in found]
        if math.isfinite(norm := math.hypot(*map(float, totals))):
            for group, total in zip(groups, totals, strict=True):
                torch.nn.utils.clip_grads_with_norm_(group, self._clip, total)
            self.optimizer.step()
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def set_lr(self, lr: float) -> None:
        """Of the steps from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def zero(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def most(self, count: int) -> int:
        """The largest of all ranks'; collective."""
        if self.ranks == 1:
            return count
        found = torch.tensor(count, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Of the whole of it."""
        return tuple(parameter.shape)

    def part(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of the live weights, sharing their memory."""
        return parameter.detach()

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """A part like this parameter's, with all other ranks' to it: of ``shape(parameter)``; collective."""
        return part

    def write(self, parameter: nn.Parameter, part: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of a whole tensor into ``part``. Afterwards call ``written``."""
        part.copy_(whole)

    def written(self) -> None:  # noqa: B027 (most have nothing to do then)
        """Parts of the live weights were written to from outside."""

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by name, as they are before a step; collective."""
        found = {name: parameter.grad for name, parameter in self.trained.items()}
        return {
            name: self.whole(self.trained[name], local(gradient)).clone()  # a step clips it in place
            for name, gradient in found.items()
            if gradient is not None
        }

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state as ``name:slot`` (step, exp_avg, exp_avg_sq), each one whole; collective."""
        for name, parameter in self.trained.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}:{slot}", self.whole(parameter, local(value)) if slot in MOMENTS else value

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take back what ``moments`` gave, on any backend; without any, those of a first step."""
        self.optimizer.state.clear()
        for key, value in moments.items():
            name, slot = split_key(key)
            parameter = self.trained[name]
            if slot in MOMENTS:
                held = torch.zeros_like(parameter, requires_grad=False)
                self.write(parameter, local(held), value)
            else:
                held = value.clone()  # a step count, which stays on the CPU
            self.optimizer.state[parameter][slot] = held

    def _adamw(self, chosen: OptimizerConfig) -> torch.optim.AdamW:
        self._clip = chosen.clip
        policies: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            policies.setdefault(name.rpartition("/")[0], []).append(parameter)
        groups = [{"params": parameters} for parameters in policies.values()]
        return torch.optim.AdamW(groups, chosen.lr, chosen.betas, chosen.eps, chosen.weight_decay)


class LossScale:
    """What an fp16 loss is multiplied by: torch's GradScaler, but by the norm of all ranks' gradient.

    A shard of it may be finite on one rank and not on another. 1 throughout where it is off.
    """

    start: ClassVar[float] = 2.0**16
    growth_interval: ClassVar[int] = 2000
    """Steps without an overflow after which it doubles."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled, self.value, self._good = enabled, self.start if enabled else 1.0, 0

    def update(self, *, overflow: bool) -> None:
        """After each step: halve it after one that overflowed."""
        if not self.enabled:
            return
        self._good = 0 if overflow else self._good + 1
        if overflow:
            self.value /= 2
        elif self._good == self.growth_interval:
            self.value, self._good = self.value * 2, 0

    def state_dict(self) -> dict[str, float]:
        """As GradScaler's; empty where it is off."""
        return {"scale": self.value, "_growth_tracker": self._good} if self.enabled else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """What ``state_dict`` gave; nothing where it, or this, is off."""
        if self.enabled and state:
            self.value, self._good = float(state["scale"]), int(state["_growth_tracker"])


def join(rank: int, ranks: int, device: str) -> None:
    """Meet the other ranks, and see that it is they.

    Raises:
        RuntimeError: this process is another rank, or one of another number of ranks.
    """
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        if ranks == 1:
            os.environ.update(LOOPBACK)
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        elif meeting := os.environ.get(MEETING):
            dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        else:
            dist.init_process_group(backend, rank=rank, world_size=ranks)
    got = (dist.get_rank(), dist.get_world_size())
    if got != (rank, ranks):
        raise RuntimeError(f"asked for rank {rank} of {ranks}, this process is rank {got[0]} of {got[1]}")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be a DTensor."""
    from torch.distributed.tensor import DTensor

    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def split_key(key: str) -> tuple[str, str]:
    """``name:slot`` of one of AdamW's tensors."""
    name, _, slot = key.rpartition(":")
    if slot not in {"step", *MOMENTS}:
        raise RunFolderError(f"the checkpoint's optimizer has {key}; expected one of step, {', '.join(MOMENTS)}")
    return name, slot
