"""Scenes to pixels, a batch at a time."""

import torch
from torch import Tensor

from opd_ray.world.glyphs import HEIGHT, WIDTH, glyph
from opd_ray.world.scenes import Scene

SIZE = 32
PALETTE = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.68, 0.20),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.97, 0.87, 0.10),
}


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (about) to a shape of half-width 1; negative inside. Shapes as x and y."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1
    box = torch.maximum(x.abs(), y.abs()) - 1
    if shape == "square":
        return box
    # Apex at the top, base at the bottom; the flank's normal has length sqrt(1.25).
    flank = (x.abs() - (y + 1) / 2) / 1.25**0.5
    return torch.maximum(flank, y - 1)


def _coverage(scene: Scene, grid: Tensor) -> list[tuple[Tensor, tuple[float, float, float]]]:
    layers = []
    for item in scene.objects:
        x = (grid[None, :] - item.x) / item.radius
        y = (grid[:, None] - item.y) / item.radius
        inside = (0.5 - distance(item.shape, x, y) * item.radius).clamp(0, 1)
        layers.append((inside.expand(SIZE, SIZE), PALETTE[item.colour]))
    if scene.word:
        mask = torch.zeros(SIZE, SIZE)
        for i, letter in enumerate(scene.word):
            left = scene.x + 8 * i + 1
            mask[scene.y : scene.y + HEIGHT, left : left + WIDTH] = glyph(letter)
        layers.append((mask, scene.style.ink))
    return layers


def _blur_matrices(sigmas: Tensor) -> Tensor:
    """Row-stochastic Gaussian smoothing along one axis, [B, SIZE, SIZE]; sigma 0 is the identity."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    gap = (axis[:, None] - axis[None, :]).square()
    kernel = torch.exp(-gap / (2 * sigmas.clamp_min(1e-3).square()[:, None, None]))
    return kernel / kernel.sum(-1, keepdim=True)


def render(scenes: list[Scene]) -> Tensor:
    """Draw scenes, [B, 3, SIZE, SIZE] in [0, 1]."""
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    images = torch.empty(len(scenes), 3, SIZE, SIZE)
    for image, item in zip(images, scenes, strict=True):
        background = torch.tensor(item.style.background)[:, None, None]
        image[:] = background
        for mask, rgb in _coverage(item, grid):
            colour = torch.tensor(rgb)[:, None, None]
            colour = colour + (background - colour) * item.style.fade
            image += mask * (colour - image)
    blur = _blur_matrices(torch.tensor([item.style.blur for item in scenes]))
    return blur[:, None] @ images @ blur[:, None].transpose(-1, -2)
