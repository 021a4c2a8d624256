"""The identity of named tensors, and a checksum that is as fast as memory."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["as_bytes", "checksum", "digest"]

ROW = 2**18
"""Bytes: state and row together stay in a core's second cache, and numpy's own cost of a call does not show."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplying loses nothing; its bits are those of the golden ratio."""
HALF = np.uint64(32)
TURNS = 8


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


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hex checksum over names, dtypes, shapes and bytes, whatever the order of the mapping; about as fast as memcpy.

    Finds what goes wrong on the way: any one changed byte for certain, anything else (swapped or missing parts, many
    changes) but for a chance of about 2^-64. It does not withstand somebody who looks for a collision: ``digest`` does.

    The bytes are taken in rows of 64-bit lanes. Each lane has a state of its own, multiplied before a row is added to
    it. That alone carries nothing downwards, so rows that differ in a lane's highest bits, as signs do, could change
    places unseen: of eight rows each is turned by another number of bytes, and then the upper half goes into the lower
    one. Every step can be undone, given the row; so a difference in one row stays a difference. sha256 over all states,
    names and shapes makes one word of them. Lanes do not depend on one another, so threads change nothing.
    """
    state, scratch, used = np.zeros(ROW, np.uint8), np.empty(ROW // 8, np.uint64), 0
    names = []
    for name in sorted(tensors):
        tensor = tensors[name]
        names.append([name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)])
        content = as_bytes(tensor).cpu().numpy()
        used = max(used, _lanes(min(len(content), ROW)))
        _absorb(state, content, scratch)
    total = hashlib.sha256(json.dumps(names).encode() + b"\n")
    total.update(state[: 8 * used].data)
    return total.hexdigest()


def _lanes(nbytes: int) -> int:
    return -(-nbytes // 8)


def _absorb(state: npt.NDArray[np.uint8], content: npt.NDArray[np.uint8], scratch: npt.NDArray[np.uint64]) -> None:
    """Take one tensor's bytes into the state, in place."""
    for number, start in enumerate(range(0, len(content), ROW)):
        row = content[start : start + ROW]
        lanes = state.view(np.uint64)[: _lanes(len(row))]
        if number % TURNS == 0:
            upper = np.right_shift(lanes, HALF, out=scratch[: len(lanes)])
            np.bitwise_xor(lanes, upper, out=lanes)
        np.multiply(lanes, MULTIPLIER, out=lanes)
        turn = number % TURNS % len(row)
        rest = len(row) - turn
        np.add(state[:rest], row[turn:], out=state[:rest])
        np.add(state[rest : len(row)], row[:turn], out=state[rest : len(row)])


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes [n] uint8, a view wherever it is contiguous."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element may be contiguous and have any stride, and 0-d tensors have no byte view.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
