"""What a worker process holds that reads pairs."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from opd_ray.actors.pairs import PairsActor
from opd_ray.runtime.handle import Done
from opd_ray.storage.packing import Flat, Manifest, pack

__all__ = ["PairsHost", "PairsRead"]


@dataclass(frozen=True, slots=True)
class PairsRead:
    """The record of a work item of pairs."""

    manifest: Manifest
    pairs: int
    faults: tuple[str, ...]
    """File and row of each pair whose pictures are broken, and what is wrong with it."""


class PairsHost:
    """Reads pairs."""

    def __init__(self, make: Callable[[], PairsActor]) -> None:
        self.actor = make()

    def ready(self) -> Done:
        """Who came up."""
        return Done(os.getpid(), 0.0, 0)

    def read(self, number: int) -> tuple[Flat, Done]:
        """The tensors of one work item."""
        start = time.perf_counter()
        item = self.actor.read(number)
        flat, manifest = pack(item.tensors)
        record = PairsRead(manifest, len(item.tensors["winner"]), item.faults)
        return flat, Done(record, time.perf_counter() - start, 0)
