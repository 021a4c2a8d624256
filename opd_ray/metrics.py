"""metrics.jsonl, the one truth about a run's numbers: one JSON object a line, appended."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_ray.errors import RunFolderError
from opd_ray.storage.run_folder import write_atomic

__all__ = ["MetricsLog", "rows"]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete row, in the order of writing; none where there is no file.

    A last line without its end is ignored: it is being written, or a crash cut it off.

    Raises:
        RunFolderError: another line is not a JSON object.
    """
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunFolderError(f"{path}: line {number} is not a JSON object; remove the line")
        yield row


class MetricsLog:
    """The only writer of a metrics file. Holds no open file."""

    def __init__(self, path: Path) -> None:
        """Removes a torn last line, which the next row would otherwise run into."""
        self._path = path
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)

    def append(self, row: Mapping[str, Any], *, null: bool = False) -> None:
        """Write one row through to the file.

        Args:
            row: JSON data; give it a ``round`` so that ``truncate_from`` can find it.
            null: write NaN and infinity as null, where they are expected.

        Raises:
            ValueError: a number is not finite, and ``null`` is false.
        """
        plain = {key: _finite(value, key, null) for key, value in row.items()}
        with self._path.open("ab") as file:
            file.write(json.dumps(plain).encode() + b"\n")

    def truncate_from(self, round: int) -> None:
        """Drop what a resumed run will write again: rows whose ``round`` is this one or later."""
        kept = [row for row in rows(self._path) if "round" not in row or row["round"] < round]
        write_atomic(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))


def _finite(value: Any, where: str, null: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{where}.{key}", null) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{where}[{index}]", null) for index, part in enumerate(value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if not null:
        raise ValueError(f"metric {where} is {value}, expected a finite number")
    return None
