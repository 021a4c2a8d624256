"""Pictures as CLIP and BLIP read them: the preprocessing that all published scorers here were trained with.

Scores are of what a file would show, so pictures are rounded to 8 bits first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from opd_ray.errors import RewardError

__all__ = ["cropped", "normalised", "padded", "rounded"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of each channel in [0, 1]: OpenAI's, which open_clip, BLIP and every CLIP here use too."""


def rounded(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] to whole numbers of 0 to 255, as float32.

    Raises:
        RewardError: another shape, or pictures that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise RewardError(f"pictures are {list(images.shape)}, expected [B, 3, H, W]")
    if not bool(images.isfinite().all()):
        raise RewardError("pictures hold NaN or infinity, which would be scored as if they were black or white")
    return (images.float() * 255).round().clamp(0, 255)


def cropped(images: Tensor, size: int) -> Tensor:
    """As CLIP's own image processor does it: [B, 3, H, W] in [0, 1] to [B, 3, size, size], normalised.

    The shorter side becomes ``size`` (bicubic, antialiased), then the middle is cut out. As in a picture library, each
    row is resized, then each column, and either is rounded to 8 bits: at sharp edges that differs by several levels.
    """
    pixels = rounded(images)
    height, width = images.shape[-2:]
    shorter = min(height, width)
    rows = _resized(pixels, height, size * width // shorter).round().clamp(0, 255)
    scaled = _resized(rows, size * height // shorter, rows.shape[-1]).round().clamp(0, 255)
    top, left = (scaled.shape[-2] - size) // 2, (scaled.shape[-1] - size) // 2
    return normalised(scaled[..., top : top + size, left : left + size])


def padded(images: Tensor, size: int) -> Tensor:
    """As HPSv2 does it: the longer side becomes ``size``, and black fills the rest; without a second rounding."""
    pixels = rounded(images)
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    scaled = _resized(pixels, round(height * scale), round(width * scale))
    down, right = size - scaled.shape[-2], size - scaled.shape[-1]
    return normalised(F.pad(scaled, (right // 2, right - right // 2, down // 2, down - down // 2)))


def normalised(pixels: Tensor) -> Tensor:
    """0 to 255 to what the networks take."""
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (MEAN, STD))
    return (pixels / 255 - mean) / std


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    if (height, width) == pixels.shape[-2:]:
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
