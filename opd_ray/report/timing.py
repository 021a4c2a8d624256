"""The page's time: a round by what the loop did, the workers' by role, and the totals."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from opd_ray.report.charts import Series, stack_chart
from opd_ray.report.run_folder import Round, RunFolder
from opd_ray.report.training import figure, series_of
from opd_ray.report.wording import MISSING, count, duration, percent

__all__ = ["time_spent"]

LOOP = {
    "wait": "waiting for experience",
    "update": "updating and publishing",
    "checkpoint": "writing checkpoints",
}
GREY = 7
"""Waiting, on top of the stack: a series' place follows its colour."""
COLORS = {LOOP["wait"]: GREY, LOOP["update"]: 0, LOOP["checkpoint"]: 4}
ROLES = {"rollout": 0, "teacher": 2, "reward": 4, "learner": 5}


def time_spent(run: RunFolder) -> str:
    """Two stacked pictures over rounds, and a table of the roles."""
    wall = run.train_s
    if not wall:
        return ""
    loop = series_of(run.rounds, _loop, COLORS)
    busy = series_of(run.rounds, lambda row: row.busy, ROLES)
    charts = (
        _stack("Seconds a round", "wall time, by what the loop did", loop),
        _stack("Busy seconds a round", "by role, of workers that overlap", busy),
    )
    rounds = len(run.rounds)
    each = f"{duration(wall)} in {count(rounds, 'round')}, {duration(wall / rounds)} a round."
    return f'<p class="note">{each}</p><div class="charts">{"".join(charts)}</div>{_roles(run, wall)}'


def _loop(row: Round) -> dict[str, float]:
    return {name: row.seconds[key] for key, name in LOOP.items() if key in row.seconds}


def _stack(title: str, note: str, layers: Sequence[Series]) -> str:
    totals = {layer: sum(y for _, y in layer.points) for layer in layers}
    whole = sum(totals.values()) or 1.0
    keys = {layer: f"{duration(total)}, {percent(total / whole)}" for layer, total in totals.items()}
    return figure(title, note, stack_chart(layers, label=f"{title}, over rounds"), keys)


def _roles(run: RunFolder, wall: float) -> str:
    roles = dict.fromkeys(role for row in run.rounds for role in [*row.busy, *row.forwards])
    if not roles:
        return ""
    busy = {role: _total(run.rounds, lambda row: row.busy, role) for role in roles}
    forwards = {role: _total(run.rounds, lambda row: row.forwards, role) for role in roles}
    rows = [_role(escape(role), busy[role], forwards[role], run, wall) for role in roles]
    rows.append(_role("all", sum(busy.values()), sum(forwards.values()), run, wall))
    return (
        '<div class="scroll"><table class="numbers roles"><thead><tr><th></th><th scope="col">busy</th>'
        '<th scope="col">workers busy on average</th><th scope="col">forwards (rows)</th>'
        f'<th scope="col">a round</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _role(name: str, busy: float, forwards: float, run: RunFolder, wall: float) -> str:
    amounts = (forwards, forwards / len(run.rounds))
    cells = [duration(busy), f"{busy / wall:.2f}", *(f"{x:,.0f}" if forwards else MISSING for x in amounts)]
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _total(rounds: Sequence[Round], read: Callable[[Round], Mapping[str, float]], key: str) -> float:
    return sum(read(row)[key] for row in rounds if key in read(row))
