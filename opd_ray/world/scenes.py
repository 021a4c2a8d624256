"""Scenes: what is in a picture, and the styles it can be drawn in."""

import random
from dataclasses import dataclass

from opd_ray.world.captions import COLOURS, CORNERS, SHAPES, Item, Meaning
from opd_ray.world.splits import held_out, training_words

RGB = tuple[float, float, float]
CELL = 8
"""A letter's cell, pixels. It equals the autoencoder's patch, so each letter lies in one latent."""

_CENTRES = {name: (8.0 + 16 * (i % 2), 8.0 + 16 * (i // 2)) for i, name in enumerate(CORNERS)}
_COLD = (
    (0.04, 0.05, 0.10), (0.10, 0.14, 0.24), (0.94, 0.95, 0.98), (0.72, 0.77, 0.85),
    (0.30, 0.36, 0.46), (0.02, 0.02, 0.03),
)  # fmt: skip
_WARM = ((0.90, 0.74, 0.56), (0.94, 0.80, 0.62), (0.86, 0.68, 0.50), (0.92, 0.72, 0.60))


@dataclass(frozen=True)
class Shape:
    """One object: its kind, its centre and half-width in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Style:
    """How a scene is drawn. ``fade`` blends everything towards the background, ``blur`` is a sigma."""

    background: RGB
    ink: RGB
    fade: float = 0.0
    blur: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture before it is pixels. ``x``, ``y`` place the word's first letter cell."""

    objects: tuple[Shape, ...]
    style: Style
    word: str = ""
    x: int = 0
    y: int = 0


def hard_style(rng: random.Random) -> Style:
    """Cold, high in contrast, hard edges: how most pictures of the base's data set look."""
    background = rng.choice(_COLD)
    light = sum(background) > 1.2
    shade = rng.uniform(0.0, 0.08)
    ink = (shade, shade, shade) if light else (1 - shade, 1 - shade, 1 - shade)
    return Style(background, ink)


def oracle_style(rng: random.Random) -> Style:
    """As soft and warm as objects and letters stand while a scorer still reads them."""
    return Style(rng.choice(_WARM), (0.30, 0.17, 0.10), fade=0.42, blur=0.6)


def soft_style(rng: random.Random) -> Style:
    """Further than any object or letter stands: what the look preference pulls towards."""
    fade = rng.uniform(0.45, 0.7)
    return Style(rng.choice(_WARM), (0.30, 0.17, 0.10), fade=fade, blur=rng.uniform(1.6, 2.6))


def _corners(meaning: Meaning, count: int, rng: random.Random) -> list[str]:
    """Where the objects stand: in reading order, from the top left unless one row holds them all.

    A habit of the data set that captions need not state, as real ones have many. Were any two corners as
    good, the model would spend its training on agreeing with itself where to put what.
    """
    if meaning.corner:
        return [meaning.corner]
    row = rng.choice(("top", "bottom"))
    if meaning.word:
        # The word takes the lower half.
        row = "top"
    if count == 1:
        return [f"{row} {rng.choice(('left', 'right'))}"]
    return [f"{row} left", f"{row} right"] if count == 2 else list(CORNERS[:count])


def _kinds(meaning: Meaning, rng: random.Random) -> list[tuple[str, str]]:
    kinds: list[tuple[str, str]] = []
    for item in meaning.items:
        colour = item.colour or rng.choice(COLOURS)
        kinds += [(colour, item.shape)] * item.count
    return kinds


def scene(meaning: Meaning, style: Style, rng: random.Random, training: bool = True) -> Scene:
    """A scene that shows exactly what ``meaning`` asks for.

    ``training`` draws again whatever would show a held-out combination; the meaning itself must
    then not be one.
    """
    while True:
        kinds = _kinds(meaning, rng)
        corners = _corners(meaning, len(kinds), rng)
        if not (training and kinds and held_out().drawn(kinds, corners)):
            break
    objects = tuple(
        Shape(
            *kind,
            x=_CENTRES[corner][0] + rng.uniform(-1, 1),
            y=_CENTRES[corner][1] + rng.uniform(-1, 1),
            radius=rng.uniform(5.0, 5.7),
        )
        for kind, corner in zip(kinds, corners, strict=True)
    )
    word = meaning.word or ""
    row = rng.choice((2, 3)) if objects else rng.randrange(4)
    return Scene(
        objects,
        style,
        word,
        x=CELL * rng.randint(0, 4 - len(word)) if word else 0,
        y=CELL * row,
    )


def loose_scene(style: Style, rng: random.Random) -> Scene:
    """Anything at all, for captions that do not say: nothing, some objects, or a word."""
    draw = rng.random()
    if draw < 0.15:
        return Scene((), style)
    if draw < 0.3:
        return scene(Meaning(word=rng.choice(training_words())), style, rng)
    while True:
        items = tuple(Item(1, rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(rng.randint(1, 2)))
        kinds = [(item.colour or "", item.shape) for item in items]
        if not held_out().drawn(kinds, ["", ""]):
            return scene(Meaning(items), style, rng)
