"""Prompt files, and the seeded order in which a run goes through them.

A file is .txt (a prompt a line), .csv, .jsonl or .parquet. The text is in the column ``prompt``, ``text`` or
``caption`` (the first of these that is there); ``task``, ``id`` and ``weight`` are optional, and every other column
goes with the prompt as its metadata. So the field's own files are read as they are: GenEval's metadata, PickScore's and
DrawBench's lists, OCR prompts whose target is in double quotes.
"""

import csv
import hashlib
import io
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from opd_ray.errors import PromptError
from opd_ray.seeds import generator
from opd_ray.types import Prompt

__all__ = ["PromptFile", "PromptStream", "read_files", "read_prompts", "read_texts"]

TEXT_COLUMNS = ("prompt", "text", "caption")
MAX_WEIGHT = 1000
LISTED = 5
"""Places of malformed rows in a message, after the first one, which is told in full."""
Row = tuple[str, Mapping[str, Any] | PromptError]
"""Where a row is, for messages, and its columns or what is wrong with it."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file, and whose prompts it holds."""

    path: str
    task: str | None = None
    """Of every row; a row of another task is malformed."""
    otherwise: str | None = None
    """Of rows that name none."""


def read_prompts(
    spec: str | Mapping[str, str],
    what: str,
    *,
    on_bad: Literal["stop", "skip"] = "stop",
    deduplicate: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[Prompt, ...]]:
    """Read every prompt, by task, in the order of the files: ``read_files``.

    Args:
        spec: one file whose rows name their task, or a file for each task.
        what: the configuration key, for messages.
        on_bad: as ``read_files``.
        deduplicate: as ``read_files``.
        note: as ``read_files``.
    """
    files = [PromptFile(spec)] if isinstance(spec, str) else [PromptFile(file, task) for task, file in spec.items()]
    return read_files(files, what, on_bad=on_bad, deduplicate=deduplicate, note=note)


def read_files(
    files: Sequence[PromptFile],
    what: str,
    *,
    on_bad: Literal["stop", "skip"] = "stop",
    deduplicate: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[Prompt, ...]]:
    """Read every prompt, by task, in the order of the files.

    A prompt's id is its task and its row's own id, or else a hash of task and text: ids name noise, which two tasks
    must not share by accident. A repeated text is kept; from its second occurrence on, its number is part of the id.

    Args:
        files: at least one.
        what: the configuration key, for messages.
        on_bad: whether malformed rows are refused, or left out and told to ``note``.
        deduplicate: take each text of a task once: its first row.
        note: is told what was left out.

    Raises:
        PromptError: a file is missing, unreadable, empty or of an unknown kind, or a row is malformed: it has no text,
            no task, another task than its file, an id that its task has already, or a weight that is none.
    """
    table = _Table(deduplicate)
    for file in files:
        path, faults = Path(file.path), []
        try:
            kept = table.repeats
            for where, row in _rows(path):
                try:
                    if isinstance(row, PromptError):
                        raise row
                    table.add(where, row, file)
                    kept += 1
                except PromptError as error:
                    faults.append((where, error))
            if faults and on_bad == "stop":
                raise PromptError(_told(faults))
            if kept == table.repeats:
                raise PromptError("has no prompts; expected at least one" + (f": {_told(faults)}" if faults else ""))
        except PromptError as error:
            raise PromptError(f"{what}: {path}: {error}") from None
        if faults:
            note(f"{what}: {path}: {len(faults)} malformed rows are left out: {_told(faults)}")
    if table.repeats:
        note(f"{what}: {table.repeats} rows are left out, since they repeat a text of their task")
    return {task: tuple(by_id.values()) for task, by_id in table.prompts.items()}


def read_texts(path: Path) -> tuple[str, ...]:
    """The texts of a prompt file, each once, whatever their tasks and ids.

    Raises:
        PromptError: the file is missing, unreadable, empty or of an unknown kind, or a row has no text.
    """
    texts: dict[str, None] = {}
    try:
        for where, row in _rows(path):
            if isinstance(row, PromptError):
                raise row
            texts[_prompt_of(row, where)[1]] = None
        if not texts:
            raise PromptError("has no prompts; expected at least one")
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None
    return tuple(texts)


class PromptStream:
    """The order of a run's prompts: a function of seed, task and cursor alone.

    A cursor is the number of prompts of a task that were taken so far, over all epochs. It belongs
    to the caller and its checkpoint; the stream keeps no state.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], seed: int, *, weighted: bool = True) -> None:
        """Raises PromptError where a task has no prompts; without weights each of them counts once."""
        for task, rows in prompts.items():
            if not rows:
                raise PromptError(f"task {task!r} has no prompts; expected at least one")
        self._prompts = {task: tuple(rows) for task, rows in prompts.items()}
        self._weights = {
            task: torch.tensor([row.weight if weighted else 1.0 for row in rows], dtype=torch.float64)
            for task, rows in prompts.items()
        }
        self._seed = seed

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order in which they were given: the order of the learner's gradient."""
        return tuple(self._prompts)

    def take(self, task: str, cursor: int, count: int) -> tuple[tuple[Prompt, ...], int]:
        """The next ``count`` prompts after ``cursor``, and the cursor behind them.

        Each epoch is another permutation and holds a prompt as often as its weight says: n times for a weight of n;
        where it is no whole number, so often that after any number of epochs it was taken weight x epochs times, but
        for less than one. A take may span epochs.

        Raises:
            PromptError: the task is unknown.
            ValueError: ``cursor`` or ``count`` is negative.
        """
        if task not in self._prompts:
            known = ", ".join(self._prompts) or "none"
            raise PromptError(f"no prompts for task {task!r}; there are: {known}")
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor {cursor} and count {count} must not be negative")
        rows = self._prompts[task]
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, start = self._epoch(task, cursor + len(taken))
            order = self._order(task, epoch)[start : start + count - len(taken)]
            taken.extend(rows[index] for index in order)
        return tuple(taken), cursor + count

    def digests(self) -> dict[str, str]:
        """Task -> sha256 of its prompts in their order, whole: what a continued run must find again."""
        return {
            task: hashlib.sha256(json.dumps([_identity(row) for row in rows], default=str).encode()).hexdigest()
            for task, rows in self._prompts.items()
        }

    def _taken(self, task: str, epochs: int) -> torch.Tensor:
        """How often each prompt was taken in so many epochs. Prompts of one broken weight do not take turns as one."""
        weights = self._weights[task]
        # Multiples of the golden ratio are spread evenly, and 20 bits of them are added to a whole number exactly.
        phase = torch.arange(1, len(weights) + 1, dtype=torch.float64) * 0.6180339887498949 % 1
        return (weights * epochs + (phase * 2**20).floor() / 2**20).floor().long()

    def _epoch(self, task: str, cursor: int) -> tuple[int, int]:
        """The epoch in which a cursor is, and its place there."""
        weights = self._weights[task]
        most = int((cursor + len(weights)) / float(weights.sum())) + 2  # so many epochs hold more than the cursor
        epoch = bisect_right(range(most), cursor, key=lambda epochs: int(self._taken(task, epochs).sum())) - 1
        return epoch, cursor - int(self._taken(task, epoch).sum())

    def _order(self, task: str, epoch: int) -> list[int]:
        rng = generator(self._seed, "order", task, epoch)
        times = self._taken(task, epoch + 1) - self._taken(task, epoch)
        rows = torch.arange(len(times)).repeat_interleave(times)
        order: list[int] = rows[torch.randperm(len(rows), generator=rng)].tolist()
        return order


def _identity(row: Prompt) -> list[Any]:
    """Of a prompt that has no more than its text: the same as before there was more."""
    more = [row.weight, json.dumps(row.metadata, sort_keys=True, default=str)]
    return [row.id, row.text, *(more if row.metadata or row.weight != 1 else [])]


@dataclass(slots=True)
class _Table:
    """Prompts by task and id, as they are read."""

    deduplicate: bool
    prompts: dict[str, dict[str, Prompt]] = field(default_factory=dict)
    repeats: int = 0
    """Rows that were left out."""
    seen: Counter[str] = field(default_factory=Counter)
    """Of each task's text, under the id that it gives: how often it came."""

    def add(self, where: str, row: Mapping[str, Any], file: PromptFile) -> None:
        column, text = _prompt_of(row, where)
        task = _text(row, "task", where) or file.task or file.otherwise
        if task is None:
            raise PromptError(
                f"{where} has no task; add a column task, or give one file for each task as {{task: file}}"
            )
        if file.task is not None and task != file.task:
            raise PromptError(f"{where} is of task {task!r}, but the file is given for {file.task!r}")
        own, weight = _text(row, "id", where), _weight(row, where)
        by_id = self.prompts.get(task, {})
        if own is not None and f"{task}/{own}" in by_id:
            raise PromptError(f"{where} has id {own!r}, but task {task!r} has it already")
        name = hashlib.sha256(f"{task}\x1f{text}".encode()).hexdigest()[:12]
        repeated = name in self.seen
        if own is None or self.deduplicate:
            self.seen[name] += 1
        if self.deduplicate and repeated:
            self.repeats += 1
            return
        if own is not None:
            name = f"{task}/{own}"
        elif self.seen[name] > 1:
            name = f"{name}-{self.seen[name]}"
        others = {
            key: value
            for key, value in row.items()
            if key not in {column, "task", "id", "weight"} and value is not None and not isinstance(value, bytes)
        }
        self.prompts.setdefault(task, by_id)[name] = Prompt(name, text, task, others, weight)


def _told(faults: Sequence[tuple[str, PromptError]]) -> str:
    """The first in full, and where the others are."""
    places = [where for where, _ in faults[1 : 1 + LISTED]]
    more = len(faults) - 1 - len(places)
    also = f"; also {', '.join(places)}" if places else ""
    return f"{faults[0][1]}{also}{f' and {more} more' if more else ''}"


def _prompt_of(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The column that holds the text, and the text."""
    column = next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        raise PromptError(
            f"{where} has no prompt; expected a column {' or '.join(TEXT_COLUMNS)}, "
            f"found {', '.join(map(str, row)) or 'none'}"
        )
    text = _text(row, column, where)
    if text is None:
        raise PromptError(f"{where} has an empty {column}; give it a text or remove the row")
    return column, text


def _weight(row: Mapping[str, Any], where: str) -> float:
    """Of a row; 1 where it says none."""
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = 0.0
    if not 0 < weight <= MAX_WEIGHT:
        raise PromptError(f"{where}: weight is {value!r}, expected a number above 0 and up to {MAX_WEIGHT}")
    return weight


def _text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """A cell as stripped text; None where it is missing or empty."""
    value = row.get(column)
    if column == "id" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise PromptError(f"{where}: {column} is of type {type(value).__name__}, expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can escape half a surrogate pair
            raise PromptError(f"{where}: {column} is not valid Unicode") from None
    return value.strip() or None


def _rows(path: Path) -> Iterator[Row]:
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl}
    kind = path.suffix.lower()
    if kind != ".parquet" and kind not in readers:
        known = ", ".join([*readers, ".parquet"])
        raise PromptError(f"unknown kind of file {kind!r}; expected one of {known}")
    try:
        data = path.read_bytes()
    except OSError as error:
        where = "" if path.is_absolute() else f"; looked in {Path.cwd()}"
        raise PromptError(f"cannot be read ({error.strerror}{where})") from None
    if kind == ".parquet":
        return _parquet(data)
    try:
        text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(f"line {line} is not UTF-8; save the file as UTF-8") from None
    return readers[kind](text)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): it also splits at U+2028 and others, which a prompt may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line


def _txt(text: str) -> Iterator[Row]:
    return ((where, {"prompt": line}) for where, line in _lines(text))


def _jsonl(text: str) -> Iterator[Row]:
    for where, line in _lines(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, PromptError(f"{where} is not JSON ({error})")
            continue
        wrong = PromptError(f"{where} is a JSON {type(row).__name__}, expected an object")
        yield where, row if isinstance(row, dict) else wrong


def _csv(text: str) -> Iterator[Row]:
    lines = io.StringIO(text, newline="").readlines()
    reader = csv.DictReader(lines, strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise PromptError(f"line {reader.reader.line_num} is not CSV ({error})") from None
    while True:
        first = reader.reader.line_num + 1
        while first < len(lines) and not lines[first - 1].strip("\r\n"):
            first += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.reader.line_num
            if str(error) == "unexpected end of data":  # whoever skips malformed rows would lose uncounted ones
                fault = f"line {first} begins a row with a quote that is never closed; close it, since nothing "
                raise PromptError(f"{fault}from there to line {last} can be read") from None
            where, are = (f"line {last}", "is") if first == last else (f"lines {first} to {last}", "are")
            yield where, PromptError(f"{where} {are} not CSV ({error})")
            continue
        where = f"line {reader.line_num}"
        many = PromptError(f"{where} has more cells than the header; put quotes around text with commas")
        yield where, many if None in row else row


def _parquet(data: bytes) -> Iterator[Row]:
    import pyarrow as pa  # half a second, and most runs read text
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        pictures = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
        fields = [one for one in file.schema_arrow if not any(kind(one.type) for kind in pictures)]
        rows: list[dict[str, Any]] = file.read(columns=[one.name for one in fields]).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PromptError(f"is not parquet ({' '.join(str(error).split())})") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row
