"""The page's gap to the teacher at each denoising step: the first rounds against the last."""

from collections.abc import Mapping, Sequence
from html import escape

from opd_ray.report.charts import Series, line_chart
from opd_ray.report.run_folder import Round, RunFolder
from opd_ray.report.training import figure
from opd_ray.report.wording import MISSING, alike, number

__all__ = ["gaps"]

NOTE = (
    "Mean squared velocity gap at each trained denoising step, from noise (left) to image (right), "
    "in the first rounds and in the last; one axis for all tasks."
)
STRETCH, LEAST = 8, 5
"""An eighth of the rounds, and at least five: not every round trains every step."""
BEFORE = 7
"""The colour of the first rounds, grey; the last have their task's."""
MOST_DOTS = 24

Stretch = tuple[str, dict[int, float]]
"""Which rounds, and the mean gap in them by step."""


def gaps(run: RunFolder) -> str:
    """One chart a task, and the numbers; empty where no step was marked."""
    ends = {}
    for task in dict.fromkeys(task for row in run.rounds for task in row.gap):
        rounds = [row for row in run.rounds if row.gap.get(task)]
        if found := _ends(rounds, task):
            ends[task] = found
    values = [x for stretches in ends.values() for _, cells in stretches for x in cells.values()]
    if not values:
        return ""
    colors = {task: color for color, task in enumerate(run.tasks)}
    positive = [x for x in values if x > 0] or values
    bounds = min(positive), max(positive)
    charts = "".join(_chart(task, ends[task], colors.get(task, 0) % BEFORE, bounds) for task in ends)
    return f'<p class="note">{NOTE}</p><div class="charts">{charts}</div>{_numbers(ends)}'


def _ends(rounds: Sequence[Round], task: str) -> list[Stretch]:
    """The first and the last rounds; of a single round itself alone."""
    size = min(max(LEAST, len(rounds) // STRETCH), len(rounds) // 2)
    return [_means(part, task) for part in ((rounds[:size], rounds[-size:]) if size else (rounds,)) if part]


def _means(rounds: Sequence[Round], task: str) -> Stretch:
    sums: dict[int, list[float]] = {}
    for row in rounds:
        for step, value in row.gap[task].items():
            if step.isdecimal():
                sums.setdefault(int(step), []).append(value)
    first, last = rounds[0].index + 1, rounds[-1].index + 1
    label = f"round {first}" if first == last else f"rounds {first}{MISSING}{last}"
    return label, {step: sum(x) / len(x) for step, x in sorted(sums.items())}


def _change(stretches: Sequence[Stretch]) -> str:
    """By how much the mean over the steps that both stretches trained fell."""
    if len(stretches) < 2:
        return ""
    (_, before), (_, after) = stretches
    both = before.keys() & after.keys()
    low, high = sum(after[step] for step in both), sum(before[step] for step in both)
    return f"{high / low:.1f} times smaller" if 0 < low < high else "did not become smaller"


def _chart(task: str, stretches: Sequence[Stretch], color: int, bounds: tuple[float, float]) -> str:
    keys = {}
    for place, (label, cells) in enumerate(stretches):
        shown = tuple((float(step), value) for step, value in cells.items() if value > 0 or bounds[0] <= 0)
        line = Series(label, color if place == len(stretches) - 1 else BEFORE, shown)
        keys[line] = number(sum(cells.values()) / len(cells)) if cells else MISSING
    dots = max(len(line.points) for line in keys) <= MOST_DOTS
    label = f"Gap of {task}, over denoising steps"
    chart = line_chart(tuple(keys), label=label, dots=dots, smooth=False, unit="step", bounds=bounds)
    return figure(task, _change(stretches), chart, keys)


def _numbers(ends: Mapping[str, Sequence[Stretch]]) -> str:
    steps = sorted({step for stretches in ends.values() for _, cells in stretches for step in cells})
    columns = {step: [c.get(step) for stretches in ends.values() for _, c in stretches] for step in steps}
    write = {step: alike(values) for step, values in columns.items()}
    rows = []
    for task, stretches in ends.items():
        for place, (label, cells) in enumerate(stretches):
            said = "".join(f"<td>{write[step](cells.get(step))}</td>" for step in steps)
            rows.append(_row(f"<b>{escape(task)}</b> {label}" if place == 0 else label, said))
        if len(stretches) == 2:
            (_, before), (_, after) = stretches
            shares = [before[s] / after[s] if s in before and after.get(s) else None for s in steps]
            said = "".join(f"<td>{MISSING if share is None else f'{share:.1f}'}</td>" for share in shares)
            rows.append(_row("times smaller", said))
    heads = "".join(f'<th scope="col">{step}</th>' for step in steps)
    return (
        '<details><summary>The same in numbers</summary><div class="scroll"><table class="numbers steps"><thead><tr>'
        f'<th scope="col">step</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _row(head: str, cells: str) -> str:
    return f'<tr><th scope="row">{head}</th>{cells}</tr>'
