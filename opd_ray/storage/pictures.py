"""Pictures as files."""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["write_png"]


def write_png(image: Tensor, path: Path) -> None:
    """One picture [3, H, W] in [0, 1]."""
    from PIL import Image  # a worker that writes no pictures does not import it

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
