"""The identity of named tensors."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["as_bytes", "digest"]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes, whatever the order of the mapping."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        # A JSON line before each content: no two different sets of tensors run into one another.
        total.update(json.dumps([name, dtype, tuple(tensor.shape)]).encode() + b"\n")
        total.update(as_bytes(tensor).cpu().numpy().data)
    return total.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes [n] uint8, a view wherever it is contiguous."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element may be contiguous and have any stride, and 0-d tensors have no byte view.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
