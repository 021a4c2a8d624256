"""The 5x7 glyphs that words are drawn with and read back by."""

import torch
from torch import Tensor

from opd_ray.world.captions import LETTERS

WIDTH, HEIGHT = 5, 7
_FONT = {
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "b": "####. #...# #...# ####. #...# #...# ####.",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "i": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "o": ".###. #...# #...# #...# #...# #...# .###.",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "s": ".#### #.... #.... .###. ....# ....# ####.",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
}


def glyph(letter: str) -> Tensor:
    """One letter's coverage, [HEIGHT, WIDTH] of 0 and 1."""
    rows = _FONT[letter].split()
    return torch.tensor([[float(cell == "#") for cell in row] for row in rows])


def templates() -> Tensor:
    """All letters in the order of LETTERS, [letters, HEIGHT, WIDTH]."""
    return torch.stack([glyph(letter) for letter in LETTERS])
