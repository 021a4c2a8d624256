"""Small data sets of pairs whose pictures say which row they are: winners are red, losers blue, both by the row."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 16


def jpeg(row: int, *, winner: bool, size: tuple[int, int] = (24, 20)) -> bytes:
    """One even colour, so that compression changes nothing that matters."""
    color = (200 if winner else 20, 4 * row % 256, 20 if winner else 200)
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG", quality=95)
    return file.getvalue()


def noisy() -> bytes:
    """A JPEG of some thousand bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def table(count: int, *, ties=(), empty=(), broken=None, first: int = 0) -> pa.Table:
    """Rows whose winner is image 0 where the row is even. ``broken``: row -> bytes in place of its jpg_0."""
    columns = {name: [] for name in ("jpg_0", "jpg_1", "label_0", "label_1", "caption")}
    for place in range(count):
        row = first + place
        left = row % 2 == 0
        images = [jpeg(row, winner=left), jpeg(row, winner=not left)]
        if row in (broken or {}):
            images[0] = broken[row]
        labels = (0.5, 0.5) if row in ties else (float(left), float(not left))
        values = (*images, *labels, " " if row in empty else f"caption {row}")
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return pa.table(columns)


def parquet(path: Path, count: int, *, group: int = 5, **kinds) -> Path:
    pq.write_table(table(count, **kinds), path, row_group_size=group)
    return path


def jsonl(folder: Path, count: int, *, empty=(), missing=()) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for row in range(count):
        names = {"winner": f"{row}w.jpg", "loser": f"{row}l.jpg"}
        for key, name in names.items():
            if row not in missing:
                (folder / name).write_bytes(jpeg(row, winner=key == "winner"))
        lines.append(json.dumps({"prompt": "" if row in empty else f"caption {row}"} | names))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def row_of(caption: str) -> int:
    return int(caption.removeprefix("caption "))


def is_winner(data: bytes) -> bool:
    red, _, blue = np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3).mean((0, 1))
    return red > blue
