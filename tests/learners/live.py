"""How many bytes of tensors are alive at a time, counted rather than measured."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_ray.learners import Engine, Learner, fsdp2
from opd_ray.learners.deepspeed import DeepSpeedEngine


class Live(TorchDispatchMode):
    """Inside it: the largest sum of bytes of the storages that were made inside it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        for tensor in filter(_plain, tree_leaves((args, kwargs))):
            self._meet(tensor, made=False)
        found = func(*args, **(kwargs or {}))
        for tensor in filter(_plain, tree_leaves(found)):
            self._meet(tensor, made=True)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return found

    def _meet(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key)
        if made:
            self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self._known.discard(key)
        self._sizes.pop(key, None)


def _plain(leaf: Any) -> bool:
    """Without what has no storage of its own: a tensor around others, and one that is a shape alone."""
    return type(leaf) in (Tensor, torch.nn.Parameter) and leaf.device.type != "meta"


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[Any]:
    """Another attribute meanwhile; gives what was there."""
    real = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield real
    finally:
        setattr(owner, name, real)


@contextmanager
def spread_by(engine: Engine, network: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """For each step in which an engine spreads weights: bytes that go to the device, and bytes left whole anywhere.

    torch moves what a module has and is not sharded yet; DeepSpeed one parameter, which it empties then, and in
    ``initialize`` whatever is not empty.
    """
    weights, steps = [weakref.ref(parameter) for parameter in network.parameters()], list[tuple[int, int]]()

    def whole() -> int:
        return sum(p.nbytes for p in (ref() for ref in weights) if p is not None and not isinstance(p, DTensor))

    def shard(module: torch.nn.Module, **options: Any) -> Any:
        moved = sum(p.nbytes for p in module.parameters() if not isinstance(p, DTensor))
        found = real(module, **options)
        steps.append((moved, whole()))
        return found

    def initialize(*args: Any, **options: Any) -> Any:
        steps.append((whole(), whole()))
        return real(*args, **options)

    owner, name, new = (
        (engine._deepspeed, "initialize", initialize)
        if isinstance(engine, DeepSpeedEngine)
        else (fsdp2, "fully_shard", shard)
    )
    with replaced(owner, name, new) as real:
        yield steps


def alive(one: Learner, folder: Path) -> dict[str, int]:
    """Bytes of new tensors that are alive at a time while weights are gathered, by what they are gathered for."""
    asked = {
        "state": one.state,
        "hashes": one.hashes,
        "export": lambda: one.export(folder),
    }
    found = {}
    for name, ask in asked.items():
        with Live() as live:
            ask()
        found[name] = live.peak
    return found
