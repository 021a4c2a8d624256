"""The page's time: what to change, a round by what the loop did, the workers' by role, and the totals."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from opd_ray.report.advice import advice
from opd_ray.report.charts import Series, stack_chart
from opd_ray.report.run_folder import Round, RunFolder
from opd_ray.report.training import figure, series_of
from opd_ray.report.waiting import STATES, roles_of, shares, who_waits
from opd_ray.report.wording import MISSING, count, duration, percent, role_title, size

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
    """What to change; two stacked pictures over rounds; who waits for whom; and a table of the roles."""
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in advice(run))
    lead = f'<ul class="advice">{said}</ul>' if said else ""
    wall = run.train_s
    if not wall:
        return lead
    loop = series_of(run.rounds, _loop, COLORS)
    busy = series_of(run.rounds, _busy, ROLES)
    charts = (
        _stack("Seconds a round", "wall time, by what the loop did", loop),
        _stack("Busy seconds a round", "by role, of workers that overlap", busy),
    )
    rounds = len(run.rounds)
    each = f"{duration(wall)} in {count(rounds, 'round')}, {duration(wall / rounds)} a round."
    store = max((row.store["used"] for row in run.rounds if "used" in row.store), default=None)
    if store is not None:
        each += f" The object store held at most {size(store)} at a round's end."
    return (
        f'{lead}<p class="note">{each}</p><div class="charts">{"".join(charts)}</div>'
        f"{who_waits(run.rounds)}{_roles(run, wall)}"
    )


def _loop(row: Round) -> dict[str, float]:
    return {name: row.seconds[key] for key, name in LOOP.items() if key in row.seconds}


def _stack(title: str, note: str, layers: Sequence[Series]) -> str:
    totals = {layer: sum(y for _, y in layer.points) for layer in layers}
    whole = sum(totals.values()) or 1.0
    keys = {layer: f"{duration(total)}, {percent(total / whole)}" for layer, total in totals.items()}
    return figure(title, note, stack_chart(layers, label=f"{title}, over rounds"), keys)


def _busy(row: Round) -> Mapping[str, float]:
    return row.busy or {role: use["busy"] for role, use in row.roles.items() if "busy" in use}


def _roles(run: RunFolder, wall: float) -> str:
    """A line a role, and one for all."""
    booked = list(dict.fromkeys(role for row in run.rounds for role in [*_busy(row), *row.forwards]))
    timed = roles_of(run.rounds)
    if not booked and not timed:
        return ""
    lines = [_role(role_title(role), [role], parts, run, wall) for role, parts in _lines(booked, timed)]
    lines.append(_role("all", booked, timed, run, wall))
    heads = ["busy", "workers busy on average", "forwards (rows)", "a round"]
    if timed:
        heads[2:2] = ["share busy", *list(STATES.values())[1:], "with a queue"]
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="scroll"><table class="numbers roles"><thead><tr><th></th>{columns}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _lines(booked: Sequence[str], timed: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Role -> the timed ones in it: work is booked for all teachers together, time for each of them."""
    within = {role: role if role in booked else role.partition(".")[0] for role in timed}
    lines: list[tuple[str, list[str]]] = []
    for role in dict.fromkeys([*booked, *(one for one in timed if within[one] not in booked)]):
        parts = [one for one in timed if within[one] == role] or [role] * (role in timed)
        lines.append((role, parts))
        lines += [(part, [part]) for part in parts if len(parts) > 1]
    return lines


def _role(title: str, booked: Sequence[str], timed: Sequence[str], run: RunFolder, wall: float) -> str:
    """One line; where nothing is booked under the name, the busy time is the timed one's."""
    busy = sum(_total(run.rounds, _busy, role) for role in booked)
    busy = busy or sum(_use(run, role, "busy") for role in timed)
    forwards = sum(_total(run.rounds, lambda row: row.forwards, role) for role in booked)
    amounts = (forwards, forwards / len(run.rounds))
    cells = [duration(busy), f"{busy / wall:.2f}", *(f"{x:,.0f}" if forwards else MISSING for x in amounts)]
    if roles_of(run.rounds):
        spent = shares(row.roles.get(role, {}) for row in run.rounds for role in timed)
        queue = _use(run, timed[0], "queued") / wall if len(timed) == 1 else None
        cells[2:2] = [*(percent(spent.get(state)) for state in STATES), percent(queue)]
    return f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _use(run: RunFolder, role: str, key: str) -> float:
    return _total(run.rounds, lambda row: row.roles.get(role, {}), key)


def _total(rounds: Sequence[Round], read: Callable[[Round], Mapping[str, float]], key: str) -> float:
    return sum(read(row)[key] for row in rounds if key in read(row))
