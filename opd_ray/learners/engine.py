"""The training engine behind a learner rank: who wraps the module, and when gradients are reduced."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

__all__ = ["MEETING", "DdpEngine", "Engine"]

MEETING = "OPD_RAY_MEETING"
"""Environment variable: the file in which ranks of one node meet. Otherwise they meet at torch's MASTER_ADDR."""


class Engine(Protocol):
    """What a learner needs of data parallelism."""

    rank: int
    ranks: int

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module to call in forwards."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients stay on this rank inside, but for the last backward of an update, which reduces them all."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of a loss that is summed over the ranks."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the reduced gradients to a norm of at most ``max_norm``; returns the norm before."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether it is true on any rank; every rank has to ask."""
        ...


class DdpEngine:
    """DistributedDataParallel through accelerate; a single rank runs the bare module.

    Raises:
        RuntimeError: accelerate set up another backend or world than asked for. On CPU it does so silently.
    """

    def __init__(self, rank: int, ranks: int, *, device: str = "cpu") -> None:
        # No buffer changes while training, and a broadcast would hang where one rank alone runs a forward (a probe).
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        if ranks > 1 and (meeting := os.environ.get(MEETING)) and not dist.is_initialized():
            # By ourselves: accelerate gives rank and world size to a file's rendezvous on the CPU alone.
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[ddp])
        self.rank, self.ranks = rank, ranks
        kind = self.accelerator.distributed_type
        expected = {DistributedType.NO} if ranks == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
        got = (self.accelerator.process_index, self.accelerator.num_processes)
        if kind not in expected or got != (rank, ranks):
            raise RuntimeError(f"asked accelerate for ddp rank {rank} of {ranks}, got {kind} rank {got[0]} of {got[1]}")
        self._module: nn.Module | None = None

    def prepare(self, module: nn.Module) -> nn.Module:
        """Wrapped in DistributedDataParallel where there are several ranks."""
        prepared = self.accelerator.prepare_model(module)
        assert isinstance(prepared, nn.Module)
        self._module = prepared
        return prepared

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """One reduction an update, in its last backward."""
        if last or self.ranks == 1:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self._module)
        return context

    def backward(self, loss: Tensor) -> None:
        """DDP averages over ranks where the loss is a sum over them, hence the factor."""
        (loss * self.ranks).backward()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """The norm is that of the reduced gradients, so it is the same on every rank."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    def anywhere(self, flag: bool) -> bool:
        """One small reduction."""
        if self.ranks == 1:
            return flag
        found = torch.tensor(float(flag), device=self.accelerator.device)
        dist.all_reduce(found)
        return bool(found)
