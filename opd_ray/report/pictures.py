"""The page's picture grid: a prompt and seed a row, a model a column, every image embedded."""

import base64
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

from opd_ray.report.run_folder import Sample, Samples
from opd_ray.report.wording import model_title

__all__ = ["data_uri", "picture_grid"]

ROWS_PER_TASK = 8
PIXEL_ART = 96
"""Images narrower than this are shown enlarged, with their pixels left square."""
LARGEST = 384
"""Wider images are embedded at this width: a page of full-size ones would not open on a phone."""
SAFE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def data_uri(path: Path) -> tuple[str, int] | None:
    """An image as a data URI with the width it is embedded at, or None where it cannot be read."""
    try:
        with Image.open(path, formats=list(SAFE_FORMATS)) as image:
            kind, width = SAFE_FORMATS[str(image.format)], image.width
            if width <= LARGEST:
                image.verify()
                data = path.read_bytes()
            else:
                kind, buffer = "image/jpeg", io.BytesIO()
                size = (LARGEST, max(1, round(image.height * LARGEST / width)))
                small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                small.save(buffer, "JPEG", quality=90)
                data = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # PIL raises SyntaxError for broken PNG chunks
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", min(width, LARGEST)


def picture_grid(samples: Samples, teacher_of_task: dict[str, str]) -> str:
    """The grid as HTML, grouped by task; a teacher's picture of its own task is marked."""
    heads = "".join(
        f'<div class="head{" me" if model == "student" else ""}">{escape(model_title(model))}</div>'
        for model in samples.models
    )
    parts, widths, left_out = [], [0], 0
    by_task: dict[str, list[Sample]] = {}
    for row in samples.rows:
        by_task.setdefault(row.task, []).append(row)
    for task, rows in by_task.items():
        left_out += max(0, len(rows) - ROWS_PER_TASK)
        own = f"teacher:{teacher_of_task[task]}" if task in teacher_of_task else ""
        for row in rows[:ROWS_PER_TASK]:
            parts.append(_row(row, samples.models, own, widths))
    width = max(widths)
    enlarged = width < PIXEL_ART
    side, phone = (_enlarge(width, 128), _enlarge(width, 96)) if enlarged else (min(width, 184), 128)
    more = f'<p class="note">{left_out} more rows are in samples/.</p>' if left_out else ""
    style = f"--models:{len(samples.models)};--side:{side}px;--phone:{phone}px"
    kind = " pixels" if enlarged else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Pictures by model">'
        f'<div class="pictures{kind}" style="{style}">'
        f'<div class="head corner"></div>{heads}{"".join(parts)}</div></div>{more}'
    )


def _enlarge(width: int, least: int) -> int:
    """The smallest whole multiple that is at least ``least``: uneven pixels look like a defect."""
    return width * math.ceil(least / max(width, 1)) if width else least


def _row(row: Sample, models: tuple[str, ...], own: str, widths: list[int]) -> str:
    seed = f'<span class="seed">seed {escape(row.seed)}</span>' if row.seed else ""
    cells = [f'<div class="prompt"><span class="task">{escape(row.task)}</span><q>{escape(row.prompt)}</q>{seed}</div>']
    for model in models:
        embedded = data_uri(row.images[model]) if model in row.images else None
        style = "me" if model == "student" else "own" if model == own else ""
        shown = '<span class="none">no image</span>'
        if embedded is not None:
            uri, width = embedded
            widths.append(width)
            alt = escape(f"{model_title(model)}: {row.prompt}")
            shown = f'<img src="{uri}" alt="{alt}" decoding="async">'
        label = f'<span class="label">{escape(model_title(model))}</span>'
        cells.append(f'<div class="cell {style}">{shown}{label}</div>')
    return "".join(cells)
