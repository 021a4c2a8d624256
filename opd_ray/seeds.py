"""Seeds are data: a function of names and numbers, never of a worker, a rank or the time.

The same run on one worker or on eight draws the same images. CPU generators only, so that the numbers do not depend
on the device either.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stream", "fold", "generator", "noise"]

Stream = Literal["init_noise", "step_noise", "learner_noise", "order", "pairs", "steps", "lora", "eval"]


def fold(seed: int, stream: Stream, *parts: int | str) -> int:
    """A 63-bit seed from the run's seed, a stream's name and whatever identifies the draw."""
    text = "\x1f".join(map(str, (seed, stream, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: Stream, *parts: int | str) -> torch.Generator:
    """A CPU generator at ``fold(...)``; torch takes 32 bits of it, plenty for the few draws of an order or an init."""
    return torch.Generator("cpu").manual_seed(fold(seed, stream, *parts))


def noise(rows: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape] float32, one folded seed a row, so that a row's noise is its own.

    From numpy's generator, which takes the whole seed: torch's CPU generator keeps 32 bits of it, so that among
    a hundred thousand rows two would likely be the same.
    """
    draws = [np.random.default_rng(row).standard_normal(tuple(shape), dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))
