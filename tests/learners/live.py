"""How many bytes of tensors are alive at a time, counted rather than measured."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
