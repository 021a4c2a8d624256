"""The page's curves over rounds: loss by task, scores, gradient norm, and what the algorithm measures beside them."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from opd_ray.report.charts import Series, line_chart
from opd_ray.report.run_folder import Round, RunFolder
from opd_ray.report.table import Results
from opd_ray.report.wording import number

__all__ = ["curves", "figure", "series_of"]

MEASURES = {
    "implicit_accuracy": ("Pairs whose better image is preferred", "share, at the noises of the update"),
    "accuracy": ("Pairs whose better image is preferred", "share, among those that are no tie"),
    "ties": ("Prompts whose images are equally good", "share; nothing tells which is better"),
    "ratio": ("Log-ratio to what the likelihood is compared with", "the largest of a forward, mean over steps"),
    "clipped": ("Rows beyond the clip range", "share, mean over steps"),
}
"""What algorithms report by task and step -> title and note of its curve."""
ERRORS = {
    "error_better": "better",
    "error_worse": "worse",
    "reference_better": "better, of the frozen start",
    "reference_worse": "worse, of the frozen start",
}
"""Mean squared errors of prediction, of the images of pairs."""


def curves(run: RunFolder) -> str:
    """Loss, gradient norm, scores and the algorithm's own measures, each where the run has them."""
    colors = {task: color for color, task in enumerate(run.tasks)}
    results = Results.read(run.result)
    levels = {
        task: score.value
        for task, model in results.own.items()
        if (score := results.scores.get((model, task))) is not None
    }
    losses = series_of(run.rounds, lambda row: row.task_loss, colors)
    norms = series_of(run.rounds, lambda row: _only(row.values, "grad_norm"), {})
    tests = series_of(run.rounds, lambda row: row.evaluation, colors, levels)
    scores = series_of(run.rounds, lambda row: row.scores, {})
    untold = "its teacher's are not known yet" if run.teacher_of_task else "mean of each evaluation"
    dashes = "dashed: its teacher" if levels else untold
    errors = series_of(run.rounds, _errors, {name: color for color, name in enumerate(ERRORS.values())})
    charts = [
        _curve("Loss by task", losses, "first → last round", changes=True),
        _curve("Student's scores during training", tests, dashes, dots=True),
        _curve("Reward scores of what the student drew", scores, "mean of each round"),
        *(
            _curve(title, series_of(run.rounds, _measure(name), colors), note)
            for name, (title, note) in MEASURES.items()
        ),
        _curve("Errors of prediction", errors, "first → last round", changes=True),
        _curve("Gradient norm", norms, "of each update", legend=False),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _measure(name: str) -> Callable[[Round], Mapping[str, float]]:
    return lambda row: row.measures.get(name, {})


def _errors(row: Round) -> dict[str, float]:
    """Of each kind, over all tasks."""
    found = {title: row.measures.get(name, {}).values() for name, title in ERRORS.items()}
    return {title: sum(values) / len(values) for title, values in found.items() if values}


def _only(values: Mapping[str, float], name: str) -> dict[str, float]:
    return {name: values[name]} if name in values else {}


def series_of(
    rounds: Sequence[Round],
    read: Callable[[Round], Mapping[str, float]],
    colors: Mapping[str, int],
    levels: Mapping[str, float | None] | None = None,
) -> list[Series]:
    """What ``read`` finds in each round, as one series a name; names with a colour come first, in its order."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rounds:
        for name, value in read(row).items():
            points.setdefault(name, []).append((row.index + 1, value))
    names = sorted(points, key=lambda name: (colors.get(name, len(colors)), name))
    return [
        Series(name, colors.get(name, place), tuple(points[name]), (levels or {}).get(name))
        for place, name in enumerate(names)
    ]


def _curve(
    title: str,
    series: Sequence[Series],
    note: str,
    *,
    dots: bool = False,
    changes: bool = False,
    legend: bool = True,
) -> str:
    chart = line_chart(series, label=f"{title}, over rounds", dots=dots)
    keys = {}
    for line in series if legend else ():
        first, last = line.points[0][1], line.points[-1][1]
        keys[line] = f"{number(first)} → {number(last)}" if changes else number(last)
    return figure(title, note, chart, keys)


def figure(title: str, note: str, chart: str, keys: Mapping[Series, str]) -> str:
    """A chart with its title and, for each series in ``keys``, what is said about it."""
    if not chart:
        return ""
    items = "".join(
        f'<li class="c{line.color % 8}"><i></i>{escape(line.name)} <b>{escape(said)}</b></li>'
        for line, said in keys.items()
    )
    legend = f'<ul class="legend">{items}</ul>' if items else ""
    caption = f"{escape(title)} <small>{escape(note)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{chart}{legend}</figure>"
