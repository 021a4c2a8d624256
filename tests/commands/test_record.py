"""`opd-ray record`, and training on what it wrote."""

import json

import pytest


def test_recordings_and_a_student_of_them(cli, recipe, tmp_path):
    path, out = recipe(), tmp_path / "recordings"
    done = cli("record", path, "--out", out)
    assert done.code == 0 and "4 drawings of each of a, b in" in done.out
    assert sorted(str(file.relative_to(out)) for file in out.glob("*/*")) == [
        f"{task}/00000{round}-000.safetensors" for task in "ab" for round in range(2)
    ]
    again = json.loads(cli("record", path, "--out", out, "-o", "rounds=3", "--json").out)
    assert (again["new"], again["images_per_task"]) == (2, 6), "one more round of both"
    settings = ("-o", f"recorded={out}", "-o", "prompts.train=null", "-o", "algorithm.states=recorded")
    trained = cli("train", path, *settings, "--out", tmp_path / "runs", "--json")
    result = json.loads(trained.out)
    assert trained.code == 0 and {"base", "student", "teacher:a", "teacher:b"} <= set(result["scores"])


@pytest.mark.parametrize(("change", "lacks"), [("teachers={}", "teachers"), ("prompts={eval: x.txt}", "prompts.train")])
def test_a_recipe_without_what_it_takes(cli, recipe, tmp_path, change, lacks):
    changes = ["-o", "algorithm={name: sft}", "-o", "recorded=x", "-o", "prompts={eval: x.txt}", "-o", change]
    error = cli("record", recipe(), *changes, "--out", tmp_path / "out").error
    assert f"has no {lacks}; give a recipe whose teachers draw its training prompts" in error
    assert not (tmp_path / "out").exists()
