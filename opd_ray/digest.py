"""The identity of named tensors, and a checksum that is as fast as memory."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Checksum", "Digest", "as_bytes", "checksum", "digest"]

ROW = 2**18
"""Bytes: state and row together stay in a core's second cache, and numpy's own cost of a call does not show."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplying loses nothing; its bits are those of the golden ratio."""
HALF = np.uint64(32)
TURNS = 8

Bytes = npt.NDArray[np.uint8]


class Digest:
    """sha256 over names, dtypes, shapes and bytes of tensors that come one after the other, sorted by name."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """The next one."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        # A JSON line before each content: no two different sets of tensors run into one another.
        self._total.update(json.dumps([name, dtype, tuple(tensor.shape)]).encode() + b"\n")
        self._total.update(as_bytes(tensor).cpu().numpy().data)

    def hex(self) -> str:
        """Of all that came."""
        return self._total.hexdigest()


class Checksum:
    """``checksum`` over tensors that come one after the other, sorted by name.

    Args:
        largest: bytes of the largest of them.
    """

    def __init__(self, largest: int) -> None:
        self._state = _start(min(largest, ROW))
        self._names: list[Any] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """The next one."""
        self._names.append([name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)])
        _absorb(self._state, as_bytes(tensor).cpu().numpy())

    def hex(self) -> str:
        """Of all that came."""
        total = hashlib.sha256(json.dumps(self._names).encode() + b"\n")
        total.update(self._state.data)
        return total.hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes, whatever the order of the mapping."""
    total = Digest()
    for name in sorted(tensors):
        total.add(name, tensors[name])
    return total.hex()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hex checksum over names, dtypes, shapes and bytes, whatever the order of the mapping; about as fast as memcpy.

    Finds what goes wrong on the way: any one changed byte for certain, anything else (swapped or missing parts, many
    changes) but for a chance of about 2^-64. It does not withstand somebody who looks for a collision: ``digest`` does.

    The bytes are taken in rows, and each 64-bit lane of a row goes into a state of its own: of two rows one is added,
    the other one combined by exclusive or, then the state is multiplied. That alone carries nothing downwards, so rows
    that differ in a lane's highest bits, as signs do, could change places unseen: of eight rows each is turned by
    another number of bytes, and then the state's upper halves go into its lower ones. Every step can be undone, given
    the row; so a difference in one row stays a difference. sha256 over all states, names and shapes makes one word of
    them. Lanes do not depend on one another, so threads change nothing.
    """
    total = Checksum(max((tensor.nbytes for tensor in tensors.values()), default=0))
    for name in sorted(tensors):
        total.add(name, tensors[name])
    return total.hex()


def _start(nbytes: int) -> Bytes:
    """The state before any row: no lane is like another one, and none is zero, which multiplying would keep."""
    return (np.arange(1, _lanes(nbytes) + 1, dtype=np.uint64) * MULTIPLIER).view(np.uint8)


def _lanes(nbytes: int) -> int:
    return -(-nbytes // 8)


def _absorb(state: Bytes, content: Bytes) -> None:
    """Take one tensor's bytes into the state, in place."""
    whole = len(content) // ROW * ROW
    lanes = state.view(np.uint64)
    for number, start in enumerate(range(0, whole, ROW)):
        _take(state, lanes, content[start : start + ROW], number % TURNS)
    rest = len(content) - whole
    if rest:
        number = whole // ROW % TURNS
        _take(state[:rest], lanes[: _lanes(rest)], content[whole:], number)


def _take(state: Bytes, lanes: npt.NDArray[np.uint64], row: Bytes, number: int) -> None:
    if number == 0:
        np.bitwise_xor(lanes, lanes >> HALF, out=lanes)
    if number % 2 == 0:
        np.multiply(lanes, MULTIPLIER, out=lanes)
    combine = np.bitwise_xor if number % 2 else np.add
    turn = number % len(row)
    rest = len(row) - turn
    combine(state[:rest], row[turn:], out=state[:rest])
    if turn:
        combine(state[rest:], row[:turn], out=state[rest:])


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes [n] uint8, a view wherever it is contiguous."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element may be contiguous and have any stride, and 0-d tensors have no byte view.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
