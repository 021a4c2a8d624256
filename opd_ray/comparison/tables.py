"""A comparison as Markdown and JSON."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.comparison.hypotheses import AVERAGE
from opd_ray.comparison.results import COSTS, Results, Row
from opd_ray.comparison.verdicts import Finding
from opd_ray.evaluation.gauges import over_seeds
from opd_ray.evaluation.tables import plain
from opd_ray.storage.run_folder import write_atomic, write_json_atomic

__all__ = ["write_tables"]

WAYS = "free / in parallel / serially"


def write_tables(results: Results, out: Path, pictures: Mapping[Path, str]) -> None:
    """comparison.md and comparison.json."""
    write_atomic(out / "comparison.md", ("\n".join(_page(results, out, pictures)) + "\n").encode())
    write_json_atomic(out / "comparison.json", _data(results))


def _page(results: Results, out: Path, pictures: Mapping[Path, str]) -> Iterator[str]:
    protocol = results.protocol
    seeds = ", ".join(map(str, protocol.seeds))
    yield f"# {protocol.name}\n"
    yield f"Protocol sha256 `{results.sha256}`; seeds {seeds}; {results.done} of {results.total} pieces of work done.\n"
    if results.code:
        code = ", ".join(f"`{one}`" for one in results.code)
        yield (
            f"Trained and merged by {code} (version and hash of code), with trials in {results.core_hours:.1f} hours "
            "of processor time.\n"
        )
    if results.quick:
        yield "**A quick run**, of few rounds and pictures: it shows that all of it runs, and finds nothing.\n"
    else:
        yield from _verdicts(results)
    for group in dict.fromkeys(row.group for row in results.rows):
        yield f"\n## {plain(group)}\n"
        yield from _table([row for row in results.rows if row.group == group], results)
        yield from _costs([row for row in results.rows if row.group == group])
    yield from _notes(results)
    yield from _gauges(results)
    yield from _curves(results)
    yield from _cosines(results)
    yield from _trials(results)
    yield from (f"\n![{what}]({path.relative_to(out).as_posix()})" for path, what in pictures.items())


def _verdicts(results: Results) -> Iterator[str]:
    yield from _head(["hypothesis", "verdict", "measured", "value (95 % interval)", "each seed", "holds from"])
    for verdict in results.verdicts:
        for number, finding in enumerate(verdict.findings):
            first = [f"**{plain(verdict.name)}** {plain(verdict.says)}", f"**{verdict.verdict}**"]
            own = f": {finding.verdict}" if len(verdict.findings) > 1 else ""
            numbers = _interval(finding), _listed(finding.by_seed), f"{finding.at_least:g}"
            yield _line([*(first if number == 0 else ["", ""]), f"{plain(finding.says)}{own}", *numbers])


def _interval(finding: Finding) -> str:
    if finding.value is None:
        return "-"
    return f"{finding.value:+.3f} ({finding.low:+.3f} to {finding.high:+.3f})"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _table(rows: Sequence[Row], results: Results) -> Iterator[str]:
    tasks = [*results.protocol.judged.prompts, AVERAGE]
    yield from _head(["model", *map(plain, tasks), "fidelity", "diversity"])
    for row in rows:
        cells = [f"**{row.name}** {plain(row.says)}", *(_spread(row.scores[task]) for task in tasks)]
        yield _line([*cells, _gauge(row, "fidelity"), _gauge(row, "diversity")])


def _head(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|" + "---|" * len(columns)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    """Mean (lowest to highest seed)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _gauge(row: Row, kind: str, task: str = AVERAGE) -> str:
    """The mean over seeds, with an interval over seeds and prompts."""
    values = row.gauges.get(kind, {}).get(task)
    if not values:
        return "-"
    found = over_seeds(values)
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    yield from _head(["model", "learning rate", *(f"{kind.replace('_', '-')}: {WAYS}" for kind in COSTS)])
    for row in rows:
        cells = [row.name, "-" if row.rate is None else f"{row.rate:g}"]
        for kind in COSTS:
            ways = zip(*((cost.free, cost.parallel, cost.serial) for cost in row.costs[kind]), strict=True)
            cells.append(" / ".join(f"{np.mean(way):,.0f}" for way in ways))
        yield _line(cells)


def _gauges(results: Results) -> Iterator[str]:
    """By task."""
    tasks = [*results.protocol.judged.prompts]
    for kind, more in (("fidelity", ["pooled"]), ("diversity", [])):
        rows = [row for row in results.rows if kind in row.gauges]
        if not rows:
            continue
        yield f"\n## {kind.capitalize()} by task\n"
        yield from _head(["model", *tasks, "mean", *("all tasks together" for _ in more)])
        for row in rows:
            own = [_gauge(row, kind, task) for task in (*tasks, AVERAGE)]
            yield _line([row.name, *own, *(_gauge(row, other) for other in more)])


def _notes(results: Results) -> Iterator[str]:
    judged = results.protocol.judged
    averaged = ", ".join(judged.averaged)
    yield (
        f"\nScores: mean over seeds (lowest to highest seed) of {judged.images_per_task} held-out prompts a task, one "
        f"picture each, {judged.steps} steps, guidance {judged.guidance:g}; `{AVERAGE}` is the mean of {averaged}. "
        "Where a task has several rewards, a picture's score is the smallest of them. Fidelity: kernel distance to "
        "true pictures of the same prompts in the autoencoder's latents (0 is best), the mean of the tasks' own. "
        f"Diversity: distance between pictures of one prompt, {judged.variants} of each of {judged.varied} prompts a "
        "task. Both are learned from by nobody, and have 95 % intervals over seeds and prompts, as hypotheses have. "
        f"Costs are told as {WAYS}: of the arm itself, with the longest chain of what it needs (specialists, "
        "recordings), and with all of it. Images are those drawn to learn from, core-seconds processor time. Trials "
        "of learning rates are in none of them."
    )


def _curves(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows if row.curves]
    if not rows:
        return
    tasks = [*results.protocol.judged.prompts]
    yield "\n## On the way\n"
    yield (
        "Rewards and scores against fidelity as images are drawn; means over seeds. A reward is the mean of those that "
        "the model learned from since the point before, at the pictures of its training.\n"
    )
    columns = ["reward", *tasks, "fidelity"]
    yield from _head(["model", "images", "images in all", *columns])
    for row in rows:
        for point in row.on_the_way():
            images = (f"{point[name]:,.0f}" for name in ("images", "images in all"))
            yield _line([row.name, *images, *(f"{point[name]:.3f}" if name in point else "-" for name in columns)])


def _cosines(results: Results) -> Iterator[str]:
    if not results.cosines:
        return
    yield "\n## Angles between the tasks' gradients\n"
    yield from _head(["arm", "at the", "tasks", "cosine, each seed"])
    for name, by_seed in results.cosines.items():
        for where in ("start", "end"):
            for pair in next(iter(by_seed.values()))[where]:
                yield f"| {name} | {where} | {pair} | {_listed([one[where][pair] for one in by_seed.values()])} |"


def _trials(results: Results) -> Iterator[str]:
    if not results.trials:
        return
    tuning = results.protocol.tuning
    yield "\n## Learning rates\n"
    yield (
        f"Each arm's trials: seed {tuning.seed}, {tuning.rounds:g} of its rounds, the mean score of "
        f"{tuning.images_per_task} training prompts a task. Neither seed nor prompts are reported above.\n"
    )
    yield from _head(["arm", *(f"{rate:g}" for rate in tuning.rates)])
    for name, rates in results.trials.items():
        cells = (f"{rates[f'{rate:g}']:.3f}" if f"{rate:g}" in rates else "-" for rate in tuning.rates)
        yield _line([name, *cells])


def _data(results: Results) -> dict[str, Any]:
    return {
        "protocol_sha256": results.sha256,
        "quick": results.quick,
        "code": results.code,
        "core_hours": results.core_hours,
        "done": results.done,
        "total": results.total,
        "hypotheses": {verdict.name: verdict.told() for verdict in results.verdicts},
        "rows": {row.name: dataclasses.asdict(row) | {"gauges": _bounds(row)} for row in results.rows},
        "cosines": results.cosines,
        "trials": results.trials,
    }


def _bounds(row: Row) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Each gauge of each seed, without its bootstrap samples."""
    return {
        kind: {
            task: [{"value": one.value, "low": one.low, "high": one.high} for one in of_seeds]
            for task, of_seeds in by_task.items()
        }
        for kind, by_task in row.gauges.items()
    }
