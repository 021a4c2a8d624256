"""A rule-based object detector: connected regions, matched against ideal shapes and hues.

Nothing is learned and no caption is seen here, so a picture cannot talk the detector into an object.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_ray.world.captions import COLOURS, SHAPES
from opd_ray.world.render import SIZE, distance

MAX_OBJECTS = 8
_MIN_AREA, _MAX_AREA = 40, 190
_MIN_STRENGTH = 0.06
_MIN_LIKENESS = 0.9
_WINDOW = 16
_RADII = (4.7, 5.2, 5.7)
_OFFSETS = (-0.6, 0.0, 0.6)
_MIN_CHROMA = 0.12
_HUES = {"red": (-28.0, 24.0), "yellow": (36.0, 72.0), "green": (85.0, 170.0), "blue": (195.0, 275.0)}
_SPREAD_STEPS = 24


@dataclass(frozen=True)
class Found:
    """One detected object. ``shape`` or ``colour`` is None where it resembles none of ours."""

    shape: str | None
    colour: str | None
    x: float
    y: float


def background_difference(images: Tensor) -> Tensor:
    """Each pixel's colour less the background's, [B, 3, H, W].

    The background is the median colour of the outermost pixels: four large squares cover more
    than half of a picture, but nothing covers half of its rim.
    """
    rows, columns = images[..., (0, -1), :].flatten(2), images[..., (0, -1)].flatten(2)
    return images - torch.cat([rows, columns], 2).median(dim=2).values[:, :, None, None]


def _strength(images: Tensor) -> Tensor:
    """How far each pixel's colour is from the background's, brightness aside, [B, H, W].

    Letters differ from their background in brightness; an object close to one stays apart from it.
    """
    difference = background_difference(images)
    return (difference - difference.mean(1, keepdim=True)).square().sum(1).sqrt()


def _regions(mask: Tensor) -> Tensor:
    """Label 4-connected regions by their largest pixel number; 0 is outside. [B, H, W] to [B, H, W]."""
    labels = torch.arange(1, SIZE * SIZE + 1, dtype=torch.float32).view(1, SIZE, SIZE) * mask
    for _ in range(_SPREAD_STEPS):
        across = F.max_pool2d(labels[:, None], (1, 3), stride=1, padding=(0, 1))
        down = F.max_pool2d(labels[:, None], (3, 1), stride=1, padding=(1, 0))
        labels = torch.maximum(across, down)[:, 0] * mask
    return labels


def _largest_regions(images: Tensor) -> tuple[Tensor, Tensor]:
    """The largest regions, [B, MAX_OBJECTS, H, W] each: masks, and how far each pixel is covered.

    Empty where there are fewer regions.
    """
    strength = _strength(images)
    peak = strength.flatten(1).amax(1)[:, None, None]
    labels = _regions((strength > (0.3 * peak).clamp_min(_MIN_STRENGTH)).float())
    flat = labels.flatten(1).long()
    sizes = torch.zeros(len(images), SIZE * SIZE + 1).scatter_add_(1, flat, (flat > 0).float())
    largest = sizes.topk(MAX_OBJECTS, dim=1)
    masks = labels[:, None] == largest.indices[:, :, None, None]
    masks &= (largest.values > 0)[:, :, None, None]
    inside = masks * strength[:, None]
    # A blurred edge belongs to its object down to a share of the object's own height.
    masks &= inside > 0.4 * inside.flatten(2).amax(2)[:, :, None, None]
    areas = masks.flatten(2).sum(2).clamp_min(1)
    height = (inside * masks).flatten(2).sum(2) / areas
    return masks, (inside / height.clamp_min(1e-3)[:, :, None, None]).clamp(0, 1)


@cache
def _ideals() -> Tensor:
    """Ideal shapes in a window around their centroid, [shapes, sizes and offsets, _WINDOW ** 2]."""
    axis = torch.arange(_WINDOW) + 0.5 - _WINDOW / 2
    variants = [(shape, radius, dx, dy) for shape, radius, dx, dy in product(SHAPES, _RADII, _OFFSETS, _OFFSETS)]
    ideals = []
    for shape, radius, dx, dy in variants:
        # A triangle's centroid lies a third of its half-height below its middle.
        low = radius / 3 if shape == "triangle" else 0.0
        x, y = (axis[None, :] - dx) / radius, (axis[:, None] - dy + low) / radius
        ideals.append((0.5 - distance(shape, x, y) * radius / 1.5).clamp(0, 1))
    return torch.stack(ideals).view(len(SHAPES), -1, _WINDOW**2)


def _likeness(covered: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Best Dice overlap of each region with each ideal shape, [B, K, shapes]."""
    half = _WINDOW // 2
    steps = torch.arange(_WINDOW)
    padded = F.pad(covered, (half,) * 4)
    # The window's middle is the pixel corner nearest to the centroid.
    rows = (ys.round().long()[:, :, None] + steps)[:, :, :, None]
    columns = (xs.round().long()[:, :, None] + steps)[:, :, None, :]
    images, regions = (torch.arange(n) for n in covered.shape[:2])
    window = padded[images[:, None, None, None], regions[:, None, None], rows, columns].flatten(2)
    ideals = _ideals()
    both = torch.einsum("bkp,snp->bksn", window, ideals)
    sizes = window.square().sum(-1)[:, :, None, None] + ideals.square().sum(-1)
    return (2 * both / sizes).amax(-1)


def _hue(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Hue in degrees from -28 on, and chroma. [..., 3] to [...], [...]."""
    high, low = rgb.amax(-1), rgb.amin(-1)
    chroma = high - low
    r, g, b = rgb.unbind(-1)
    third = chroma.clamp_min(1e-6)
    hue = torch.where(high == r, (g - b) / third, torch.where(high == g, 2 + (b - r) / third, 4 + (r - g) / third))
    hue = hue * 60
    return torch.where(hue > 300, hue - 360, hue), chroma


def detect(images: Tensor) -> list[list[Found]]:
    """Find the objects in pictures [B, 3, 32, 32] in [0, 1], one list a picture.

    Regions too small for an object (letters, specks) are not listed.
    """
    images = images.detach().float().cpu()
    masks, covered = _largest_regions(images)
    areas = masks.flatten(2).sum(2)
    weights = masks / areas.clamp_min(1)[:, :, None, None]
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    xs = (weights.sum(2) * axis).sum(-1)
    ys = (weights.sum(3) * axis).sum(-1)
    hues, chroma = _hue(torch.einsum("bkhw,bchw->bkc", weights, images))
    likeness, best = _likeness(covered, xs, ys).max(-1)
    best = torch.where((likeness >= _MIN_LIKENESS) & (areas <= _MAX_AREA), best, -1)
    rows = zip(
        areas.tolist(), best.tolist(), hues.tolist(), chroma.tolist(), xs.tolist(), ys.tolist(),
        strict=True,
    )  # fmt: skip
    return [
        [
            Found(SHAPES[shape] if shape >= 0 else None, _colour(hue, strength), x, y)
            for area, shape, hue, strength, x, y in zip(*row, strict=True)
            if area >= _MIN_AREA
        ]
        for row in rows
    ]


def _colour(hue: float, chroma: float) -> str | None:
    if chroma < _MIN_CHROMA:
        return None
    return next((name for name in COLOURS if _HUES[name][0] <= hue <= _HUES[name][1]), None)
