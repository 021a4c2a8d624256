"""The pairs actor: reads preference pairs and encodes pictures and captions for the learner, in place of drawing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from opd_ray.models.base import Family
from opd_ray.pairs.windows import Row, Rows
from opd_ray.seeds import fold

__all__ = ["Item", "PairsActor"]


@dataclass(frozen=True, slots=True)
class Item:
    """One work item of pairs."""

    tensors: dict[str, Tensor]
    """`winner` and `loser` [B, C, h, w] float32, `cond.<name>` [B, ...], `empty.<name>` [1, ...] of no caption."""
    faults: tuple[str, ...]
    """What is wrong with pairs in whose places others stand."""


class PairsActor:
    """Reads the work item of a number: the pairs from ``number * size`` on."""

    def __init__(
        self, family: Family, rows: Callable[[int], Rows], *, size: int, flip: int | None = None, ahead: int = 1024
    ) -> None:
        """What it reads with.

        Args:
            family: with its text encoders and its VAE.
            rows: given the height and width of a picture, what gives the rows from a position on.
            size: pairs of an item.
            flip: the run's seed, where pictures are mirrored at random.
            ahead: so many rows are read over to come to an item; beyond that it begins anew there.
        """
        with torch.no_grad():
            blank = family.decode(torch.zeros(1, *family.latent_shape, device=family.device))
        self.family, self.side = family, int(blank.shape[-1])
        self._from, self._size, self._flip, self._ahead = rows(self.side), size, flip, ahead
        self._rows: Iterator[Row] = iter(())
        self._next: int | None = None

    def read(self, number: int) -> Item:
        """The same tensors whatever was read before.

        Raises:
            PromptError: a file cannot be read any more, or too many pairs are broken.
        """
        rows = self._take(number * self._size)
        latents = self.family.encode_images(torch.cat([self._pictures(rows, 0), self._pictures(rows, 1)]))
        winner, loser = latents.split(len(rows))
        tensors = {"winner": winner, "loser": loser}
        tensors |= {f"cond.{name}": one for name, one in self.family.encode([row.caption for row in rows]).items()}
        tensors |= {f"empty.{name}": one for name, one in self.family.empty().items()}
        return Item(tensors, tuple(row.fault for row in rows if row.fault))

    def _take(self, start: int) -> list[Row]:
        """The next rows in order stream on; elsewhere they are looked up."""
        if self._next is None or not 0 <= start - self._next <= self._ahead:
            self._rows, self._next = self._from(start), start
        skipped, self._next = start - self._next, None  # not known, if reading fails
        rows = list(islice(self._rows, skipped, skipped + self._size))
        self._next = start + self._size
        return rows

    def _pictures(self, rows: list[Row], side: int) -> Tensor:
        """The winners (0) or losers (1), [B, 3, height, width] in [0, 1]."""
        found = []
        for row in rows:
            data = (row.winner, row.loser)[side]
            picture = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.side, self.side, 3).permute(2, 0, 1)
            )
            mirrored = self._flip is not None and fold(self._flip, "pairs", "flip", row.position) >> side & 1
            found.append(picture.flip(-1) if mirrored else picture)
        return torch.stack(found).to(self.family.device).float() / 255
