"""The picture grid as one PNG, for a README: the prompt, then base | teachers | student."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from opd_ray.errors import RunFolderError
from opd_ray.report.run_folder import RunFolder, Sample
from opd_ray.report.wording import model_title

__all__ = ["write_grid", "write_sheet"]

PAPER, INK, SOFT, EMPTY, ACCENT = "#ffffff", "#1b1d22", "#5d636e", "#f0f0ed", "#2456d6"
SMALL = 128
"""Images up to this width are enlarged by whole pixels; larger ones are fitted to ``FITTED``."""
FITTED = 224


def write_grid(run_dir: Path, out: Path, rows_per_task: int = 2, scale: int = 3) -> Path:
    """Draw the first ``rows_per_task`` rows of every task; ``scale`` enlarges small images.

    Raises:
        RunFolderError: the run has no samples to draw.
    """
    run = RunFolder.read(run_dir)
    if run.samples is None:
        raise RunFolderError(
            f"{run_dir}: no samples/index.json with rows in it, so there is nothing to draw. "
            f"Finish the run with an evaluation (prompts.eval and rewards)"
        )
    chosen: dict[str, list[Sample]] = {}
    for row in run.samples.rows:
        if len(rows := chosen.setdefault(row.task, [])) < rows_per_task:
            rows.append(row)
    rows = [row for group in chosen.values() for row in group]
    own = {task: f"teacher:{teacher}" for task, teacher in run.teacher_of_task.items()}
    return write_sheet(run.samples.models, rows, out, own=own, scale=scale)


def write_sheet(
    models: Sequence[str], rows: Sequence[Sample], out: Path, *, own: Mapping[str, str] | None = None, scale: int = 3
) -> Path:
    """Draw these rows, a column a model; ``own`` names the model of a task whose picture gets a frame."""
    sheet = _Sheet(tuple(models), [*rows], _side([*rows], scale))
    for place, row in enumerate(rows):
        sheet.draw_row(place, row, own=(own or {}).get(row.task, ""))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.image.save(out, "PNG", optimize=True)
    return out


def _side(rows: list[Sample], scale: int) -> int:
    for row in rows:
        for path in row.images.values():
            image = _open(path)
            if image is not None:
                return image.width * max(1, scale) if image.width <= SMALL else FITTED
    return SMALL


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


class _Sheet:
    """One canvas; every length follows the side of a picture, so any scale looks the same."""

    def __init__(self, models: tuple[str, ...], rows: list[Sample], side: int) -> None:
        unit = side / 96
        self.models, self.side = models, side
        self.gap, self.margin = round(8 * unit), round(16 * unit)
        self.left = self.margin + round(200 * unit)
        self.top = self.margin + round(34 * unit)
        self.font = ImageFont.load_default(size=max(9, 13 * unit))
        self.small = ImageFont.load_default(size=max(8, 11 * unit))
        self.leading = 1.35 * max(9, 13 * unit)
        self.line = max(1, round(2 * unit))
        self.apart = round(10 * unit)
        """More room between tasks than between rows."""
        self.breaks = [sum(a.task != b.task for a, b in pairwise(rows[: i + 1])) for i in range(len(rows))]
        width = self.left + len(models) * (side + self.gap) - self.gap + self.margin
        height = self._y(len(rows) - 1) + side + self.margin
        self.image = Image.new("RGB", (width, height), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        for column, model in enumerate(models):
            center = self._x(column) + side / 2
            color = ACCENT if model == "student" else SOFT
            lines = self._wrap(model_title(model), self.font, side + self.gap, 2)
            self.pen.multiline_text(
                (center, self.top - round(8 * unit)),
                "\n".join(lines),
                color,
                self.font,
                "md",
                align="center",
            )

    def _x(self, column: int) -> int:
        return self.left + column * (self.side + self.gap)

    def _y(self, place: int) -> int:
        return self.top + place * (self.side + self.gap) + self.breaks[place] * self.apart

    def draw_row(self, place: int, row: Sample, own: str) -> None:
        """Caption and pictures; ``own`` is the model whose picture gets a frame."""
        y = self._y(place)
        self._caption(row, y)
        for column, model in enumerate(self.models):
            x = self._x(column)
            box = (x, y, x + self.side - 1, y + self.side - 1)
            image = _open(row.images[model]) if model in row.images else None
            if image is None:
                self.pen.rectangle(box, EMPTY)
                self.pen.text((x + self.side / 2, y + self.side / 2), "no image", SOFT, self.small, "mm")
                continue
            kind = Image.Resampling.NEAREST if image.width <= SMALL else Image.Resampling.LANCZOS
            height = round(image.height * self.side / image.width)
            fitted = image.resize((self.side, max(1, height)), kind)
            if height > self.side:
                fitted = fitted.crop((0, 0, self.side, self.side))
            self.image.paste(fitted, (x, y + (self.side - fitted.height) // 2))
            if model == own:
                edge = self.line + 1
                frame = (box[0] - edge, box[1] - edge, box[2] + edge, box[3] + edge)
                self.pen.rectangle(frame, outline=ACCENT, width=self.line)

    def _caption(self, row: Sample, y: int) -> None:
        width = self.left - self.margin - 2 * self.gap
        high = self.leading
        room = max(1, int((self.side - 2 * high) / high))
        lines = self._wrap(row.prompt, self.font, width, min(room, 4))
        block = (len(lines) + 1) * high
        top = y + (self.side - block) / 2
        self.pen.text((self.margin, top), self._fit(row.task, self.small, width), SOFT, self.small)
        for number, line in enumerate(lines, start=1):
            self.pen.text((self.margin, top + number * high), line, INK, self.font)

    def _wrap(self, text: str, font: "Font", width: float, most: int) -> list[str]:
        """At most ``most`` lines; the last one ends in an ellipsis where text is left out."""
        lines: list[str] = []
        words = text.split()
        while words and len(lines) < most:
            line = words.pop(0)
            while words and self.pen.textlength(f"{line} {words[0]}", font) <= width:
                line = f"{line} {words.pop(0)}"
            lines.append(self._fit(line, font, width))
        if words:
            lines[-1] = self._fit(f"{lines[-1]} {' '.join(words)}", font, width)
        return lines

    def _fit(self, text: str, font: "Font", width: float) -> str:
        if self.pen.textlength(text, font) <= width:
            return text
        while text and self.pen.textlength(f"{text}…", font) > width:
            text = text[:-1]
        return f"{text.rstrip()}…"


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
