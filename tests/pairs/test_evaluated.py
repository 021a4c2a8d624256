"""Runs on pairs that are scored: with prompts that are drawn for that alone."""

import json

import pytest
import yaml

from opd_ray.commands.train import run_training
from opd_ray.config import parse
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.report.html import page
from opd_ray.report.run_folder import RunFolder
from opd_ray.report.table import summary
from tests.algorithms.parts import run_config
from tests.pairs import files
from tests.runtime.runs import go

BRIGHT = "tests.commands.scoring:brightness"
ROUNDS, PAIRS, PROMPTS, STEPS = 3, 6, 4, 2
TEACHING = ("teacher", "distil", "gap")


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Flow-DPO on red pictures against blue ones, and prompts that no pair has."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "held.jsonl").write_text("".join(f'{{"prompt": "held {n}", "task": "red"}}\n' for n in range(PROMPTS)))
    return {
        "rounds": ROUNDS,
        "algorithm": {"name": "diffusion_dpo", "beta": 20.0},
        "student": {"lora": {"rank": 4, "alpha": 8}, "guidance": 1.0},
        "batch": {"images_per_task": PAIRS, "item_size": 3},
        "pairs": {"files": str(files.parquet(folder / "a.parquet", 24))},
        "rewards": {BRIGHT: {}},
        "prompts": {"eval": str(folder / "held.jsonl")},
        "evaluation": {"images_per_task": PROMPTS, "steps": STEPS, "every": 2, "rewards": {"red": [BRIGHT]}},
    }


@pytest.fixture(scope="module")
def run(tiny, sections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, go(run_config(tiny, **sections), folder)


def test_the_student_and_its_start_are_drawn_and_scored(run):
    folder, outcome = run
    assert list(outcome.result["scores"]) == ["base", "student"]
    base, student = (outcome.result["scores"][model]["red"] for model in ("base", "student"))
    assert base["n"] == student["n"] == PROMPTS and base["value"] != student["value"]
    assert [("evaluation" in row) for row in outcome.rows] == [False, True, False]
    drawn = outcome.result["forwards"]["evaluation"]
    assert drawn == (2 + 1) * PROMPTS * STEPS, "two models at the end, one on the way"
    assert "rollout" not in outcome.result["forwards"], "nothing is drawn to be learned from"
    assert len(json.loads((folder / "samples" / "index.json").read_text())["rows"]) == PROMPTS


def test_it_is_the_student_that_trains_without_an_evaluation(tiny, sections, run, tmp_path):
    alone = {key: value for key, value in sections.items() if key not in ("prompts", "rewards", "evaluation")}
    found = go(run_config(tiny, **alone), tmp_path / "run")
    assert found.result["student_sha256"] == run[1].result["student_sha256"]
    assert found.result["scores"] == {}
    again = run_training(run_config(tiny, **sections), tmp_path / "run", resume=True)
    assert again["scores"] == run[1].result["scores"], "prompts.eval may come later: nothing was trained on it"


def test_neither_report_nor_closing_words_speak_of_teachers(run):
    folder, outcome = run
    said = summary(outcome.result)
    assert said.startswith("Trained for 3 rounds. On held-out prompts: red 0.") and " → 0." in said
    text = page(RunFolder.read(folder)).partition("Settings and versions")[0]
    words = text.partition("<main>")[2].lower()
    assert not [word for word in TEACHING if word in words]
    for title in ("Errors of prediction", "Pairs whose better image is preferred", "Prompts whose images are equally"):
        assert title in text
    assert "worse, of the frozen start" in text
    card = (folder / "lora" / "README.md").read_text().partition("## Settings")[0]
    assert not [word for word in TEACHING if word in card.lower()]


@pytest.mark.verify
@pytest.mark.ray
def test_over_ray_it_is_scored_alike(ray_session, tiny, sections, run, tmp_path):
    small = {"resources": {"cpu": 0.25}}
    cluster = {"runtime": "ray", "rollout": small | {"workers": 2}, "rewards": {"default": small}, "learner": small}
    spread = go(run_config(tiny, **sections, cluster=cluster), tmp_path / "run")
    assert spread.result["student_sha256"] == run[1].result["student_sha256"]
    assert spread.result["scores"] == run[1].result["scores"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {}}, "prompts: give train (what rollouts draw), eval (what is scored), or both"),
        ({"prompts": {"train": "t.txt"}}, "give one of prompts.train (rollouts draw on them), recorded"),
        ({"pairs": None}, "give one of prompts.train (rollouts draw on them), recorded"),
    ],
)
def test_what_is_learned_from_is_one_thing(tiny, sections, changes, message):
    with pytest.raises(ConfigError) as caught:
        run_config(tiny, **{**sections, **changes})
    assert message in str(caught.value)


def test_a_distilled_model_is_scored_at_its_own_steps(tiny, sections):
    config = yaml.safe_load(yaml.safe_dump(run_config(tiny, **sections).model_dump(mode="json")))
    config["model"]["distilled_steps"] = [1, 3]
    with pytest.raises(ConfigError, match=r"evaluation\.steps 2: the model was distilled to 1, 3 steps"):
        parse(config, "f")


def test_other_pairs_are_still_another_run(tiny, sections, run, tmp_path):
    other = {**sections, "pairs": {"files": str(files.parquet(tmp_path / "b.parquet", 12))}}
    with pytest.raises(RunFolderError, match="pairs"):
        run_training(run_config(tiny, **other), run[0], resume=True)
