"""The order of a run's pairs: where every position of an endless stream is, from the index and the seed alone.

An epoch shuffles the shards, takes as many of them together as hold ``window`` pairs, and shuffles inside each of these
windows. So any position is found without reading what comes before it.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opd_ray.pairs.index import PairIndex, Shard
from opd_ray.pairs.windows import Reading, Row, Window
from opd_ray.seeds import fold

__all__ = ["Order"]


@dataclass(frozen=True, slots=True)
class Span:
    """Where a window is; its own order is worked out when it is read."""

    start: int
    shards: tuple[Shard, ...]


class Order:
    """Positions count pairs that count, over all epochs; each epoch has every one of them once."""

    def __init__(self, index: PairIndex, seed: int, window: int) -> None:
        self._index, self._seed, self._window = index, seed, window
        self.pairs = index.pairs
        self._known: tuple[int, list[Span]] | None = None

    def windows(self, position: int) -> Iterator[Window]:
        """Without end: the window that holds a position, and those after it."""
        epoch = position // self.pairs
        first = bisect_right([span.start for span in self._epoch(epoch)], position) - 1
        while True:
            for number, span in enumerate(self._epoch(epoch)[first:], start=first):
                yield self._shuffled(epoch, number, span)
            epoch, first = epoch + 1, 0

    def rows(self, reading: Reading, position: int) -> Iterator[Row]:
        """Without end: the rows from a position on, read here."""
        for window in self.windows(position):
            yield from reading.rows(window, max(position - window.start, 0))

    def _shuffled(self, epoch: int, number: int, span: Span) -> Window:
        rows = [(shard, int(row)) for shard, one in enumerate(span.shards) for row in one.kept]
        order = self._permutation(len(rows), "rows", epoch, number)
        return Window(span.start, span.shards, tuple(rows[place] for place in order))

    def _epoch(self, epoch: int) -> list[Span]:
        """Its windows; those of one epoch are remembered."""
        if self._known is None or self._known[0] != epoch:
            self._known = epoch, list(self._spans(epoch))
        return self._known[1]

    def _spans(self, epoch: int) -> Iterator[Span]:
        counts, start = self._index.counts, epoch * self.pairs
        shards, pairs = list[Shard](), 0
        for number in self._permutation(len(counts), "shards", epoch):
            if counts[number]:
                shards.append(self._index.shards[number])
                pairs += counts[number]
            if pairs >= self._window:
                yield Span(start, tuple(shards))
                start, shards, pairs = start + pairs, [], 0
        if pairs:
            yield Span(start, tuple(shards))

    def _permutation(self, count: int, *names: int | str) -> list[int]:
        found: list[int] = np.random.default_rng(fold(self._seed, "pairs", *names)).permutation(count).tolist()
        return found
