"""Pictures as image libraries take them, and the last batch remembered for rewards that look at the same."""

import hashlib
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opd_ray.rewards.pixels import rounded

__all__ = ["LastBatch", "Pixels", "as_pixels", "as_tensor"]

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]


def as_pixels(images: Tensor) -> Pixels:
    """[B, 3, H, W] in [0, 1] to [B, H, W, 3], rounded to the nearest of 0..255, as a saved picture is."""
    levels = rounded(images.detach()).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def as_tensor(pixels: Pixels) -> Tensor:
    """[H, W, 3] of 0..255 to [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


class LastBatch(Generic[T]):
    """A function of pictures that answers from memory when the same batch comes again.

    Several rewards of one worker ask the same of every batch, one after the other: one of them pays.
    """

    def __init__(self, look: Callable[[Pixels], T]) -> None:
        self._look = look
        self._lock = Lock()
        self._known: tuple[object, T] | None = None

    def __call__(self, pixels: Pixels) -> T:
        """What ``look`` says of pictures [B, H, W, 3]; known by their bytes, since tensors are made anew."""
        key = (pixels.shape, hashlib.sha256(pixels.data).digest())
        with self._lock:
            if self._known is None or self._known[0] != key:
                self._known = None  # the old answer need not be kept beside the new one
                self._known = (key, self._look(pixels))
            return self._known[1]
