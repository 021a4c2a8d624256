"""A comparison as Markdown and JSON."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.comparison.protocol import AVERAGE
from opd_ray.comparison.results import Cost, Results, Row
from opd_ray.comparison.verdicts import Finding
from opd_ray.storage.run_folder import write_atomic, write_json_atomic

__all__ = ["write_tables"]


def write_tables(results: Results, out: Path, pictures: Mapping[Path, str]) -> None:
    """comparison.md and comparison.json."""
    write_atomic(out / "comparison.md", ("\n".join(_page(results, out, pictures)) + "\n").encode())
    write_json_atomic(out / "comparison.json", _data(results))


def _page(results: Results, out: Path, pictures: Mapping[Path, str]) -> Iterator[str]:
    protocol = results.protocol
    seeds = ", ".join(map(str, protocol.seeds))
    yield f"# {protocol.name}\n"
    yield f"Protocol sha256 `{results.sha256}`; seeds {seeds}; {results.done} of {results.total} pieces of work done.\n"
    yield from _verdicts(results)
    for group in dict.fromkeys(row.group for row in results.rows):
        yield f"\n## {group}\n"
        yield from _table([row for row in results.rows if row.group == group], results)
        yield from _costs([row for row in results.rows if row.group == group])
    yield from _notes(results)
    yield from _curves(results)
    yield from _cosines(results)
    yield from _trials(results)
    yield from (f"\n![{what}]({path.relative_to(out).as_posix()})" for path, what in pictures.items())


def _verdicts(results: Results) -> Iterator[str]:
    yield "| hypothesis | verdict | measured | value (95 % interval) | each seed | holds from |"
    yield "|---|---|---|---|---|---|"
    for verdict in results.verdicts:
        for number, finding in enumerate(verdict.findings):
            first = f"**{verdict.name}** {verdict.says} | **{verdict.verdict}**" if number == 0 else " | "
            own = finding.verdict if len(verdict.findings) > 1 else ""
            said = f"{finding.says}{': ' if own else ''}{own}"
            yield f"| {first} | {said} | {_interval(finding)} | {_listed(finding.by_seed)} | {finding.at_least:g} |"


def _interval(finding: Finding) -> str:
    if finding.value is None:
        return "-"
    return f"{finding.value:+.3f} ({finding.low:+.3f} to {finding.high:+.3f})"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _table(rows: Sequence[Row], results: Results) -> Iterator[str]:
    tasks = [*results.protocol.judged.prompts, AVERAGE]
    columns = ["model", *tasks, "fidelity", "diversity"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = [f"**{row.name}** {row.says}", *(_spread(row.scores[task]) for task in tasks)]
        yield "| " + " | ".join([*cells, _gauge(row.fidelity), _gauge(row.diversity)]) + " |"


def _spread(values: Sequence[float]) -> str:
    """Mean (lowest to highest seed)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _gauge(values: Sequence[dict[str, float]]) -> str:
    """The mean over seeds, between the means of the bounds."""
    if not values:
        return "-"
    value, low, high = (np.mean([one[key] for one in values]) for key in ("value", "low", "high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


COSTS: tuple[tuple[str, Callable[[Cost], float]], ...] = (
    ("images", lambda cost: cost.images),
    ("images in all", lambda cost: cost.images_in_all),
    ("forwards", lambda cost: cost.forwards),
    ("core-s, free", lambda cost: cost.free),
    ("core-s, in parallel", lambda cost: cost.parallel),
    ("core-s, serially", lambda cost: cost.serial),
)


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    names = ["model", "learning rate", *(name for name, _ in COSTS)]
    yield "\n| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        means = [np.mean([take(cost) for cost in row.costs]) for _, take in COSTS]
        yield (
            f"| {row.name} | {'-' if row.rate is None else f'{row.rate:g}'} | "
            + " | ".join(f"{mean:,.0f}" for mean in means)
            + " |"
        )


def _notes(results: Results) -> Iterator[str]:
    judged = results.protocol.judged
    averaged = ", ".join(judged.averaged)
    yield (
        f"\nScores: mean over seeds (lowest to highest seed) of {judged.images_per_task} held-out prompts a task, one "
        f"picture each, {judged.steps} steps, guidance {judged.guidance:g}; `{AVERAGE}` is the mean of {averaged}. "
        "Where a task has several rewards, a picture's score is the smallest of them. Fidelity: kernel distance to "
        "true pictures of the same prompts in the autoencoder's latents (0 is best). Diversity: distance between "
        f"pictures of one prompt, {judged.variants} of each of {judged.varied} prompts a task. Both with 95 % "
        "intervals, and learned from by nobody. Images: drawn to learn from, of the arm itself and with all that made "
        "what it needs (specialists, recordings). Core-seconds: processor time of the arm itself (free), with the "
        "longest chain of what it needs (in parallel), and with all of it (serially). Trials of learning rates are in "
        "none of them. Intervals of hypotheses: a bootstrap over seeds and prompts."
    )


def _curves(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows if row.curves]
    if not rows:
        return
    tasks = [*results.protocol.judged.prompts]
    yield "\n## On the way\n"
    yield "Scores against fidelity as images are drawn; means over seeds.\n"
    yield "| model | images | " + " | ".join(tasks) + " | fidelity |"
    yield "|" + "---|" * (len(tasks) + 3)
    for row in rows:
        for point in row.on_the_way():
            cells = " | ".join(f"{point.get(name, np.nan):.3f}" for name in [*tasks, "fidelity"])
            yield f"| {row.name} | {point['images']:,} | {cells} |"


def _cosines(results: Results) -> Iterator[str]:
    if not results.cosines:
        return
    yield "\n## Angles between the tasks' gradients\n"
    yield "| arm | at the | tasks | cosine, each seed |"
    yield "|---|---|---|---|"
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
    yield "| arm | " + " | ".join(f"{rate:g}" for rate in tuning.rates) + " |"
    yield "|" + "---|" * (len(tuning.rates) + 1)
    for name, rates in results.trials.items():
        cells = (f"{rates[f'{rate:g}']:.3f}" if f"{rate:g}" in rates else "-" for rate in tuning.rates)
        yield f"| {name} | " + " | ".join(cells) + " |"


def _data(results: Results) -> dict[str, Any]:
    return {
        "protocol_sha256": results.sha256,
        "done": results.done,
        "total": results.total,
        "hypotheses": {verdict.name: verdict.told() for verdict in results.verdicts},
        "rows": {row.name: dataclasses.asdict(row) for row in results.rows},
        "cosines": results.cosines,
        "trials": results.trials,
    }
