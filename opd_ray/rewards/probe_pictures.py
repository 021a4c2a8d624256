"""Pictures that code makes, and the pairs of them that a working scorer of pictures must rank."""

import torch
from torch import Tensor

from opd_ray.rewards.probes import Probe

__all__ = ["colours", "noise", "smooth", "square"]

SIZE = 224
"""Pixels: what most scorers resize to."""
COLOURS = {"red": (0.85, 0.1, 0.1), "blue": (0.1, 0.2, 0.85)}


def colours() -> list[Probe]:
    """For rewards of a picture by its prompt: a red and a blue square, each asked for once."""
    red, blue = square("red"), square("blue")
    return [
        Probe((red, "a red square"), (blue, "a red square")),
        Probe((blue, "a blue square"), (red, "a blue square")),
    ]


def square(colour: str) -> Tensor:
    """[3, 224, 224]: a square of half the edge on white."""
    picture = torch.ones(3, SIZE, SIZE)
    inside = slice(SIZE // 4, 3 * SIZE // 4)
    picture[:, inside, inside] = torch.tensor(COLOURS[colour])[:, None, None]
    return picture


def smooth() -> Tensor:
    """[3, 224, 224]: an evening sky, from dark blue to orange."""
    top, bottom = torch.tensor([0.1, 0.15, 0.4]), torch.tensor([1.0, 0.6, 0.3])
    down = torch.linspace(0, 1, SIZE)
    return torch.lerp(top[:, None], bottom[:, None], down)[:, :, None].expand(3, SIZE, SIZE).contiguous()


def noise() -> Tensor:
    """[3, 224, 224]: every pixel for itself, the same at every call."""
    return torch.rand((3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
