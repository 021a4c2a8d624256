"""Pairs with labels by a reward in place of people, in Pick-a-Pic v2's columns (AI feedback of arXiv 2311.12908).

A file grows in parts beside it, so that whoever is stopped goes on after the last whole part.
"""

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_ray.errors import PromptError, RunFolderError
from opd_ray.pairs.index import COLUMNS, opened
from opd_ray.pairs.pictures import BadPicture, decoded
from opd_ray.seeds import fold

__all__ = ["Parts", "drawn_pairs", "relabelled", "row_groups"]

Score = Callable[[Tensor, list[str]], Tensor]
"""A checked reward (``opd_ray.rewards.Scorer``): pictures [B, 3, H, W] in [0, 1] and their prompts to scores [B]; NaN
where it does not apply."""
KEY = b"opd_ray"
"""Of the file's metadata: where its pairs come from, as JSON."""


class Parts:
    """The parts of a Parquet file that is being made."""

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        """Begin, or go on with what was begun in the same way.

        Args:
            out: the file; its parts are in a folder beside it until it is whole.
            about: where its pairs come from; plain JSON data, which goes into the file's metadata.

        Raises:
            RunFolderError: the file is there already, or its parts were begun in another way.
        """
        self.out, self.about = out, dict(about)
        self._folder = out.with_name(f"{out.name}.parts")
        if out.exists():
            raise RunFolderError(f"--out: {out} is there already; choose another name or remove it")
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "about.json"
        if known.exists() and (before := json.loads(known.read_text())) != self.about:
            other = sorted(key for key in before.keys() | self.about.keys() if before.get(key) != self.about.get(key))
            raise RunFolderError(
                f"{self._folder} was begun with another {', '.join(other)}; go on as it was, or remove the folder"
            )
        known.write_text(json.dumps(self.about))

    @property
    def done(self) -> int:
        """Parts that are whole."""
        return len(list(self._folder.glob("*.parquet")))

    def write(self, rows: Any, counts: Mapping[str, int]) -> None:
        """Add a part: a table, and what was counted while it was made."""
        import pyarrow.parquet as pq

        hidden = self._folder / ".part"
        pq.write_table(rows.replace_schema_metadata({KEY: json.dumps(counts)}), hidden)
        hidden.rename(self._folder / f"{self.done:06d}.parquet")

    def finish(self) -> dict[str, int]:
        """Make the file of all parts, a row group each; returns what was counted.

        Raises:
            PromptError: no pair came of it.
        """
        import pyarrow.parquet as pq

        parts = sorted(self._folder.glob("*.parquet"))
        total = Counter[str]()
        for part in parts:
            total.update(json.loads(pq.read_schema(part).metadata[KEY]))
        counts = dict(total)
        if not counts.get("pairs"):
            told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            raise PromptError(f"no pair came of it ({told}); the reward tells none of these pictures apart")
        schema = pq.read_schema(parts[0]).with_metadata({KEY: json.dumps(self.about | counts)})
        hidden = self._folder / ".whole"
        with pq.ParquetWriter(hidden, schema) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part).replace_schema_metadata(schema.metadata))
        hidden.rename(self.out)
        shutil.rmtree(self._folder)
        return counts


def drawn_pairs(
    images: Tensor, captions: Sequence[str], scores: Tensor, seeds: Sequence[int]
) -> tuple[Any, dict[str, int]]:
    """The best against the worst picture of each caption, as a table; and how many pairs and ties there were.

    Args:
        images: [P, n, 3, H, W] in [0, 1].
        captions: P of them.
        scores: [P, n]; NaN where the reward does not apply.
        seeds: one a caption; decides whether the better one is image 0 or image 1.
    """
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "score_0", "score_1")}
    counts = Counter(pairs=0, ties=0, unscored=0)
    for pictures, caption, values, seed in zip(images, captions, scores.tolist(), seeds, strict=True):
        if any(math.isnan(value) for value in values):
            counts["unscored"] += 1
            continue
        best, worst = (values.index(end(values)) for end in (max, min))
        if values[best] == values[worst]:
            counts["ties"] += 1
            continue
        counts["pairs"] += 1
        order = (worst, best) if fold(seed, "pairs", "side") & 1 else (best, worst)
        labels = [float(place == best) for place in order]
        row = (*(_jpeg(pictures[place]) for place in order), *labels, caption, *(values[place] for place in order))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    kinds = [pa.binary(), pa.binary(), pa.float64(), pa.float64(), pa.string(), pa.float64(), pa.float64()]
    return pa.table(columns, schema=pa.schema(list(zip(columns, kinds, strict=True)))), dict(counts)


def row_groups(path: Path, first: int) -> Iterator[Any]:
    """Tables of a Parquet file of pairs, from a row group on.

    Raises:
        PromptError: it is none, or lacks a picture or the caption.
    """
    file = opened(path, ("jpg_0", "jpg_1", "caption"))
    for group in range(first, file.num_row_groups):
        yield file.read_row_group(group)


def relabelled(rows: Any, score: Score) -> tuple[Any, dict[str, int]]:
    """The same rows with a reward's labels; 0.5 twice where it sees a tie or does not apply, or a picture is broken."""
    import pyarrow as pa

    found: dict[str, list[float]] = {name: [] for name in ("label_0", "label_1", "score_0", "score_1")}
    counts = Counter(pairs=0, ties=0, unscored=0, broken=0)
    for row in rows.select(["jpg_0", "jpg_1", "caption"]).to_pylist():
        try:
            pictures = [_tensor(decoded(row[name])) for name in ("jpg_0", "jpg_1")]
        except BadPicture:
            values, kind = [math.nan, math.nan], "broken"
        else:
            values = [float(score(picture[None], [row["caption"] or ""])[0]) for picture in pictures]
            unscored = any(math.isnan(value) for value in values)
            kind = "unscored" if unscored else "ties" if values[0] == values[1] else "pairs"
        counts[kind] += 1
        labels = [float(values[0] > values[1]), float(values[1] > values[0])] if kind == "pairs" else [0.5, 0.5]
        for column, value in zip(found.values(), (*labels, *values), strict=True):
            column.append(value)
    kept = rows.drop_columns([name for name in found if name in rows.column_names])
    for name, values in found.items():
        kept = kept.append_column(name, pa.array(values, pa.float64()))
    return kept, dict(counts)


def _tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _jpeg(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
