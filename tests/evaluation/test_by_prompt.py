"""Means, tags and wins of several pictures of each prompt."""

import math

import pytest

from opd_ray.evaluation.parts import Part
from opd_ray.evaluation.statistics import gap_closed, mean, mean_by_prompt, mean_of_tags, wins
from opd_ray.evaluation.summary import failures, summary
from opd_ray.evaluation.tables import markdown
from opd_ray.types import Prompt, Scored

NAN = math.nan


def test_pictures_of_one_prompt_are_no_independent_evidence():
    """Fifty pictures of each of two prompts say as much about the model as one of each."""
    scores, prompts = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    found = mean_by_prompt(scores, prompts)
    assert found == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 100}
    apart = mean(scores)
    assert apart["low"] > 0.3 and apart["high"] < 0.7


def test_a_picture_each_is_the_plain_mean():
    found = mean_by_prompt([1.0, 2.0, NAN, 6.0], "abcd")
    assert found["value"] == 3 and found["n"] == 3 and found["low"] < 3 < found["high"]
    assert mean_by_prompt([NAN], ["a"]) == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_by_prompt([], []) == {"value": None, "low": None, "high": None, "n": 0}


def test_the_mean_is_that_of_the_pictures_where_some_are_left_out():
    assert mean_by_prompt([1.0, NAN, 4.0, 4.0], ["a", "a", "b", "b"])["value"] == pytest.approx(3)


def test_several_pictures_of_one_prompt_have_no_interval():
    """Resampling one prompt gives it again: 0.5 to 0.5 would look certain, and says nothing about another prompt."""
    unknown = {"low": None, "high": None}
    assert mean_by_prompt([0.0, 1.0, 0.5, NAN], ["a", "a", "a", "b"]) == {"value": 0.5, "n": 3} | unknown
    assert wins([1.0, 2.0], [0.0, 0.0], "aa") == {"value": 1.0, "n": 2, "ties": 0} | unknown
    assert mean_of_tags({"x": ([0.0, 1.0], "ab"), "y": ([1.0, 1.0], "cc")}) == {"value": 0.75, "n": 4} | unknown
    assert mean([0.5]) == {"value": 0.5, "n": 1} | unknown
    assert gap_closed([0.0], [1.0], [0.5]) == {"value": 0.5} | unknown


def test_each_tag_counts_as_much_as_another():
    tags = {"counting": ([1.0, 1.0, 1.0, 1.0], "abcd"), "colors": ([0.0, 1.0], "ef")}
    found = mean_of_tags(tags)
    assert found["value"] == 0.75 and found["n"] == 6  # and not 5/6, the mean of the pictures
    assert found["low"] == 0.5 and found["high"] == 1.0
    assert mean_of_tags(tags | {"position": ([NAN], "g")}) == {"value": None, "low": None, "high": None, "n": 6}


def test_a_tie_is_half_a_win():
    found = wins([1.0, 2.0, 3.0, NAN, 5.0], [0.0, 2.0, 4.0, 1.0, NAN], "abcde")
    assert found["value"] == 0.5 and found["n"] == 3 and found["ties"] == 1
    sure = wins([1.0] * 9, [0.0] * 9, "abcdefghi")
    assert (sure["value"], sure["low"], sure["high"]) == (1, 1, 1)


def rows_of(model, scores, errors):
    """Two prompts with a tag each, two samples of each."""
    prompts = [Prompt(str(n), f"p{n}", "t", {"tag": tag}) for n, tag in enumerate("xy") for _ in range(2)]
    known = [{"sample": n % 2, "seed": 0, "steps": 1, "guidance": 1.0, "file": f"{model} {n}.png"} for n in range(4)]
    part = Part(f"{model}-0", model, tuple(prompts), tuple(known), "sample", ())
    return part.table(Scored({"r": scores, "none": [NAN] * 4}, {"r": errors}))


def test_failures_are_no_scores():
    ours = rows_of("m", [1.0, NAN, 0.25, NAN], {1: "OSError: gone"})
    theirs = rows_of("o", [1.0, 0.0, 0.5, 0.5], {})
    told = summary([*ours, *theirs], ["r", "none"])
    assert list(told["scores"]["m"]["t"]) == ["r"]  # the other applies to nothing
    cell = told["scores"]["m"]["t"]["r"]
    assert (cell["value"], cell["n"], cell["failed"], cell["does_not_apply"]) == (0.625, 2, 1, 1)
    tags = told["tags"]["m"]["t"]["r"]
    assert {tag: one["value"] for tag, one in tags["by_tag"].items()} == {"x": 1.0, "y": 0.25}
    assert tags["overall"]["value"] == 0.625
    (win,) = told["wins"]
    assert (win["model"], win["over"], win["value"], win["n"], win["ties"]) == ("m", "o", 0.25, 2, 1)
    assert [(one["prompt"], one["sample"], one["error"]) for one in told["failures"]] == [("p0", 1, "OSError: gone")]
    assert failures(theirs, ["r"]) == []


def test_what_a_person_reads_has_all_of_it():
    rows = [*rows_of("m|1", [1.0, NAN, 0.25, 0.75], {1: "OSError: a | b"}), *rows_of("o", [1.0, 0.0, 0.5, 0.5], {})]
    judge = {"proof": "finite", "code": "a:b", "arguments": {"k": 1}, "weights": {"m/w.bin": "0123456789abcdef"}}
    judge["packages"] = {"python": "3", "torch": "2.1"}
    versions = {"packages": {"python": "3", "torch": "2.15"}, "rewards": {"r": judge}}
    told = {"seed": 1, "images_per_prompt": 2, "pictures": 8, "versions": versions, **summary(rows, ["r"])}
    lines = markdown(told, rows).splitlines()
    assert "8 pictures, 2 images a prompt, seed 1. Means with 95 % bootstrap intervals over prompts." in lines
    assert any(line.startswith("| t | r | m\\|1 | 0.667 |") and line.endswith("| 3 | 1 |") for line in lines)
    assert "| r | m\\|1 | p0 | 1 | OSError: a \\| b |" in lines
    assert "| t | p0 | ![](m%7C1%200.png) | ![](o%200.png) |" in lines
    assert "| t | p0 | ![](../in/m%7C1%200.png) | ![](../in/o%200.png) |" in markdown(told, rows, "../in").splitlines()
    assert "| r | finite | a:b | k=1 | m/w.bin 0123456789ab | torch 2.1 |" in lines
    for table in "\n".join(lines).split("\n\n"):
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)> & more", "&lt;img src=x onerror=alert(1)&gt; &amp; more"),
        ("![](https://x/y.png) [a](b)", "!\\[\\](https://x/y.png) \\[a\\](b)"),
        ("a | b\\|c\r\nd", "a \\| b\\\\\\|c d"),
        ("*a* _b_ single_object `c` ~~d~~", "\\*a\\* \\_b\\_ single_object \\`c\\` \\~\\~d\\~\\~"),
    ],
)
def test_prompts_are_shown_as_they_are_and_do_nothing(text, shown):
    row = {"model": "m", "task": "t", "prompt_id": "0", "prompt": text, "sample": 0, "file": "0.png"}
    told = {"pictures": 1, "scores": {}, "tags": {}, "wins": [], "failures": [], "versions": {"packages": {}}}
    told["versions"]["rewards"] = {}
    assert f"| t | {shown} | ![](0.png) |" in markdown(told, [row]).splitlines()
