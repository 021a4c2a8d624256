"""The result as a sentence and a table, and how numbers are written."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from opd_ray.report.table import result_table, summary
from opd_ray.report.wording import MISSING, alike, duration, number, percent
from tests.report.run_folders import SCORES, TASKS, result


def shown(data: dict) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(result_table(data))
    return console.file.getvalue()


def test_the_table_has_every_number_and_marks_own_teachers():
    text = shown(result())
    for model, values in SCORES.items():
        title = f"{model.removeprefix('teacher:')} teacher" if ":" in model else model
        row = next(line for line in text.splitlines() if line.strip().startswith(title))
        assert [cell for cell in row.replace("●", "").split()[-4:]] == [f"{x:.3f}" for x in values]
        assert row.count("●") == model.startswith("teacher:")
    gap = next(line for line in text.splitlines() if "gap closed" in line)
    assert "94 %" in gap and "97 %" in gap and "91 %" in gap


def test_other_numbers_of_steps_are_rows_below():
    data = result()
    one = {
        model: {"text": {"value": 0.2 + 0.01 * n, "low": 0.1, "high": 0.3}} for n, model in enumerate(data["scores"])
    }
    lines = [line.strip() for line in shown(data | {"scores_at": {"1": one, "4": one}}).splitlines()]
    titles = ("student", "base, 1 step", "text teacher, 1 step", "student, 1 step", "base, 4 steps", "student, 4 steps")
    places = [next(n for n, line in enumerate(lines) if re.match(rf"{title}\s\s", line)) for title in titles]
    assert places == sorted(places) and "0.240" in lines[places[3]]
    assert summary(data | {"scores_at": {"1": one}}) == summary(data)


def test_headings_are_whole_on_80_columns():
    data = result()
    for scores in data["scores"].values():
        scores |= {f"mixed:{name}": scores["mixed:compose"] for name in ("text", "look")}
    data["scores"]["base"]["mixed:text"] = {"value": 5.7e-8, "low": 1.5e-13, "high": 1.7e-7, "n": 64}
    data["scores"]["teacher:compose"]["mixed:text"] = {"value": 0.00535, "low": 0.00209, "high": 0.00941, "n": 64}
    console = Console(file=io.StringIO(), width=80)
    console.print(result_table(data))
    lines = console.file.getvalue().splitlines()
    rows = lines[next(i for i, line in enumerate(lines) if "base" in line) :]
    assert next(i for i, line in enumerate(rows) if "text" in line) == 6, "no cell takes more than three lines"
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert lines[2].split() == ["compose", "text", "look", "compose", "text", "look"]


def test_brackets_in_names_are_text():
    data = json.loads(json.dumps(result()).replace("compose", "[red]x[/nope]"))
    assert "[red]x[/nope] teacher" in shown(data)


def test_no_scores_is_an_empty_table_that_says_so():
    assert "no scores" in shown({"status": "done", "rounds": 3, "scores": {}})


def test_summary_of_a_finished_run():
    assert summary(result(), 184) == (
        "Closed 94 % (compose), 97 % (text) and 91 % (look) of three teachers' gaps in 80 rounds, "
        f"3 min 4 s. Without a teacher: {TASKS[3]} 0.164 → 0.617."
    )


def test_summary_of_one_teacher_with_two_tasks():
    data = {
        "status": "done",
        "rounds": 1,
        "teachers": {"both": {"tasks": ["a", "b"]}},
        "gap_closed": {"a": {"value": 0.5}, "b": {"value": -0.2}},
    }
    assert summary(data) == "Closed 50 % (a) and −20 % (b) of its teacher's gap in 1 round."  # noqa: RUF001


def test_summary_of_a_run_without_teachers():
    scores = {"base": {"look": {"value": 0.25}}, "student": {"look": {"value": 0.5}}}
    data = {"status": "done", "rounds": 60, "teachers": {}, "scores": scores}
    assert summary(data, 184) == "Trained for 60 rounds, 3 min 4 s. On held-out prompts: look 0.250 → 0.500."
    assert summary(data | {"status": "stopped"}).startswith("Stopped after 60 rounds; it can be resumed. On held-out")
    unscored = (
        "Trained for 60 rounds. What it gained is unknown: the models were not evaluated, which takes prompts.eval"
    )
    assert summary(data | {"scores": {}}).startswith(unscored)
    assert "on its own task" not in shown(data)


@pytest.mark.parametrize(
    ("status", "expected"),
    [("failed", "failed after 7 rounds"), ("stopped", "can be resumed"), ("done", "Trained for 7")],
)
def test_summary_without_scores(status, expected):
    assert expected in summary({"status": status, "rounds": 7, "scores": {}})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.8384, "0.838"), (0, "0"), (1, "1.00"), (12.345, "12.3"), (1234.5, "1234")),
        *((0.031, "0.031"), (0.00441, "0.00441"), (3e-7, "3.0e-7"), (2.5e6, "2.5e6")),
        *((math.nan, MISSING), (None, MISSING)),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.84, 7.9e-5, 1.0, None), ["0.840", "0.000", "1.000", MISSING]),
        ((22.31, -0.5, math.nan), ["22.3", "-0.5", MISSING]),
        ((0.0412, 0.0003), ["0.0412", "0.0003"]),
        ((0.0, 0.0), ["0", "0"]),
        ((3e-7, 2e-9), ["3.0e-7", "2.0e-9"]),
    ],
)
def test_scores_that_are_compared_have_the_same_decimals(values, texts):
    write = alike(values)
    assert [write(value) for value in values] == texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min"), (184, "3 min 4 s")),
        *((3599.6, "1 h 00 min"), (7260, "2 h 01 min"), (200_000, "2 d 7 h"), (None, MISSING)),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert [percent(0.9695), percent(-0.12), percent(None)] == ["97 %", "−12 %", MISSING]  # noqa: RUF001


def test_what_rests_on_less_is_said():
    about = {"rewards": {"look": "ranks 1 probe pair", "mine": "finite"}, "failed": {"base": 1, "student": 2}}
    said = summary({"status": "done", "rounds": 3, "evaluation": about})
    assert said.endswith("Never made to rank anything (probe: finite): mine. 3 scores failed and are left out.")
    assert "probe" not in summary({"status": "done", "rounds": 3, "evaluation": {"rewards": {"look": "ranks 2"}}})
