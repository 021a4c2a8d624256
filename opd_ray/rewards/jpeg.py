"""How well a picture compresses: a reward that needs no model, and one that is easily over-optimised.

Source: DDPO (arXiv 2305.13301, section 5.1), which PSO and Flow-GRPO take over.
"""

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from opd_ray.errors import ConfigError
from opd_ray.rewards.probes import Probe
from opd_ray.rewards.raster import Pixels, as_pixels

__all__ = ["JpegCompressibility", "JpegIncompressibility"]

QUALITY = 95


class JpegIncompressibility:
    """scale * size of the picture as JPEG of quality 95, in kB of 1000 bytes. Range: above 0.

    Args:
        scale: 1 as in DDPO and PSO.
    """

    sign = 1.0

    def __init__(self, *, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ConfigError(f"a JPEG reward's scale is {scale}; give a number above 0 (its name says the direction)")
        self.scale = scale

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; prompts are not looked at."""
        sizes = [_kilobytes(pixels) for pixels in as_pixels(images)]
        return self.sign * self.scale * torch.tensor(sizes)

    def probes(self) -> list[Probe]:
        """Noise against one grey."""
        noise = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), "")
        flat = (torch.full((3, 64, 64), 0.5), "")
        return [Probe(noise, flat) if self.sign > 0 else Probe(flat, noise)]


class JpegCompressibility(JpegIncompressibility):
    """-scale * size of the picture as JPEG of quality 95, in kB of 1000 bytes. Range: below 0.

    Args:
        scale: 1 as in DDPO and PSO; 1/500 (0.002) as in Flow-GRPO.
    """

    sign = -1.0


def _kilobytes(pixels: Pixels) -> float:
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
