"""Evaluation at the end of a run in this process: who is drawn, at which guidance, and what is written."""

import json

import pytest

from opd_ray.commands.train import run_training
from opd_ray.errors import ConfigError
from opd_ray.evaluation import contestants, mean
from opd_ray.rewards.base import check_rewards
from tests.algorithms.parts import run_config, write_loras

BRIGHT, CONTRAST = "tests.evaluation.scoring:brightness", "tests.evaluation.scoring:contrast"
WORDS = ("red cat", "two dogs", "a word", "ships", "blue sky", "old car")


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, prefix in (("text", "the word"), ("look", "a photo of"), ("held", "some"), ("mixed", "many")):
        (folder / f"{name}.txt").write_text("".join(f"{prefix} {word}\n" for word in WORDS))
    paths = write_loras(tiny, folder, ["text", "look"])

    def file(name):
        return str(folder / f"{name}.txt")

    return run_config(
        tiny,
        teachers={"text": {"lora": paths["text"], "guidance": 1.0}, "look": {"lora": paths["look"], "guidance": 2.0}},
        # No held-out prompts of task look; mixed has no teacher.
        prompts={
            "train": {"text": file("text"), "look": file("look")},
            "eval": {"text": file("held"), "mixed": file("mixed")},
        },
        rewards={BRIGHT: {}, CONTRAST: {}},
        evaluation={
            "images_per_task": 5,
            "steps": [2, 1],
            "batch": 2,
            "rewards": {"text": [BRIGHT], "mixed": [BRIGHT, CONTRAST]},
        },
        ema={"decay": 0.9, "every": 1},
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run_training(config, folder, resume=False)


def test_every_model_is_scored_on_every_held_out_task(finished):
    _, result = finished
    assert list(result["scores"]) == ["base", "teacher:text", "teacher:look", "student"]
    keys = ["text", f"mixed:{BRIGHT}", f"mixed:{CONTRAST}"]
    for scores in result["scores"].values():
        assert list(scores) == keys
        assert all(score["n"] == 5 and score["low"] <= score["value"] <= score["high"] for score in scores.values())
    values = [scores[keys[0]]["value"] for scores in result["scores"].values()]
    assert len(set(values)) == 4


def test_other_numbers_of_steps_are_scored_too(config, finished):
    """As a run that has this number alone would score them."""
    folder, result = finished
    assert result["evaluation"]["steps"] == 2 and list(result["scores_at"]) == ["1"]
    assert list(result["scores_at"]["1"]) == list(result["scores"])
    assert result["scores_at"]["1"]["student"] != result["scores"]["student"]
    alone = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"steps": (1,)})})
    assert run_training(alone, folder, resume=True)["scores"] == result["scores_at"]["1"]


def test_models_draw_at_their_own_guidance(config, finished):
    expected = {"base": 1.5, "teacher:text": 1.0, "teacher:look": 2.0, "student": 1.5}
    assert {one.label: one.guidance for one in contestants(config)} == expected
    assert finished[1]["evaluation"]["guidance"] == expected


def test_a_gap_is_closed_only_where_there_are_held_out_prompts(finished):
    assert set(finished[1]["gap_closed"]) <= {"text"}


def test_every_picture_of_the_grid_was_written(finished):
    folder = finished[0] / "samples"
    index = json.loads((folder / "index.json").read_text())
    assert [row["task"] for row in index["rows"]] == ["text"] * 4 + ["mixed"] * 4
    files = [folder / file for row in index["rows"] for file in row["images"].values()]
    assert len(set(files)) == 8 * 4 and all(file.is_file() for file in files)
    assert len(list(folder.rglob("*.png"))) == len(files)


def test_a_finished_run_that_is_resumed_evaluates_the_same_average_again(config, finished):
    """Its workers are new: the first weights that they prove are the average, not what rollouts draw with."""
    folder, result = finished
    assert result["student_sha256"] != result["ema_sha256"]
    again = run_training(config, folder, resume=True)
    assert again["scores"] == result["scores"] and again["ema_sha256"] == result["ema_sha256"]


def test_the_interval_in_the_result_is_that_of_the_statistics(finished):
    score = finished[1]["scores"]["base"]["text"]
    assert set(score) == set(mean([0.0]))


def test_scores_of_unknown_tasks_and_by_unknown_rewards_are_refused():
    rewards = {BRIGHT: {}}
    check_rewards(rewards, {"a": (BRIGHT,)}, ["a"])
    for by_task, tasks, message in [
        ({"b": (BRIGHT,)}, ["a"], r"evaluation.rewards.b: there are no held-out prompts .* prompts.eval has a\. Add"),
        ({}, ["a"], rf"'a' is scored by 'a', which is not among rewards \({BRIGHT}\); add it there or name another"),
        ({"a": ("look",)}, ["a"], r"'a' is scored by 'look'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_rewards(rewards, by_task, tasks)
    for name, args, message in [
        ("unheard", {}, r"reward 'unheard' is unknown\. Known: aesthetic, .*text\. For your own use pack"),
        (BRIGHT, {"power": 2}, r"brightness takes no argument 'power'; it takes images, prompts"),
        ("tests.actors.test_teacher_and_reward:Prompted", {}, r"Prompted needs word"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_rewards({name: args}, {}, [])
