"""The page's training part: curves over rounds, every step's gap, where the time went."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from opd_ray.report.charts import Series, line_chart
from opd_ray.report.run_folder import Round, RunFolder
from opd_ray.report.table import Results
from opd_ray.report.wording import MISSING, count, duration, number, percent

__all__ = ["curves", "gap_heat", "time_spent"]

HEAT_NOTE = (
    "Mean squared velocity gap at each trained denoising step, from noise (left) to image (right). "
    "Darker is larger, on one logarithmic scale for all tasks."
)
HEAT_ROWS = 8
WIDE = 12
"""With more steps than this, cells are too narrow for their numbers; the colour stays."""
DEEP = 0.75
"""Darker cells than this need light numbers."""
WAITS = {
    "wait": "waiting for experience",
    "update": "updating",
    "publish": "publishing weights",
    "checkpoint": "writing checkpoints",
}


def curves(run: RunFolder) -> str:
    """Loss, gradient norm, evaluation and reward scores, each where the run has them."""
    colors = {task: color for color, task in enumerate(run.tasks)}
    results = Results.read(run.result)
    levels = {
        task: score.value
        for task, model in results.own.items()
        if (score := results.scores.get((model, task))) is not None
    }
    losses = _series(run.rounds, lambda row: row.task_loss, colors)
    norms = _series(run.rounds, lambda row: _only(row.values, "grad_norm"), {})
    tests = _series(run.rounds, lambda row: row.evaluation, colors, levels)
    scores = _series(run.rounds, lambda row: row.scores, {})
    times = _series(run.rounds, lambda row: _only(row.seconds, "round"), {})
    dashes = "dashed: its teacher" if levels else "its teacher's are not known yet"
    charts = [
        _figure("Loss by task", losses, "first → last round", changes=True),
        _figure("Student's scores during training", tests, dashes, dots=True),
        _figure("Reward scores of what the student drew", scores, "mean of each round"),
        _figure("Gradient norm", norms, "of each update", legend=False),
        _figure("Seconds a round", times, "wall time", legend=False, smooth=False),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _only(values: Mapping[str, float], name: str) -> dict[str, float]:
    return {name: values[name]} if name in values else {}


def _series(
    rounds: Sequence[Round],
    read: Callable[[Round], Mapping[str, float]],
    colors: Mapping[str, int],
    levels: Mapping[str, float | None] | None = None,
) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rounds:
        for name, value in read(row).items():
            points.setdefault(name, []).append((row.index + 1, value))
    names = sorted(points, key=lambda name: (colors.get(name, len(colors)), name))
    return [
        Series(name, colors.get(name, place), tuple(points[name]), (levels or {}).get(name))
        for place, name in enumerate(names)
    ]


def _figure(
    title: str,
    series: Sequence[Series],
    note: str,
    *,
    dots: bool = False,
    changes: bool = False,
    legend: bool = True,
    smooth: bool = True,
) -> str:
    chart = line_chart(series, label=f"{title}, over rounds", dots=dots, smooth=smooth)
    if not chart:
        return ""
    keys = []
    for line in series if legend else ():
        first, last = line.points[0][1], line.points[-1][1]
        value = f"{number(first)} → {number(last)}" if changes else number(last)
        keys.append(f'<li class="c{line.color % 8}"><i></i>{escape(line.name)} <b>{value}</b></li>')
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
        f'{chart}<ul class="legend">{"".join(keys)}</ul></figure>'
    )


def gap_heat(run: RunFolder) -> str:
    """Mean squared velocity gap by task, step and part of the run; one log scale."""
    tasks = list(dict.fromkeys(task for row in run.rounds for task in row.gap))
    grids = {task: _blocks([row for row in run.rounds if row.gap.get(task)], task) for task in tasks}
    values = [x for grid in grids.values() for _, cells in grid for x in cells.values() if x > 0]
    if not values:
        return ""
    shade = _shade(min(values), max(values))
    power = 3 * math.floor(math.log10(max(values)) / 3)  # so that cells stay short on a phone
    most = max(len(cells) for grid in grids.values() for _, cells in grid)
    style = f'<div class="heats" style="--least:{min(460, max(220, 72 + 28 * most))}px">'
    heats = "".join(_heat(task, grid, shade, power) for task, grid in grids.items())
    unit = f" Values &times; 10<sup>{power}</sup>.".replace("-", "&minus;") if power else ""
    return f'<p class="note">{HEAT_NOTE}{unit}</p>{style}{heats}</div>'


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f}"


def _blocks(rounds: Sequence[Round], task: str) -> list[tuple[str, dict[str, float]]]:
    """Means over at most ``HEAT_ROWS`` stretches of rounds: not every round trains every step."""
    amount = min(HEAT_ROWS, len(rounds))
    blocks = []
    for i in range(amount):
        block = rounds[i * len(rounds) // amount : (i + 1) * len(rounds) // amount]
        sums: dict[str, list[float]] = {}
        for row in block:
            for step, value in row.gap[task].items():
                sums.setdefault(step, []).append(value)
        first, last = block[0].index + 1, block[-1].index + 1
        label = f"{first}" if first == last else f"{first}{MISSING}{last}"
        blocks.append((label, {step: sum(x) / len(x) for step, x in sums.items()}))
    return blocks


def _shade(low: float, high: float) -> Callable[[float], float]:
    """0..1 for a value, logarithmic."""
    span = math.log(high / low) or 1.0
    return lambda value: math.log(max(value, low) / low) / span


def _heat(
    task: str,
    grid: Sequence[tuple[str, dict[str, float]]],
    shade: Callable[[float], float],
    power: int,
) -> str:
    steps = sorted(
        {step for _, cells in grid for step in cells},
        key=lambda step: (0, int(step)) if step.isdigit() else (1, 0),
    )
    wide = len(steps) > WIDE
    rows = []
    for label, cells in grid:
        row = [f'<th scope="row">{escape(label)}</th>']
        for step in steps:
            if step not in cells:
                row.append("<td></td>")
                continue
            heat, text = shade(cells[step]), _short(cells[step] / 10.0**power)
            dark = ' class="deep"' if heat > DEEP else ""
            tip = escape(f"step {step}, rounds {label}: {number(cells[step])}")
            row.append(f'<td{dark} style="--heat:{0.04 + 0.86 * heat:.2f}" title="{tip}">{"" if wide else text}</td>')
        rows.append(f"<tr>{''.join(row)}</tr>")
    heads = "".join(f'<th scope="col">{escape(step)}</th>' for step in steps)
    return (
        f'<figure class="scroll"><figcaption>{escape(task)}</figcaption>'
        f'<table class="heat{" wide" if wide else ""}"><thead><tr><th>rounds</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></figure>"
    )


def time_spent(run: RunFolder) -> str:
    """The rounds' wall time by what the loop did, how busy each role was, and forwards."""
    wall = run.train_s
    if not wall:
        return ""
    spent = {key: _total(run.rounds, lambda row: row.seconds, key) for key in WAITS}
    spent["other"] = max(0.0, wall - sum(spent.values()))
    whole = sum(spent.values())
    bars, keys = [], []
    for place, (key, seconds) in enumerate(spent.items()):
        name, share = WAITS.get(key, "other"), seconds / whole
        text = percent(share) if share > 0.07 else ""
        bars.append(f'<span class="t{place}" style="width:{100 * share:.2f}%" title="{name}">{text}</span>')
        keys.append(f'<li class="t{place}"><i></i>{name} <b>{duration(seconds)}</b></li>')
    return (
        f'<p class="note">{duration(wall)} in {count(len(run.rounds), "round")}, '
        f"{duration(wall / len(run.rounds))} a round. What the loop did:</p>"
        f'<div class="bar" role="img" aria-label="Share of wall time">{"".join(bars)}</div>'
        f'<ul class="legend">{"".join(keys)}</ul>{_roles(run, wall)}'
    )


def _roles(run: RunFolder, wall: float) -> str:
    roles = dict.fromkeys(role for row in run.rounds for role in [*row.busy, *row.forwards])
    if not roles:
        return ""
    busy = {role: _total(run.rounds, lambda row: row.busy, role) for role in roles}
    most = max(*busy.values(), wall)
    rows = []
    for role in roles:
        forwards = _total(run.rounds, lambda row: row.forwards, role)
        each = f"{forwards / len(run.rounds):,.0f}" if forwards else MISSING
        rows.append(
            f'<tr><th scope="row">{escape(role)}</th><td class="meter">'
            f'<span class="bar thin"><span class="t0" style="width:{100 * busy[role] / most:.2f}%">'
            f'</span><em style="left:{100 * wall / most:.2f}%"></em></span></td>'
            f"<td>{duration(busy[role])}</td><td>{busy[role] / wall:.2f}</td>"
            f"<td>{f'{forwards:,.0f}' if forwards else MISSING}</td><td>{each}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="numbers roles"><thead><tr><th></th>'
        "<th>busy, against the wall time (|)</th><th>busy</th><th>workers busy on average</th>"
        "<th>forwards (rows)</th><th>a round</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _total(rounds: Sequence[Round], read: Callable[[Round], Mapping[str, float]], key: str) -> float:
    return sum(read(row)[key] for row in rounds if key in read(row))
