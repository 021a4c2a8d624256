"""Seeds are data: a function of names and numbers, never of a worker, a rank or the time.

The same run on one worker or on eight draws the same images. CPU generators only, so that the numbers do not depend
on the device either.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Stream", "fold", "generator", "noise"]

Stream = Literal["init_noise", "step_noise", "learner_noise", "order", "steps", "lora", "eval"]


def fold(seed: int, stream: Stream, *parts: int | str) -> int:
    """A 63-bit seed from the run's seed, a stream's name and whatever identifies the draw."""
    text = "\x1f".join(map(str, (seed, stream, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: Stream, *parts: int | str) -> torch.Generator:
    """A CPU generator at ``fold(...)``."""
    return torch.Generator("cpu").manual_seed(fold(seed, stream, *parts))


def noise(rows: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape] float32, one folded seed a row, so that a row's noise is its own."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(row)) for row in rows])
