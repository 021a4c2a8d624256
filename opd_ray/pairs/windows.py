"""The pairs of a window with their pictures: read in this process or in tasks of Ray Data, bit for bit the same."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from opd_ray.errors import PromptError
from opd_ray.pairs.index import COLUMNS, Shard, opened
from opd_ray.pairs.pictures import BadPicture, prepared

__all__ = ["Reading", "Row", "Rows", "Window"]


@dataclass(frozen=True, slots=True)
class Row:
    """What is at one position of the stream."""

    position: int
    where: str
    """File and row of the pair."""
    caption: str
    winner: bytes
    """[side, side, 3] of uint8."""
    loser: bytes
    fault: str = ""
    """Why the pair whose place this is cannot be read; this one then stands in for it."""


Rows = Callable[[int], Iterator[Row]]
"""The rows from a position on, without end."""


@dataclass(frozen=True, slots=True)
class Window:
    """Pairs that are shuffled among one another."""

    start: int
    """Position of its first pair in the stream."""
    shards: tuple[Shard, ...]
    places: tuple[tuple[int, int], ...]
    """In their order: number of the shard, and row of the shard."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How pairs become rows."""

    side: int
    """Height and width of a picture."""
    on_bad: Literal["skip", "stop"] = "skip"
    max_bad: float = 1.0
    least: int = 1
    """The last window of an epoch may be small: of so many pairs at least ``max_bad`` may be broken."""

    def rows(self, window: Window, skip: int = 0) -> Iterator[Row]:
        """The rows of a window after the first ``skip``.

        The place of a pair with a broken picture is taken by the next whole pair of its window: every other pair stays
        where it is, so that a row never depends on what was read before it.

        Raises:
            PromptError: a file cannot be read any more, or more pairs are broken than may be.
        """
        groups, places, broken = [_Group(shard) for shard in window.shards], window.places, 0
        for place in range(skip, len(places)):
            found = self._attempt(groups, window, place)
            fault = found if isinstance(found, str) else ""
            if fault:
                broken += 1
                self._require_few(fault, broken, len(places))
                others = (self._attempt(groups, window, (place + step) % len(places)) for step in range(1, len(places)))
                found = next((other for other in others if not isinstance(other, str)), fault)
            if isinstance(found, str):
                raise PromptError(f"{fault}, and so is every other pair of its window; mend the file")
            pair, pictures = found
            yield Row(window.start + place, pair.where, pair.caption, *pictures, fault)

    def _require_few(self, fault: str, broken: int, pairs: int) -> None:
        if self.on_bad == "stop":
            raise PromptError(f"{fault}; mend it, or set pairs.on_bad: skip")
        if broken > self.max_bad * max(pairs, self.least):
            raise PromptError(
                f"{fault}: {broken} of {pairs} pairs that are read together are broken, more than pairs.max_bad "
                f"{self.max_bad:g} allows; mend the files or raise it"
            )

    def _attempt(
        self, groups: Sequence["_Group"], window: Window, place: int
    ) -> "tuple[Pair, tuple[bytes, bytes]] | str":
        """A pair with its pictures, else what is wrong with it."""
        number, row = window.places[place]
        pair = groups[number].pair(row)
        pictures = list[bytes]()
        for name, data in pair.pictures.items():
            try:
                pictures.append(prepared(data, self.side).tobytes())
            except BadPicture as error:
                return f"{pair.where}: {name} {error}"
        winner, loser = pictures
        return pair, (winner, loser)


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair as its file holds it."""

    where: str
    caption: str
    pictures: dict[str, bytes | None] = field(repr=False)
    """The winner's and the loser's bytes, by what the file calls them."""


class _Group:
    """The rows of a shard, read when the first of them is asked for."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._rows: Any = None

    def pair(self, row: int) -> Pair:
        """Raises PromptError where the file cannot be read any more."""
        if self._rows is None:
            self._rows = self._read()
        where, path = self._shard.where(row), Path(self._shard.file)
        if path.suffix == ".jsonl":
            found = json.loads(self._rows[row])
            pictures = {f"{key} {found[key]}": _content(path.parent / found[key]) for key in ("winner", "loser")}
            return Pair(where, found["prompt"].strip(), pictures)
        cells = {name: self._rows[name][row].as_py() for name in COLUMNS}
        better = int(cells["label_1"] > cells["label_0"])
        pictures = {name: cells[name] for name in (f"jpg_{better}", f"jpg_{1 - better}")}
        return Pair(where, str(cells["caption"]).strip(), pictures)

    def _read(self) -> Any:
        """A table, or the lines."""
        shard, path = self._shard, Path(self._shard.file)
        try:
            if path.suffix == ".jsonl":
                with path.open("rb") as file:
                    file.seek(shard.start)
                    rows: Any = list(islice((line for line in file if line.strip()), shard.rows))
            else:
                rows = opened(path).read_row_group(shard.start, list(COLUMNS))
        except (OSError, PromptError) as error:
            raise PromptError(f"{shard.where(0)} cannot be read ({' '.join(str(error).split())})") from None
        if len(rows) != shard.rows:
            raise PromptError(f"{path} has changed since the run looked at it; put it back, or start again")
        return rows


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError):  # it is missing then, as where a cell of a Parquet file is empty
        return None
