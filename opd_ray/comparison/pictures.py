"""A comparison to look at: the same prompts drawn by every model, and curves."""

import re
from collections.abc import Mapping
from pathlib import Path

from opd_ray.comparison.nodes import key_of
from opd_ray.comparison.protocol import prompts_of
from opd_ray.comparison.results import Results, Row
from opd_ray.report.charts import HEIGHT, WIDTH, Series, line_chart
from opd_ray.report.grid import write_sheet
from opd_ray.report.run_folder import Sample
from opd_ray.storage.run_folder import write_atomic

__all__ = ["write_pictures"]

ROWS = 2
"""Prompts of each task on a sheet."""
MOST_COLUMNS = 7
"""Beside the base, on one sheet."""
COLOURS = ("#2456d6", "#d9480f", "#0c8a5b", "#9333ea", "#a97900", "#0b8fae", "#d6246e", "#69707d")
STYLE = (
    "text { font: 12px sans-serif; fill: #5d636e } .grid line { stroke: #e3e3df } "
    "polyline { fill: none; stroke-width: 2 } circle { stroke: #fff }"
    + "".join(
        f" .c{n} polyline {{ stroke: {colour} }} .c{n} circle, .c{n} text {{ fill: {colour} }}"
        for n, colour in enumerate(COLOURS)
    )
)


def write_pictures(results: Results, out: Path) -> dict[Path, str]:
    """A sheet for each group, with the base first and the first seed's pictures; and curves of every score.

    Returns:
        File -> what it shows.
    """
    titles = dict[Path, str]()
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(row.group, []).append(row)
    first = [row.name for row in results.rows if results.protocol.arms[row.name].do == "base"]
    for group, rows in groups.items():
        columns = [row.name for row in rows if row.name not in first]
        for start in range(0, len(columns), MOST_COLUMNS):
            shown = [*first, *columns[start : start + MOST_COLUMNS]]
            if samples := _samples(results, shown, out):
                file = out / f"sheet-{len(titles) + 1}.png"
                write_sheet(shown, samples, file)
                titles[file] = f"{group}: {', '.join(shown)}"
    if curved := [row for row in results.rows if row.curves]:
        points = {row.name: row.on_the_way() for row in curved}
        for score in [*results.protocol.judged.prompts, "fidelity"]:
            file = _chart(points, "images in all", score, out / f"curve-{score}.svg")
            titles[file] = f"{score} as images are drawn, also those that made what an arm needs"
        if any("reward" in point for own in points.values() for point in own):
            file = _chart(points, "reward", "fidelity", out / "proxy-and-gauge.svg")
            titles[file] = "fidelity against the reward that is learned from, on the way"
    return titles


def _samples(results: Results, columns: list[str], out: Path) -> list[Sample]:
    protocol = results.protocol
    samples = list[Sample]()
    for task, path in protocol.judged.prompts.items():
        for number, prompt in enumerate(prompts_of(path, task)[:ROWS]):
            images = {}
            for column in columns:
                arm = protocol.arms[column].by_task.get(task, column)
                images[column] = out / "pictures" / key_of(protocol, arm, protocol.seeds[0]) / f"{task}-{number}.png"
            found = {name: file for name, file in images.items() if file.is_file()}
            if found:
                samples.append(Sample(task, prompt.text, str(protocol.judged.seed), found))
    return samples


def _chart(points: Mapping[str, list[dict[str, float]]], along: str, score: str, file: Path) -> Path:
    """Means over seeds of every arm on its way, as a picture that needs no page around it."""
    shown = {name: [point for point in own if {along, score} <= point.keys()] for name, own in points.items()}
    lines = [
        Series(name, number, tuple((round(point[along], 3), point[score]) for point in own))
        for number, (name, own) in enumerate(shown.items())
        if own
    ]
    label = f"{score} over {along}"
    chart = line_chart(lines, label=label, dots=True, smooth=False, unit=along)
    keys = "".join(
        f'<g class="c{line.color % len(COLOURS)}"><text x="{60 + 140 * (number % 3)}" '
        f'y="{HEIGHT + 18 + 16 * (number // 3)}">{line.name}</text></g>'
        for number, line in enumerate(lines)
    )
    height = HEIGHT + 30 + 16 * (len(lines) // 3)
    body = re.sub(r"^<svg[^>]*>", "", chart).removesuffix("</svg>")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
        f"<style>{STYLE}</style><title>{label}</title>{body}{keys}</svg>"
    )
    write_atomic(file, text.encode())
    return file
