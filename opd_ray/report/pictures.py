"""The page's picture grid: a prompt and seed a row, a model a column, every image embedded.

A row is also its own large view: the address ``#row-3`` shows row 3 over the whole page (page.css), so that
no picture is embedded twice and the view can be linked to.
"""

import base64
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

from opd_ray.report.run_folder import Sample, Samples
from opd_ray.report.wording import model_title

__all__ = ["picture_grid"]

ROWS_PER_TASK = 8
MOST_PICTURES = 400
BUDGET = 6_500_000
"""Bytes for all pictures together before base64: the page stays below 10 MB, and opens on a phone."""
PIXEL_ART = 96
"""Images narrower than this are shown enlarged, with their pixels left square."""
LARGEST, SMALLEST = 512, 96
"""Wider images are embedded at the first width; where there are many, at less, down to the second."""
SAFE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def picture_grid(samples: Samples, teacher_of_task: dict[str, str]) -> str:
    """The grid as HTML, grouped by task; a teacher's picture of its own task is marked."""
    heads = "".join(
        f'<div class="head{" me" if model == "student" else ""}">{escape(model_title(model))}</div>'
        for model in samples.models
    )
    rows = _chosen(samples)
    room = BUDGET // (len(rows) * len(samples.models))
    parts, widths = [], [0]
    for place, row in enumerate(rows, start=1):
        own = f"teacher:{teacher_of_task[row.task]}" if row.task in teacher_of_task else ""
        cells = "".join(_cell(row, model, own, place, room, widths) for model in samples.models)
        parts.append(f'<div class="row" id="row-{place}">{_prompt(row, place)}{cells}{_bar(place, len(rows))}</div>')
    width = max(widths)
    enlarged = width < PIXEL_ART
    side, phone = (_enlarge(width, 128), _enlarge(width, 96)) if enlarged else (min(width, 184), 128)
    left_out = len(samples.rows) - len(rows)
    more = f'<p class="note">{left_out} more rows are in samples/.</p>' if left_out else ""
    models = len(samples.models)
    style = f"--models:{models};--half:{math.ceil(models / 2)};--side:{side}px;--phone:{phone}px"
    kind = " pixels" if enlarged else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Pictures by model">'
        f'<div class="pictures{kind}" style="{style}">'
        f'<div class="head corner"></div>{heads}{"".join(parts)}</div></div>{more}'
    )


def _chosen(samples: Samples) -> list[Sample]:
    """The first rows of every task, equally many as far as there are so many."""
    by_task: dict[str, list[Sample]] = {}
    for row in samples.rows:
        by_task.setdefault(row.task, []).append(row)
    most = max(1, MOST_PICTURES // len(samples.models))
    each = min(ROWS_PER_TASK, max(1, most // len(by_task)))
    return [row for rows in by_task.values() for row in rows[:each]][:most]


def _enlarge(width: int, least: int) -> int:
    """The smallest whole multiple that is at least ``least``: uneven pixels look like a defect."""
    return width * math.ceil(least / max(width, 1)) if width else least


def _prompt(row: Sample, place: int) -> str:
    seed = f'<span class="seed">seed {escape(row.seed)}</span>' if row.seed else ""
    return (
        f'<div class="prompt" id="at-{place}"><span class="task">{escape(row.task)}</span>'
        f'<a href="#row-{place}" title="show large"><q>{escape(row.prompt)}</q></a>{seed}</div>'
    )


def _cell(row: Sample, model: str, own: str, place: int, room: int, widths: list[int]) -> str:
    embedded = _data_uri(row.images[model], room) if model in row.images else None
    shown = '<span class="none">no image</span>'
    if embedded is not None:
        uri, width = embedded
        widths.append(width)
        shown = f'<img src="{uri}" alt="{escape(f"{model_title(model)}: {row.prompt}")}">'
    style = " me" if model == "student" else " own" if model == own else ""
    label = f'<span class="label">{escape(model_title(model))}</span>'
    # The prompt's link leads to the same place: one stop for the keyboard is enough.
    return f'<a class="cell{style}" href="#row-{place}" tabindex="-1">{shown}{label}</a>'


def _bar(place: int, rows: int) -> str:
    """What leads out of the large view, and on to its neighbours."""
    before, after = (place - 2) % rows + 1, place % rows + 1
    return (
        f'<nav class="zoom"><span>{place} of {rows}</span>'
        f'<a class="before" href="#row-{before}" title="previous (left arrow)" aria-label="previous">&larr;</a>'
        f'<a class="after" href="#row-{after}" title="next (right arrow)" aria-label="next">&rarr;</a>'
        f'<a class="close" href="#at-{place}" title="close (escape)" aria-label="close">&times;</a></nav>'
    )


def _data_uri(path: Path, room: int) -> tuple[str, int] | None:
    """An image of at most ``room`` bytes as a data URI, with its width, or None where it cannot be read."""
    try:
        with Image.open(path, formats=list(SAFE_FORMATS)) as image:
            kind, width = SAFE_FORMATS[str(image.format)], image.width
            if width <= LARGEST and path.stat().st_size <= room:
                image.verify()
                data = path.read_bytes()
            else:
                kind, (data, width) = "image/jpeg", _smaller(image.convert("RGB"), room)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # PIL raises SyntaxError for broken PNG chunks
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", width


def _smaller(image: Image.Image, room: int) -> tuple[bytes, int]:
    width = min(image.width, LARGEST)
    while True:
        size = (width, max(1, round(image.height * width / image.width)))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
        if buffer.tell() <= room or width <= SMALLEST:
            return buffer.getvalue(), width
        width = max(SMALLEST, width * 3 // 4)
