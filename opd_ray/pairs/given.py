"""A handful of pictures that are preferred to whatever a model draws: a style, or a concept."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opd_ray.errors import PromptError
from opd_ray.pairs.pictures import BadPicture, prepared

__all__ = ["Given", "as_tensor", "given_pictures"]


@dataclass(frozen=True, slots=True)
class Given:
    """One of them."""

    prompt: str
    image: Path


def given_pictures(path: Path) -> tuple[Given, ...]:
    """The rows {prompt, image} of a .jsonl file; images are named as seen from it.

    Raises:
        PromptError: it cannot be read, has no rows, or one of them is none; with file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--pictures: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_row(path, number, line))
    if not found:
        raise PromptError(f'--pictures: {path} has no rows; each is {{"prompt": ..., "image": ...}}')
    return tuple(found)


def _row(path: Path, number: int, line: str) -> Given:
    try:
        row = json.loads(line)
        prompt, image = row["prompt"], path.parent / row["image"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("its prompt is empty")
    except (ValueError, TypeError, LookupError) as error:
        raise PromptError(f'--pictures: {path}:{number} is no row {{"prompt": ..., "image": ...}} ({error})') from None
    if not image.is_file():
        raise PromptError(f"--pictures: {path}:{number}: there is no {image}")
    return Given(prompt, image)


def as_tensor(given: Given, side: int) -> Tensor:
    """Its picture [3, side, side] in [0, 1].

    Raises:
        PromptError: it cannot be read.
    """
    try:
        pixels = prepared(given.image.read_bytes(), side)
    except (OSError, BadPicture) as error:
        raise PromptError(f"--pictures: {given.image} {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
