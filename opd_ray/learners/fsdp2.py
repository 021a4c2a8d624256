"""FSDP2: every rank holds an equal part of each weight, its gradient and its moments (torch's ``fully_shard``)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from opd_ray.config import OptimizerConfig
from opd_ray.learners.engine import Engine, join, local

__all__ = ["FsdpEngine"]


class FsdpEngine(Engine):
    """Weights are whole block by block, while a forward or a backward needs them."""

    name = "fsdp2"
    lockstep = True
    gathers = True

    def __init__(self, rank: int, ranks: int, *, device: str = "cpu") -> None:
        super().__init__(rank, ranks, device=device)
        join(rank, ranks, device)
        self._mesh = init_device_mesh(device, (ranks,))

    def prepare(
        self, network: nn.Module, trained: Callable[[], dict[str, nn.Parameter]], chosen: OptimizerConfig
    ) -> nn.Module:
        """In place. Blocks are the members of the network's outermost module lists.

        Each goes to the device when its turn comes, and only this rank's part of it stays there.
        """
        for module in (*_blocks(network), network):
            # The root as well: its live weights are read and written between forwards.
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        whole = [name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)]
        if whole or not isinstance(network, FSDPModule):
            raise RuntimeError(f"asked torch for fsdp2, and {len(whole)} weights are not sharded: {whole[:1]}")
        self.trained = trained()
        self.optimizer = self._adamw(chosen)
        return network

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Each backward reduces at once: whole gradients, kept until the last, could be as large as what is sharded."""
        return nullcontext()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        total = super()._norm(gradients)
        return total.full_tensor() if isinstance(total, DTensor) else total

    def part(self, parameter: nn.Parameter) -> Tensor:
        """Rows of it."""
        return local(parameter)

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """One gather."""
        assert isinstance(parameter, DTensor)
        shards = DTensor.from_local(
            part,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return shards.full_tensor()

    def write(self, parameter: nn.Parameter, part: Tensor, whole: Tensor) -> None:
        """Ranks hold consecutive rows; the last may have fewer, or none."""
        rows = torch.chunk(whole, self.ranks)
        if self.rank < len(rows):
            part.copy_(rows[self.rank])


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
