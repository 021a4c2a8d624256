"""The result in numbers: one sentence, and a table of models and tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from opd_ray.report.run_folder import mapping, numbers
from opd_ray.report.wording import (
    MISSING,
    WORDS,
    Write,
    alike,
    count,
    duration,
    join,
    model_title,
    percent,
    span,
)

__all__ = ["Results", "Score", "result_table", "stages_table", "summary"]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean with its interval."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def read(cls, data: object) -> "Score":
        """What is missing or not finite becomes None."""
        found = numbers(data)
        return cls(found.get("value"), found.get("low"), found.get("high"))


@dataclass(frozen=True, slots=True)
class Results:
    """result.json's scores, in the order in which they are shown."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    scores: Mapping[tuple[str, str], Score]
    """By (model, task)."""
    gap_closed: Mapping[str, Score]
    """By task; tasks without a teacher have none."""
    own: Mapping[str, str]
    """Task -> the model that teaches it, as `teacher:<name>`."""

    def write(self, task: str) -> Write:
        """How this task's scores are written, in the same way for every model."""
        found = [score for (_, other), score in self.scores.items() if other == task]
        return alike(x for score in found for x in (score.value, score.low, score.high))

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> "Results":
        """Base first, then the teachers as the run lists them, the student last."""
        scores = {model: mapping(by_task) for model, by_task in mapping(result.get("scores")).items()}
        teachers = mapping(result.get("teachers"))
        own = {
            str(task): f"teacher:{name}"
            for name, teacher in teachers.items()
            for task in (mapping(teacher).get("tasks") or (name,))
        }
        order = ["base", *(f"teacher:{name}" for name in teachers)]
        models = [model for model in order if model in scores]
        models += [model for model in scores if model not in {*models, "student"}]
        models += ["student"] * ("student" in scores)
        for steps, others in mapping(result.get("scores_at")).items():  # the same models, in other numbers of steps
            named = {model: f"{model}, {steps} step{'s' * (steps != '1')}" for model in models if model in others}
            scores |= {label: mapping(others[model]) for model, label in named.items()}
        models += [model for model in scores if model not in models]
        taught = [task for task in own if any(task in by_task for by_task in scores.values())]
        tasks = dict.fromkeys([*taught, *(task for by_task in scores.values() for task in by_task)])
        return cls(
            tasks=tuple(tasks),
            models=tuple(models),
            scores={
                (model, task): Score.read(data) for model, by_task in scores.items() for task, data in by_task.items()
            },
            gap_closed={task: Score.read(data) for task, data in mapping(result.get("gap_closed")).items()},
            own=own,
        )


def summary(result: Mapping[str, Any], seconds: float | None = None) -> str:
    """The outcome in plain sentences; ``seconds`` is how long the rounds took, where known."""
    results = Results.read(result)
    rounds = int(numbers(result).get("rounds", 0))
    effort = count(rounds, "round") + (f", {duration(seconds)}" if seconds is not None else "")
    status = result.get("status")
    if status == "failed":
        return f"The run failed after {effort}."
    stopped = f"Stopped after {effort}; it can be resumed." if status == "stopped" else ""
    closed = {task: gap for task, gap in results.gap_closed.items() if gap.value is not None}
    cautions = _cautions(mapping(result.get("evaluation")))
    if not closed:
        parts = [stopped or f"Trained for {effort}.", _without_gaps(result, results), cautions]
        return " ".join(filter(None, parts))
    shares = join([f"{percent(gap.value)} ({task})" for task, gap in closed.items()])
    amount = len({results.own.get(task, task) for task in closed})
    whose = f"{WORDS[amount] if amount < len(WORDS) else amount} teachers' gaps" if amount > 1 else "its teacher's gap"
    sentence = f"Closed {shares} of {whose} in {effort}."
    others = _changes(results)
    untaught = f"Without a teacher: {join(others)}." if others else ""
    return " ".join(filter(None, [sentence, untaught, cautions, stopped]))


def _cautions(evaluation: Mapping[str, Any]) -> str:
    """Which of the scores rest on less than others."""
    unproven = [name for name, proof in mapping(evaluation.get("rewards")).items() if proof == "finite"]
    failed = int(sum(numbers(evaluation.get("failed")).values()))
    told = [f"Never made to rank anything (probe: finite): {join(unproven)}."] if unproven else []
    told += [f"{count(failed, 'score')} failed and {'is' if failed == 1 else 'are'} left out."] if failed else []
    return " ".join(told)


def _without_gaps(result: Mapping[str, Any], results: Results) -> str:
    """What is known of the student where no teacher's gap is: of a run without teachers its scores."""
    unscored = "the models were not evaluated, which takes prompts.eval and rewards"
    if mapping(result.get("teachers")):
        why = "no teacher's gap was measured" if results.scores else unscored
        return f"How close the student came is unknown: {why}."
    if changes := _changes(results):
        return f"On held-out prompts: {join(changes)}."
    return f"What it gained is unknown: {unscored}."


def _changes(results: Results) -> list[str]:
    """Of each task that nobody teaches: the base's score, and the student's."""
    found = []
    for task in results.tasks:
        base, student = (results.scores.get((model, task)) for model in ("base", "student"))
        if task not in results.own and base and student:
            write = results.write(task)
            found.append(f"{task} {write(base.value)} → {write(student.value)}")
    return found


def result_table(result: Mapping[str, Any]) -> Table:
    """Models by tasks, each mean with its interval; ● marks a teacher on its own task."""
    results = Results.read(result)
    marked = "● on its own task; " if results.own else ""
    caption = Text(f"{marked}below each mean its interval", style="dim")
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("")
    if not results.models:
        table.caption = None
        table.add_row("no scores")
    for task in results.tasks:
        table.add_column(Text(task.replace(":", ":\n")), justify="right", overflow="fold")
    for model in results.models:
        cells = [
            _cell(results.scores.get((model, task)), results.write(task), own=results.own.get(task) == model)
            for task in results.tasks
        ]
        last = model == results.models[-1]
        style = "bold" if model == "student" else ""
        table.add_row(Text(model_title(model)), *cells, style=style, end_section=last)
    if results.gap_closed:
        cells = [_cell(results.gap_closed.get(task), percent) for task in results.tasks]
        table.add_row(Text("gap closed"), *cells, style="green")
    return table


def _cell(score: Score | None, write: Write, *, own: bool = False) -> Text:
    if score is None:
        return Text(MISSING, style="dim")
    text = Text()
    if own:
        text.append("● ", style="cyan")
    text.append(write(score.value))
    interval = span(score.low, score.high, write)
    if interval:
        text.append(f"\n{interval}", style="dim not bold")
    return text


def stages_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    """What the stages of a job took; `seconds` of its rounds, `core_seconds` in which workers computed."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    for title in ("rounds", "images", "time of rounds", "core-seconds"):
        table.add_column(title, justify="right")
    for name, cost in stages.items():
        told = numbers(cost)
        cells = [f"{told.get(kind, 0):,.0f}" for kind in ("rounds", "images", "core_seconds")]
        table.add_row(Text(name), *cells[:2], duration(told.get("seconds")), cells[2])
    return table
