"""What the workers of an evaluation hold that make pictures: a model that draws, or files that are read."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from opd_ray.actors.rollout import SampleRequest, draw_pictures
from opd_ray.errors import PromptError
from opd_ray.evaluation.models import Found
from opd_ray.models.base import Family
from opd_ray.pairs.pictures import BadPicture, decoded
from opd_ray.runtime.handle import Done
from opd_ray.storage.packing import Flat, pack
from opd_ray.storage.pictures import write_png

__all__ = ["DrawingHost", "ReadingHost"]


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
        return flat, Done(manifest, time.perf_counter() - start, family.forwards - rows)

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

    def read(self, files: Sequence[str]) -> tuple[Flat, Done]:
        """Pictures of one size.

        Raises:
            PromptError: one of them cannot be read.
        """
        start = time.perf_counter()
        images = []
        for file in files:
            try:
                pixels = np.array(decoded(Path(file).read_bytes()))
            except (OSError, BadPicture) as error:
                raise PromptError(f"{file} {error}; mend it or take it out") from None
            images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        flat, manifest = pack({"images": torch.stack(images)})
        return flat, Done(manifest, time.perf_counter() - start, 0)
