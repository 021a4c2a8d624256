"""What files of pairs hold, from their small columns alone: labels and captions, never a picture.

Ties and pairs without a caption are known before anything is read, so they shift no other pair. Columns are those of
Pick-a-Pic v2 (arXiv 2305.01569; yuvalkirstain/pickapic_v2): label_0 and label_1 are 1 and 0, or 0.5 twice for a tie.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.config import PairsConfig
from opd_ray.errors import PromptError

__all__ = ["COLUMNS", "LABELS", "PairIndex", "Shard", "index_pairs", "opened"]

LABELS = ("label_0", "label_1")
COLUMNS = ("jpg_0", "jpg_1", *LABELS, "caption")
LINES = 256
"""Of a jsonl file that are taken together, as the rows of a row group are."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that are read together: a row group of a Parquet file, or some lines of a jsonl file."""

    file: str
    start: int
    """The row group, or where its first line begins, in bytes."""
    first: int
    """Rows of the file before it."""
    rows: int
    mask: bytes
    """A bit for each row: whether it is a pair to learn from."""

    @property
    def kept(self) -> npt.NDArray[np.intp]:
        """The rows that count, ascending."""
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.mask, np.uint8), count=self.rows))

    def where(self, row: int) -> str:
        """For messages; rows of a file count from 1."""
        return f"{self.file} row {self.first + row + 1}"


@dataclass(frozen=True, slots=True)
class PairIndex:
    """Every row of every file, and which of them count."""

    shards: tuple[Shard, ...]
    counts: tuple[int, ...]
    """Of each shard: rows that count."""
    ties: int
    empty: int
    """Without a caption."""

    @property
    def pairs(self) -> int:
        """Rows that count: the length of an epoch."""
        return sum(self.counts)

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(shard.rows for shard in self.shards)

    def digest(self) -> str:
        """sha256 of what a continued run must find again; folders may be others."""
        total = hashlib.sha256()
        for shard in self.shards:
            about = [Path(shard.file).name, shard.start, shard.first, shard.rows]
            total.update(json.dumps(about).encode() + shard.mask)
        return total.hexdigest()

    def __str__(self) -> str:
        left_out = [f"{self.ties:,} ties" if self.ties else "", f"{self.empty:,} without a caption" * bool(self.empty)]
        told = " and ".join(filter(None, left_out))
        return f"{self.pairs:,} of {self.rows:,} pairs" + (f"; left out: {told}" if told else "")


def index_pairs(config: PairsConfig) -> PairIndex:
    """Look through all files.

    Raises:
        PromptError: a file is missing, is no Parquet, lacks a column or has no pair that counts, or a caption is empty
            where ``on_bad`` is stop.
    """
    shards, ties, empty = list[Shard](), 0, 0
    for path in _files(config.files):
        try:
            for shard, tied, blank in _lines(path) if path.suffix == ".jsonl" else _row_groups(path):
                shards.append(shard)
                ties, empty = ties + int(tied.sum()), empty + int(blank.sum())
                if config.on_bad == "stop" and blank.any():
                    row = shard.first + int(blank.argmax()) + 1
                    raise PromptError(f"row {row} has no caption; mend it, or set pairs.on_bad: skip")
        except PromptError as error:
            raise PromptError(f"pairs.files: {path}: {error}") from None
    index = PairIndex(tuple(shards), tuple(len(shard.kept) for shard in shards), ties, empty)
    if not index.pairs:
        raise PromptError(f"pairs.files: {', '.join(config.files)}: {_why_none(index)}")
    return index


def _why_none(index: PairIndex) -> str:
    if not index.rows:
        return "has no rows; expected at least one pair"
    if index.ties == index.rows:
        return f"all {index.rows} rows are ties, their labels are equal or missing; there is nothing to learn from"
    return f"none of {index.rows} rows is left: {index.ties} ties, {index.empty} without a caption"


def _files(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        path = Path(name)
        if not path.is_dir():
            if path.suffix not in {".parquet", ".jsonl"}:
                raise PromptError(f"pairs.files: {name}: expected .parquet, .jsonl or a folder that holds them")
            yield path
            continue
        inside = [path / "pairs.jsonl"] if (path / "pairs.jsonl").is_file() else sorted(path.glob("*.parquet"))
        if not inside:
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise PromptError(f"pairs.files: {name}: expected pairs.jsonl or .parquet files in it, found {found}")
        yield from inside


def opened(path: Path, columns: Sequence[str] = COLUMNS) -> Any:
    """A Parquet file that has the columns.

    Raises:
        PromptError: it is none, cannot be read, or lacks one of them.
    """
    import pyarrow as pa  # half a second, and most runs have no pairs
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except OSError as error:
        where = "" if path.is_absolute() else f"; looked in {Path.cwd()}"
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())  # pyarrow's may have none
        raise PromptError(f"cannot be read ({reason}{where})") from None
    except pa.ArrowException as error:
        raise PromptError(f"is no Parquet file ({' '.join(str(error).split())})") from None
    there = file.schema_arrow.names
    missing = [name for name in columns if name not in there]
    if missing:
        raise PromptError(f"has no column {', '.join(missing)}; it has {', '.join(there) or 'none'}")
    for name in columns if file.metadata.num_rows else ():
        kind = file.schema_arrow.field(name).type
        if name.startswith("jpg") and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise PromptError(f"has column {name} of type {kind}, expected binary: the bytes of a picture's file")
        if name.startswith("label") and not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise PromptError(f"has column {name} of type {kind}, expected a number: 1, 0, or 0.5 for a tie")
    return file


Found = tuple[Shard, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""A shard, which of its rows are ties, and which others have no caption."""


def _row_groups(path: Path) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.compute as pc

    file, first = opened(path), 0
    for group in range(file.num_row_groups):
        try:
            table = file.read_row_group(group, columns=[*LABELS, "caption"])
            # A label that is missing is NaN, and NaN is neither more nor less.
            better, worse = (table[name].cast(pa.float64()).to_numpy() for name in LABELS)
            captions = pc.fill_null(pc.utf8_trim_whitespace(table["caption"].cast(pa.large_string())), "")
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise PromptError(
                f"row group {group} cannot be read as labels (numbers) and captions (text) ({reason})"
            ) from None
        blank = pc.equal(captions, "").to_numpy()
        tied = ~((better > worse) | (better < worse))
        yield _found(str(path), group, first, tied, blank)
        first += table.num_rows


def _found(file: str, start: int, first: int, tied: npt.NDArray[np.bool_], blank: npt.NDArray[np.bool_]) -> Found:
    mask = np.packbits(~(tied | blank)).tobytes()
    return Shard(file, start, first, len(tied), mask), tied, blank & ~tied


def _lines(path: Path) -> Iterator[Found]:
    start, first, blank = 0, 0, list[bool]()

    def found() -> Found:
        return _found(str(path), start, first, np.zeros(len(blank), bool), np.array(blank, bool))

    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    blank.append(not _checked(line, number)["prompt"].strip())
                if len(blank) == LINES:
                    yield found()
                    start, first, blank = file.tell(), first + LINES, []
    except OSError as error:
        raise PromptError(f"cannot be read ({error.strerror})") from None
    if blank:
        yield found()


def _checked(line: bytes, number: int) -> dict[str, str]:
    """A row of a jsonl file."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"line {number} is not JSON ({error})") from None
    there = row if isinstance(row, dict) else {}
    wrong = [key for key in ("prompt", "winner", "loser") if not isinstance(there.get(key), str)]
    if wrong:
        has = ", ".join(map(str, there)) or "none"
        raise PromptError(f"line {number} has no {', '.join(wrong)} as text; it has {has}")
    return there
