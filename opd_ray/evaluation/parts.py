"""What an evaluation is cut into, and the table that it leaves: one row a picture, written part by part.

A part is drawn, scored and written together. Whoever goes on with an evaluation that was stopped does the parts that
are not there, and those in which something failed.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.errors import RunFolderError
from opd_ray.storage.run_folder import differences, read_json, write_atomic, write_json_atomic
from opd_ray.types import Prompt, Scored

__all__ = ["ABOUT", "TABLE", "Part", "Results", "describe", "score_of"]

ABOUT = "evaluation.json"
TABLE = "images.parquet"
SCORE, ERROR = "score_", "error_"
"""Columns of a reward begin so."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures that are made, scored and written together."""

    name: str
    """Of its file; the same in every evaluation of the same pictures."""
    model: str
    prompts: tuple[Prompt, ...]
    """One a picture."""
    rows: tuple[Mapping[str, Any], ...]
    """What is known of each picture before it is made: the other columns of its row."""
    method: str
    """Of the workers that make pictures."""
    args: tuple[Any, ...]

    def table(self, found: Scored) -> list[dict[str, Any]]:
        """The rows with their scores; null where a reward does not apply or failed, and then its error stands beside.

        A number that is not finite is no score.
        """
        rows = []
        for place, (prompt, known) in enumerate(zip(self.prompts, self.rows, strict=True)):
            row: dict[str, Any] = {"part": self.name, "model": self.model, **describe(prompt), **known}
            for reward, scores in found.scores.items():
                error = found.errors.get(reward, {}).get(place)
                score = scores[place]
                row[SCORE + reward] = score if error is None and math.isfinite(score) else None
                row[ERROR + reward] = error
            rows.append(row)
        return rows


def describe(prompt: Prompt) -> dict[str, Any]:
    """A prompt's columns."""
    tag = prompt.metadata.get("tag")
    return {
        "task": prompt.task,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "tag": tag if isinstance(tag, str) else None,
        "metadata": json.dumps(dict(prompt.metadata), default=str),
    }


def score_of(row: Mapping[str, Any], reward: str) -> float:
    """NaN where there is none."""
    score = row[SCORE + reward]
    return math.nan if score is None else float(score)


class Results:
    """The folder of an evaluation: what was asked (evaluation.json), the parts, and the table of all pictures."""

    def __init__(self, folder: Path, rewards: Sequence[str], asked: Mapping[str, Any]) -> None:
        """Begin an evaluation, or go on with the one that is there.

        Args:
            folder: new, empty, or that of the same evaluation.
            rewards: what scores.
            asked: plain JSON data in which it must not differ.

        Raises:
            RunFolderError: there is another evaluation, or something else.
        """
        self.folder, self.rewards = folder, tuple(rewards)
        self._parts = folder / "parts"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        asked = json.loads(json.dumps(asked))
        if (folder / ABOUT).is_file():
            if other := differences(read_json(folder / ABOUT), asked):
                raise RunFolderError(
                    f"{folder} holds another evaluation: {'; '.join(other)}. Choose another --out, or ask as it was"
                )
        elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty and holds no evaluation; choose another --out")
        else:
            write_json_atomic(folder / ABOUT, asked)
        for row in self._read(folder / TABLE) if (folder / TABLE).is_file() else ():
            self.rows.setdefault(row["part"], []).append(row)
        for file in sorted(self._parts.glob("*.parquet")):  # newer than the table, or the same where both are there
            self.rows[file.stem] = self._read(file)
        self._parts.mkdir(exist_ok=True)
        again = [name for name, rows in self.rows.items() if any(self.errors(row) for row in rows)]
        for name in again:  # what failed is tried again
            del self.rows[name]

    def errors(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Reward -> why it failed on a picture."""
        return {name: row[ERROR + name] for name in self.rewards if row[ERROR + name] is not None}

    def left(self, parts: Iterable[Part]) -> list[Part]:
        """Those that have to be done: there is nothing of their name, or it is of other pictures."""

        def done(part: Part) -> bool:
            rows = [(row["prompt_id"], row["sample"], row["file"]) for row in self.rows.get(part.name, ())]
            pictures = zip(part.prompts, part.rows, strict=True)
            return rows == [(prompt.id, known["sample"], known["file"]) for prompt, known in pictures]

        return [part for part in parts if not done(part)]

    def write(self, part: Part, found: Scored) -> None:
        """A part is done."""
        self.rows[part.name] = part.table(found)
        self._write(self._parts / f"{part.name}.parquet", self.rows[part.name])

    def finish(self, parts: Iterable[Part]) -> list[dict[str, Any]]:
        """All rows in the order of their parts, which become one table."""
        rows = [row for part in parts for row in self.rows[part.name]]
        self._write(self.folder / TABLE, rows)
        shutil.rmtree(self._parts)
        return rows

    def _write(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa  # half a second, and most commands write no table
        import pyarrow.parquet as pq

        kinds: dict[str, Any] = {name: pa.string() for name in ("part", "model", "task", "prompt_id", "prompt", "tag")}
        kinds |= {"metadata": pa.string(), "sample": pa.int64(), "seed": pa.int64(), "steps": pa.int64()}
        kinds |= {"guidance": pa.float64(), "file": pa.string()}
        for name in self.rewards:
            kinds |= {SCORE + name: pa.float64(), ERROR + name: pa.string()}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(list(kinds.items()))), sink)
        write_atomic(path, sink.getvalue().to_pybytes())

    def _read(self, path: Path) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise RunFolderError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove it") from None
        return rows
