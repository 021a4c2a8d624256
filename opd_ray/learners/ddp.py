"""DistributedDataParallel: every rank holds everything, and gradients are reduced once an update."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from opd_ray.config import OptimizerConfig
from opd_ray.learners.engine import MEETING, Engine, join

__all__ = ["DdpEngine"]


class DdpEngine(Engine):
    """Through accelerate; a single rank runs the bare module. On CPU accelerate sets up another world silently."""

    name = "ddp"

    def __init__(self, rank: int, ranks: int, *, device: str = "cpu") -> None:
        super().__init__(rank, ranks, device=device)
        # No buffer changes while training, and a broadcast would hang where one rank alone runs a forward (a probe).
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        if ranks > 1 and os.environ.get(MEETING):
            # By ourselves: accelerate gives rank and world size to a file's rendezvous on the CPU alone.
            join(rank, ranks, device)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[ddp])
        kind = self.accelerator.distributed_type
        expected = {DistributedType.NO} if ranks == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
        got = (self.accelerator.process_index, self.accelerator.num_processes)
        if kind not in expected or got != (rank, ranks):
            raise RuntimeError(f"asked accelerate for ddp rank {rank} of {ranks}, got {kind} rank {got[0]} of {got[1]}")
        self._module: nn.Module | None = None

    def prepare(
        self, network: nn.Module, trained: Callable[[], dict[str, nn.Parameter]], chosen: OptimizerConfig
    ) -> nn.Module:
        """Wrapped in DistributedDataParallel where there are several ranks."""
        prepared = self.accelerator.prepare_model(network)
        assert isinstance(prepared, nn.Module)
        self._module, self.trained = prepared, trained()
        self.optimizer = self._adamw(chosen)
        return prepared

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """One reduction an update, in its last backward; in ``step`` where that has one policy's gradient alone."""
        if self.ranks == 1 or (last and not self._several):
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self._module)
        return context

    @property
    def _several(self) -> bool:
        return len(self.optimizer.param_groups) > 1

    def step(self, scale: float) -> float:
        """Also reduces, where ``accumulate`` does not: DDP would wait for every parameter's gradient."""
        if self.ranks > 1 and self._several:
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(self.ranks))
        return super().step(scale)
