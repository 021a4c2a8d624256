"""Line, stacked and band charts as inline SVG: no library, no script, colours from the page's style sheet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from opd_ray.report.wording import number

__all__ = ["Series", "Slice", "band_chart", "line_chart", "stack_chart"]

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30
LOG_RATIO = 20
"""Positive values that span more than this are drawn on a logarithmic axis."""
MOST_POINTS = 400
MOST_BARS = 80


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one dashed level."""

    name: str
    color: int
    points: tuple[tuple[float, float], ...]
    level: float | None = None
    """A dashed horizontal line in the same colour: what this series is compared with."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a band."""

    left: float
    """Of the band's width, as is ``right``."""
    right: float
    shares: Mapping[str, float]
    """Style -> share of the height, from below; empty where nothing is known."""
    level: float
    """Of the height: where the line over the band is."""
    tip: str


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    """Where ``low`` is drawn, in SVG units; ``end`` may be smaller: SVG's y points down."""
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1,) if self.high / self.low > 1000 else (1, 3)
            values = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        else:
            step = _nice_step((self.high - self.low) / 4)
            first = math.ceil(self.low / step - 1e-9)
            values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in values if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]


def _nice_step(least: float) -> float:
    scale = 10.0 ** math.floor(math.log10(least))
    return next(f * scale for f in (1, 2, 2.5, 5, 10) if f * scale >= least * (1 - 1e-9))


def _y_axis(values: Sequence[float], unit: bool) -> _Axis:
    low, high = min(values), max(values)
    if unit:
        return _Axis(0, 1, HEIGHT - BOTTOM, TOP)
    if low > 0 and high / low > LOG_RATIO:
        return _Axis(low / 1.15, high * 1.15, HEIGHT - BOTTOM, TOP, log=True)
    low = min(low, 0.0)
    high = high if high > low else low + 1
    return _Axis(low, high + 0.06 * (high - low), HEIGHT - BOTTOM, TOP)


def _thin(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means of ``window`` neighbours: their number shrinks by that factor."""
    blocks = [points[i : i + window] for i in range(0, len(points), window)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks]


def _smooth(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """A running mean over ``reach`` neighbours on each side, fewer at the ends."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        side = min(reach, i, len(points) - 1 - i)
        near = points[i - side : i + side + 1]
        smoothed.append((x, sum(y for _, y in near) / len(near)))
    return smoothed


def _path(points: Sequence[tuple[float, float]], x: _Axis, y: _Axis, style: str) -> str:
    where = " ".join(f"{x.place(px):.1f},{y.place(py):.1f}" for px, py in points)
    return f'<polyline class="{style}" points="{where}"/>'


def _lines(series: Series, x: _Axis, y: _Axis, dots: bool, smooth: bool, unit: str) -> str:
    points = _thin(series.points, math.ceil(len(series.points) / MOST_POINTS))
    reach = len(points) // 40 if smooth and not dots else 0
    parts = [_path(points, x, y, "raw")] if reach else []
    parts.append(_path(_smooth(points, reach), x, y, "line"))
    if dots or len(points) == 1:
        for px, py in points:
            tip = escape(f"{series.name}, {unit} {px:g}: {number(py)}")
            spot = f'cx="{x.place(px):.1f}" cy="{y.place(py):.1f}" r="3.5"'
            parts.append(f"<circle {spot}><title>{tip}</title></circle>")
    if series.level is not None:
        ends = [(x.low, series.level), (x.high, series.level)]
        parts.append(_path(ends, x, y, "level"))
    tip = f"<title>{escape(series.name)}</title>"
    return f'<g class="c{series.color % 8}">{tip}{"".join(parts)}</g>'


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    dots: bool = False,
    smooth: bool = True,
    unit: str = "round",
    bounds: tuple[float, float] | None = None,
) -> str:
    """Values over rounds, empty where there are none.

    Args:
        series: the lines.
        label: what a screen reader says.
        dots: for few values, as of scores.
        smooth: draw a running mean, and the values themselves faintly.
        unit: what the horizontal axis counts.
        bounds: the lowest and highest value, where several charts share an axis.
    """
    series = [line for line in series if line.points]
    if not series:
        return ""
    places = [px for line in series for px, _ in line.points]
    values = [py for line in series for _, py in line.points]
    values += [line.level for line in series if line.level is not None]
    share = bounds is None and dots and min(values) >= 0 and max(values) <= 1
    first, last = min(places), max(places)
    x = _Axis(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    y = _y_axis(bounds or values, share)
    lines = "".join(_lines(line, x, y, dots, smooth, unit) for line in series)
    return _svg(label, _frame(x, y, first, last) + lines)


def stack_chart(layers: Sequence[Series], *, label: str) -> str:
    """Amounts a round, one on the other; where there are many rounds, a bar is the mean of several."""
    layers = [layer for layer in layers if layer.points]
    rounds = sorted({px for layer in layers for px, _ in layer.points})
    if not rounds:
        return ""
    window = math.ceil(len(rounds) / MOST_BARS)
    bars = [rounds[i : i + window] for i in range(0, len(rounds), window)]
    amounts = [dict(layer.points) for layer in layers]
    means = [[sum(a.get(px, 0.0) for px in bar) / len(bar) for a in amounts] for bar in bars]
    x = _Axis(rounds[0] - 0.5, rounds[-1] + 0.5, LEFT, WIDTH - RIGHT)
    y = _y_axis([0.0, *(sum(mean) for mean in means)], False)
    paths, tips = [""] * len(layers), []
    for bar, mean in zip(bars, means, strict=True):
        left, right, floor = x.place(bar[0] - 0.5), x.place(bar[-1] + 0.5), 0.0
        for place, amount in enumerate(mean):
            low, high = y.place(floor), y.place(floor + amount)
            paths[place] += f"M{left:.1f} {low:.1f}V{high:.1f}H{right:.1f}V{low:.1f}z"
            floor += amount
        parts = ", ".join(f"{layer.name} {number(amount)}" for layer, amount in zip(layers, mean, strict=True))
        when = f"round {bar[0]:g}" if len(bar) == 1 else f"rounds {bar[0]:g} to {bar[-1]:g}"
        where = f'x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}"'
        tips.append(f"<rect {where}><title>{escape(f'{when}: {parts}')}</title></rect>")
    drawn = "".join(f'<path class="c{s.color % 8}" d="{path}"/>' for s, path in zip(layers, paths, strict=True))
    frame = _frame(x, y, rounds[0], rounds[-1])
    return _svg(label, f'{frame}<g class="stack">{drawn}</g><g class="tips">{"".join(tips)}</g>')


def band_chart(slices: Sequence[Slice], styles: Sequence[str], *, label: str, line: bool) -> str:
    """Shares over time, as high and as wide as the page makes it: numbers and names stand beside it.

    Args:
        slices: from left to right.
        styles: the classes of the page's style sheet that are drawn; of others the background is seen.
        label: what a screen reader says.
        line: draw the levels, as a line of steps.
    """
    paths, tips, steps = dict.fromkeys([*styles, "unknown"], ""), [], []
    for part in slices:
        left, right, floor = 1000 * part.left, 1000 * part.right, 100.0
        for style, share in (part.shares or {"unknown": 1.0}).items():
            roof = floor - 100 * share
            if style in paths and share > 0:
                paths[style] += f"M{left:.1f} {floor:.1f}V{roof:.1f}H{right:.1f}V{floor:.1f}z"
            floor = roof
        steps += [f"{x:.1f},{100 - 100 * part.level:.1f}" for x in (left, right)]
        where = f'x="{left:.1f}" width="{right - left:.1f}" y="0" height="100"'
        tips.append(f"<rect {where}><title>{escape(part.tip)}</title></rect>")
    drawn = "".join(f'<path class="{style}" d="{path}"/>' for style, path in paths.items() if path)
    drawn += "".join(f'<polyline class="{kind}" points="{" ".join(steps)}"/>' for kind in ("halo", "step") if line)
    box = 'viewBox="0 0 1000 100" preserveAspectRatio="none"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{drawn}<g class="tips">{"".join(tips)}</g></svg>'


def _frame(x: _Axis, y: _Axis, first: float, last: float) -> str:
    """Grid lines and the numbers along both axes."""
    grid = []
    for tick in y.ticks():
        at = y.place(tick)
        grid.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        grid.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in sorted({first, *(t for t in x.ticks() if t == int(t)), last}):
        if tick not in {first, last} and min(tick - first, last - tick) < 0.08 * (last - first):
            continue
        anchor = "end" if tick == last > first else "middle"
        where = f'x="{x.place(tick):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}"'
        grid.append(f"<text {where}>{tick:g}</text>")
    return f'<g class="grid">{"".join(grid)}</g>'


def _svg(label: str, body: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(label)}">{body}</svg>'
