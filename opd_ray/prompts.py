"""Prompt files, and the seeded order in which a run goes through them.

A file is .txt (a prompt a line), .csv, .jsonl or .parquet. The text is in the column ``prompt``,
``text`` or ``caption`` (the first of these that is there); ``task`` and ``id`` are optional.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd_ray.errors import PromptError
from opd_ray.seeds import generator
from opd_ray.types import Prompt

__all__ = ["PromptStream", "read_prompts", "read_texts"]

TEXT_COLUMNS = ("prompt", "text", "caption")
COLUMNS = (*TEXT_COLUMNS, "task", "id")
Row = tuple[str, Mapping[str, Any]]
"""Where a row is, for messages, and its columns."""


def read_prompts(spec: str | Mapping[str, str], what: str) -> dict[str, tuple[Prompt, ...]]:
    """Read every prompt, by task, in the order of the files.

    A prompt's id is its task and its row's own id, or else a hash of task and text: ids name noise, which two tasks
    must not share by accident. A repeated text is kept; from its second occurrence on, its number is part of the id.

    Args:
        spec: one file whose rows name their task, or a file for each task.
        what: the configuration key, for messages.

    Raises:
        PromptError: a file is missing, unreadable, empty or of an unknown kind, or a row has no
            text, no task, another task than its file, or an id that its task has already.
    """
    files = {None: spec} if isinstance(spec, str) else dict(spec)
    prompts: dict[str, dict[str, Prompt]] = {}
    seen: Counter[str] = Counter()
    for task, file in files.items():
        path = Path(file)
        try:
            count = 0
            for where, row in _rows(path):
                _add(prompts, seen, where, row, task)
                count += 1
            if not count:
                raise PromptError("has no prompts; expected at least one")
        except PromptError as error:
            raise PromptError(f"{what}: {path}: {error}") from None
    return {task: tuple(by_id.values()) for task, by_id in prompts.items()}


def read_texts(path: Path) -> tuple[str, ...]:
    """The texts of a prompt file, each once, whatever their tasks and ids.

    Raises:
        PromptError: the file is missing, unreadable, empty or of an unknown kind, or a row has no text.
    """
    prompts: dict[str, dict[str, Prompt]] = {}
    try:
        for where, row in _rows(path):
            plain = {name: value for name, value in row.items() if name not in {"task", "id"}}
            _add(prompts, Counter(), where, plain, "any")
        if not prompts:
            raise PromptError("has no prompts; expected at least one")
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None
    return tuple(prompt.text for prompt in prompts["any"].values())


class PromptStream:
    """The order of a run's prompts: a function of seed, task and cursor alone.

    A cursor is the number of prompts of a task that were taken so far, over all epochs. It belongs
    to the caller and its checkpoint; the stream keeps no state.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], seed: int) -> None:
        """Raises PromptError where a task has no prompts."""
        for task, rows in prompts.items():
            if not rows:
                raise PromptError(f"task {task!r} has no prompts; expected at least one")
        self._prompts = {task: tuple(rows) for task, rows in prompts.items()}
        self._seed = seed

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order in which they were given: the order of the learner's gradient."""
        return tuple(self._prompts)

    def take(self, task: str, cursor: int, count: int) -> tuple[tuple[Prompt, ...], int]:
        """The next ``count`` prompts after ``cursor``, and the cursor behind them.

        Each epoch is another permutation and holds every prompt once; a take may span epochs.

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
            epoch, start = divmod(cursor + len(taken), len(rows))
            order = self._order(task, epoch)[start : start + count - len(taken)]
            taken.extend(rows[index] for index in order)
        return tuple(taken), cursor + count

    def digests(self) -> dict[str, str]:
        """Task -> sha256 of its prompts, ids and texts in their order: what a continued run must find again."""
        return {
            task: hashlib.sha256(json.dumps([(row.id, row.text) for row in rows]).encode()).hexdigest()
            for task, rows in self._prompts.items()
        }

    def _order(self, task: str, epoch: int) -> list[int]:
        rng = generator(self._seed, "order", task, epoch)
        order: list[int] = torch.randperm(len(self._prompts[task]), generator=rng).tolist()
        return order


def _add(
    prompts: dict[str, dict[str, Prompt]],
    seen: Counter[str],
    where: str,
    row: Mapping[str, Any],
    expected: str | None,
) -> None:
    """Append one row; ``expected`` is the task of its file, if the file has one."""
    column = next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        raise PromptError(
            f"{where} has no prompt; expected a column {' or '.join(TEXT_COLUMNS)}, "
            f"found {', '.join(map(str, row)) or 'none'}"
        )
    text = _text(row, column, where)
    if text is None:
        raise PromptError(f"{where} has an empty {column}; give it a text or remove the row")
    task = _text(row, "task", where) or expected
    if task is None:
        raise PromptError(f"{where} has no task; add a column task, or give one file for each task as {{task: file}}")
    if expected is not None and task != expected:
        raise PromptError(f"{where} is of task {task!r}, but the file is given for {expected!r}")
    by_id = prompts.setdefault(task, {})
    name = _text(row, "id", where)
    if name is None:
        name = hashlib.sha256(f"{task}\x1f{text}".encode()).hexdigest()[:12]
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}-{seen[name]}"
    else:
        if f"{task}/{name}" in by_id:
            raise PromptError(f"{where} has id {name!r}, but task {task!r} has it already")
        name = f"{task}/{name}"
    by_id[name] = Prompt(name, text, task)


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
            raise PromptError(f"{where} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise PromptError(f"{where} is a JSON {type(row).__name__}, expected an object")
        yield where, row


def _csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                raise PromptError(f"{where} has more cells than the header; put quotes around text with commas")
            yield where, row
    except csv.Error as error:
        raise PromptError(f"line {reader.reader.line_num} is not CSV ({error})") from None


def _parquet(data: bytes) -> Iterator[Row]:
    import pyarrow as pa  # half a second, and most runs read text
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PromptError(f"is not parquet ({' '.join(str(error).split())})") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row
