"""Checkpoints in memory: loaded when they are asked for, and let go by least recent use under a limit."""

import gc
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from opd_ray.errors import ModelError, PlacementError
from opd_ray.models.base import Family
from opd_ray.models.teachers import Checkpoint

__all__ = ["Residents", "check_fits_limit"]

GB = 1e9
Stamp = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of each file."""


def check_fits_limit(limit: float | None, kept: float, sizes: Mapping[str, float]) -> None:
    """Whether each teacher fits into a worker beside what is never let go.

    Args:
        limit: bytes of weights that a worker may hold.
        kept: bytes of the LoRAs and their base.
        sizes: teacher -> bytes of its checkpoint.

    Raises:
        PlacementError: the teacher, the sum and the limit.
    """
    if limit is None:
        return
    advice = "raise it, or compute in bf16 (precision.teacher)"
    if kept > limit:
        raise PlacementError(
            f"the teachers' LoRAs and their base are {kept / GB:.3g} GB, more than cluster.teacher_memory_gb "
            f"{limit / GB:.3g}, and they always stay; {advice}"
        )
    for name, size in sizes.items():
        if kept + size > limit:
            beside = f"{kept / GB:.3g} GB of LoRAs and their base, which stay, and " if kept else ""
            raise PlacementError(
                f"teacher {name!r} needs {beside}{size / GB:.3g} GB of its own, together {(kept + size) / GB:.3g} GB, "
                f"more than cluster.teacher_memory_gb {limit / GB:.3g}; {advice}"
            )


class Residents:
    """The checkpoints of one worker, as many at a time as its limit allows."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], *, kept: int, limit: float | None) -> None:
        """As many as fit are loaded at once, in the order given.

        Args:
            checkpoints: by teacher; equal ones are held once.
            kept: bytes of weights that are in memory anyway.
            limit: bytes of weights altogether; None: all of them are loaded and stay.

        Raises:
            PlacementError: one of them can never fit.
        """
        self.loading = 0.0
        """Seconds spent on loading so far."""
        self._sizes = {checkpoint: checkpoint.nbytes() for checkpoint in checkpoints.values()}
        self._stamps = {checkpoint: _stamp(checkpoint.files()) for checkpoint in self._sizes}
        self._families: dict[Checkpoint, Family] = {}  # the one asked for last comes last
        self._rows_gone = 0
        check_fits_limit(limit, kept, {name: self._sizes[one] for name, one in checkpoints.items()})
        self._room = None if limit is None else limit - kept
        for checkpoint in self._sizes:
            if self._fits(checkpoint):
                self.get(checkpoint)

    @property
    def loaded(self) -> dict[Checkpoint, Family]:
        """What is in memory, the one asked for last at the end."""
        return dict(self._families)

    @property
    def forwards(self) -> int:
        """Rows that went through their denoisers, those that were let go among them."""
        return self._rows_gone + sum(family.forwards for family in self._families.values())

    def get(self, checkpoint: Checkpoint) -> Family:
        """The loaded model; others go first where there is no room for it.

        Raises:
            ModelError: it cannot be loaded, or its files are not those of the start.
        """
        family = self._families.pop(checkpoint, None)
        if family is None:
            start = time.perf_counter()
            self._make_room(checkpoint)
            family = self._load(checkpoint)
            self.loading += time.perf_counter() - start
        self._families[checkpoint] = family
        return family

    def _fits(self, checkpoint: Checkpoint) -> bool:
        return self._room is None or sum(map(self._sizes.__getitem__, (*self._families, checkpoint))) <= self._room

    def _make_room(self, checkpoint: Checkpoint) -> None:
        gone = False
        while self._families and not self._fits(checkpoint):
            oldest = next(iter(self._families))
            self._rows_gone += self._families.pop(oldest).forwards
            gone = True
        if gone:
            gc.collect()  # networks and pipelines point at one another
            if checkpoint.device == "cuda":
                torch.cuda.empty_cache()  # loading needs one large piece, not the holes that were left

    def _load(self, checkpoint: Checkpoint) -> Family:
        if _stamp(checkpoint.files()) != self._stamps[checkpoint]:
            raise ModelError(
                f"model {checkpoint.model.path!r} changed since the run began, which noted what it was; put its files "
                "back, then go on with --resume"
            )
        return checkpoint.load()


def _stamp(files: list[Path]) -> Stamp:
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
