"""Reads words back: normalised cross-correlation with every glyph, then the row's peaks in order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_ray.world.captions import LETTERS
from opd_ray.world.detect import background_difference
from opd_ray.world.glyphs import HEIGHT, WIDTH, templates

_MIN_MATCH = 0.72
"""Uniform noise peaks at about 0.55 over all glyphs and places."""
_MIN_INK = 0.04
"""Standard deviation under a glyph below which there is nothing to read."""
SPACING = 8
_ROW_SLACK = 2
_MARGIN = 1


def _matches(images: Tensor) -> Tensor:
    """Correlation of each letter with the window centred at each pixel, [B, letters, H, W]."""
    strength = background_difference(images).square().sum(1, keepdim=True).sqrt()
    # Blank margins make a glyph's surroundings count: an "l" inside an "e" is no "l".
    glyphs = F.pad(templates(), (_MARGIN,) * 4)
    glyphs = glyphs - glyphs.mean((1, 2), keepdim=True)
    glyphs = glyphs / glyphs.square().sum((1, 2), keepdim=True).sqrt()
    height, width = HEIGHT + 2 * _MARGIN, WIDTH + 2 * _MARGIN
    padded = F.pad(strength, (width // 2, width // 2, height // 2, height // 2))
    dots = F.conv2d(padded, glyphs[:, None])
    count = height * width
    ones = torch.ones(1, 1, height, width)
    total, squares = F.conv2d(padded, ones), F.conv2d(padded.square(), ones)
    spread = (squares - total.square() / count).clamp_min(count * _MIN_INK**2).sqrt()
    return dots / spread


def read(images: Tensor) -> list[str]:
    """The word in each picture [B, 3, 32, 32] in [0, 1], empty where nothing is legible."""
    images = images.detach().float().cpu()
    best, letters = _matches(images).max(1)
    # Letters stand 8 pixels apart. Two neighbours' strokes can look like a third letter between
    # them, 4 pixels from both, never as clear as either.
    window = (HEIGHT, 2 * (SPACING // 2) + 1)
    peaks = F.max_pool2d(best[:, None], window, stride=1, padding=(HEIGHT // 2, SPACING // 2))
    is_peak = (best >= peaks[:, 0]) & (best >= _MIN_MATCH)
    return [_row(*row) for row in zip(is_peak, best, letters, strict=True)]


def _row(is_peak: Tensor, best: Tensor, letters: Tensor) -> str:
    """The letters on the line of the clearest peak, from left to right."""
    places = is_peak.nonzero().tolist()
    if not places:
        return ""
    line = max(places, key=lambda place: float(best[place[0], place[1]]))[0]
    on_line = sorted(x for y, x in places if abs(y - line) <= _ROW_SLACK)
    ys = {x: y for y, x in places if abs(y - line) <= _ROW_SLACK}
    return "".join(LETTERS[int(letters[ys[x], x])] for x in dict.fromkeys(on_line))


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
