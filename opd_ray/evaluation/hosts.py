"""What the workers of an evaluation hold that make pictures: a model that draws, or files that are read."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_ray.actors.rollout import SampleRequest, draw_pictures
from opd_ray.evaluation.models import Found
from opd_ray.models.base import Family
from opd_ray.pairs.pictures import BadPicture, decoded, upright
from opd_ray.runtime.handle import Done
from opd_ray.storage.packing import Flat, Manifest, pack
from opd_ray.storage.pictures import write_png

__all__ = ["DrawingHost", "Made", "ReadingHost"]


@dataclass(frozen=True, slots=True)
class Made:
    """The record of a part's pictures."""

    manifest: Manifest
    faults: Mapping[int, str] = field(default_factory=dict)
    """Place of a picture that could not be read -> why."""


class DrawingHost:
    """Draws with any of an evaluation's models, of which it holds one at a time."""

    def __init__(self, models: Mapping[str, Found], device: str) -> None:
        self._models, self._device = models, device
        self._held: tuple[str, Family] | None = None

    def ready(self) -> Done:
        """Who came up."""
        return Done(os.getpid(), 0.0, 0)

    def sample(self, request: SampleRequest, files: Sequence[str]) -> tuple[Flat, Done]:
        """Pictures of the model that the request names; they are also written to PNG files, the first of them first."""
        start = time.perf_counter()
        family = self._family(request.model)
        rows = family.forwards
        images = draw_pictures(family, request)
        for file, image in zip(files, images, strict=False):
            if file:
                write_png(image, Path(file))
        flat, manifest = pack({"images": images})
        return flat, Done(Made(manifest), time.perf_counter() - start, family.forwards - rows)

    def _family(self, name: str) -> Family:
        if self._held is None or self._held[0] != name:
            self._held = None  # two may not fit
            self._held = name, self._models[name].load(self._device)
        return self._held[1]


class ReadingHost:
    """Reads pictures that were made elsewhere."""

    def ready(self) -> Done:
        """Who came up."""
        return Done(os.getpid(), 0.0, 0)

    def read(self, files: Sequence[str], size: tuple[int, int]) -> tuple[Flat, Done]:
        """Pictures of one width and height; a black one stands for each that cannot be read."""
        start = time.perf_counter()
        images, faults = [], dict[int, str]()
        for place, file in enumerate(files):
            try:
                images.append(_pixels(Path(file), size))
            except BadPicture as error:
                faults[place] = f"{file} {error}"
                images.append(torch.zeros(3, size[1], size[0]))
        flat, manifest = pack({"images": torch.stack(images)})
        return flat, Done(Made(manifest, faults), time.perf_counter() - start, 0)


def _pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """[3, H, W] in [0, 1], upright.

    Raises:
        BadPicture: it cannot be read.
    """
    try:
        picture = upright(decoded(file.read_bytes()))
    except OSError as error:
        raise BadPicture(f"cannot be read ({error.strerror})") from None
    if picture.size != size:  # it changed, or says its orientation only behind its pixels
        raise BadPicture(f"is {' x '.join(map(str, picture.size))}, but was {' x '.join(map(str, size))} before")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
