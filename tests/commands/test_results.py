"""What a run leaves, and what the verbs that read it make of it."""

import json

import pytest
import yaml
from PIL import Image

from opd_ray.commands.train import show
from opd_ray.evaluation.models import find_model
from opd_ray.recipes import load
from tests.commands.conftest import BRIGHT, WORDS

MODELS = ["base", "teacher:a", "teacher:b", "student"]
KEYS = ["a", "b", f"mixed:{BRIGHT}", "mixed:look"]


@pytest.fixture(scope="module")
def result(finished):
    return json.loads((finished[0] / "result.json").read_text())


@pytest.fixture(scope="module")
def rows(finished):
    return [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]


def size(file):
    with Image.open(file) as image:
        return image.size


def test_stdout_is_the_result_and_nothing_else(finished, result):
    _, done = finished
    assert done.code == 0 and json.loads(done.out) == result
    lines = done.err.splitlines()
    assert lines[0] == "small: rounds 1 to 2" and lines[-1] == "evaluating base, teachers and student"
    assert any(line.startswith("round 2/2 | ") and "loss a " in line and "weights 0.0.2" in line for line in lines)
    assert "\r" not in done.err, "no progress bars of others"


def test_identity_and_scores(result):
    assert (result["status"], result["rounds"], result["weight_version"]) == ("done", 2, "0.0.2")
    assert result["student_sha256"] != result["ema_sha256"]
    assert all(len(result[key]) == 64 and int(result[key], 16) for key in ("student_sha256", "ema_sha256"))
    assert list(result["scores"]) == MODELS
    for scores in result["scores"].values():
        assert list(scores) == KEYS
        assert all(set(score) == {"value", "low", "high", "n"} and score["n"] == 4 for score in scores.values())
        assert all(score["low"] <= score["value"] <= score["high"] for score in scores.values())
    assert result["evaluation"] == {
        "guidance": {"base": 2.0, "teacher:a": 1.0, "teacher:b": 3.0, "student": 2.0},
        "steps": 2,
        "seed": 0,
        "images_per_task": 4,
        "failed": {},
        "remarks": [],
        "rewards": {"tests.commands.scoring:brightness": "ranks 1 probe pair", "look": "ranks 1 probe pair"},
    }


def test_tensorboard_shows_the_rows(finished, rows):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    for task in "ab":
        shown = [(event.step, event.value) for event in events.Scalars(f"loss/{task}")]
        assert shown == [(row["round"], pytest.approx(row["loss"][task])) for row in rows]


def test_a_gap_is_closed_by_as_much_as_the_scores_say(result):
    better = {t for t in "ab" if result["scores"][f"teacher:{t}"][t]["value"] > result["scores"]["base"][t]["value"]}
    assert set(result["gap_closed"]) == better
    for task, gap in result["gap_closed"].items():
        base, teacher, student = (result["scores"][m][task]["value"] for m in ("base", f"teacher:{task}", "student"))
        assert gap["value"] == pytest.approx((student - base) / (teacher - base))
        assert set(gap) == {"value", "low", "high"}


def test_work_is_counted_by_role_and_evaluation_apart(result, rows):
    """Guided rows count twice: 2 tasks x 2 images; steps 0 and 1 of 3 are trained on, so 1 step is drawn."""
    each = {"rollout": 2 * 2 * 1 * 2, "teacher": 2 * 2 * 1 + 2 * 2 * 2, "learner": 2 * 2 * 2 * 2}
    assert [row["forwards"] for row in rows] == [each] * 2
    pictures = 3 * 4 * 2  # 3 tasks, 4 prompts, 2 steps
    evaluation = pictures * 2 + pictures * (2 + 1 + 2 + 2)  # the student after round 1; base, teachers and student
    assert result["forwards"] == {role: 2 * count for role, count in each.items()} | {"evaluation": evaluation}
    assert result["seconds"].keys() == result["forwards"].keys()
    assert all(seconds > 0 for seconds in result["seconds"].values())


def test_every_round_is_a_row(rows):
    for number, row in enumerate(rows):
        assert row["round"] == number and row["weight_version"] == f"0.0.{number + 1}" and row["staleness"] == 0
        assert set(row["loss"]) == {"total", "a", "b"} and set(row["gap"]) == {"a", "b"}
        assert {"wait", "update", "round"} <= row["seconds"].keys()
        assert row["busy"].keys() == row["forwards"].keys() == {"rollout", "teacher", "learner"}
        assert row["grad_norm"] > 0 and row["lr"] == 0.01
    assert set(rows[0]["evaluation"]) == set(KEYS) and "evaluation" not in rows[1]


def test_the_folder_says_what_it_is(finished, result):
    folder, _ = finished
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["round"], status["rounds"], status["attempt"]) == ("done", 2, 2, 0)
    run = json.loads((folder / "run.json").read_text())
    assert set(run["teachers"]) == {"a", "b"} and all(len(one["sha256"]) == 64 for one in run["teachers"].values())
    assert {"torch", "ray", "diffusers"} <= run["versions"].keys()
    assert yaml.safe_load((folder / "config.yaml").read_text())["rounds"] == 2
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    card = (folder / "lora" / "README.md").read_text()
    assert all(one["sha256"] in card for one in run["teachers"].values())
    assert "trained: 2 rounds" in card and "| student |" in card and "| **gap closed** |" in card


def test_pictures_are_of_the_same_prompts_and_shown(finished, cli, tmp_path):
    folder, _ = finished
    index = json.loads((folder / "samples" / "index.json").read_text())
    assert index["models"] == MODELS
    assert [row["task"] for row in index["rows"]] == ["a"] * 4 + ["b"] * 4 + ["mixed"] * 4
    files = [folder / "samples" / file for row in index["rows"] for file in row["images"].values()]
    assert len(set(files)) == 48 and all(size(file) == (16, 16) for file in files)
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    grid = tmp_path / "grid.png"
    again = cli("report", folder, "--grid", grid)
    assert again.code == 0 and again.out == f"{folder / 'report.html'}\n{grid}\n" and again.err == ""
    assert (folder / "report.html").read_text() == page
    assert page.count("data:image/") >= 24 and "held two dogs b" in page
    width, height = size(grid)
    assert width > 4 * 48 and height > 6 * 48


def test_the_table_fits_on_80_columns(result, finished, capsys):
    show(result, finished[0], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert str(finished[0] / "report.html") in lines[-2] and str(finished[0] / "lora") in lines[-1]
    assert max(map(len, lines[:-2])) <= 80
    text = "\n".join(lines)
    assert all(name in text for name in ("base", "a teacher", "b teacher", "student", "mixed"))
    assert f"{result['scores']['student']['b']['value']:.3f}" in text
    for task in result["gap_closed"]:
        assert f"({task})" in text and "gap closed" in text


class TestSample:
    def test_a_run_draws_as_it_was_trained(self, cli, finished, tmp_path):
        out = tmp_path / "[red]x[/] :cat:"
        args = ("sample", finished[0], "-p", WORDS[-1], "-p", "a cat", "--count", 2, "--out", out)
        done = cli(*args)
        assert done.code == 0 and done.out == f"4 pictures of 2 prompts in {out} (2 steps, guidance 2)\n"
        assert done.err.strip() == ""
        first = {file.name: file.read_bytes() for file in sorted(out.iterdir())}
        assert list(first) == ["000-000.png", "000-001.png", "001-000.png", "001-001.png"]
        assert len(set(first.values())) == 4
        told = json.loads(cli(*args, "--json").out)
        assert told["guidance"] == 2.0 and told["steps"] == 2
        assert [one["prompt"] for one in told["files"]] == [WORDS[-1]] * 2 + ["a cat"] * 2
        assert [one["file"] for one in told["files"]] == [str(out / name) for name in first]
        assert {name: (out / name).read_bytes() for name in first} == first, "same seed, same pictures"
        cli(*args, "--seed", 1)
        assert not {(out / name).read_bytes() for name in first} & set(first.values())

    def test_a_base_model(self, cli, tiny, finished, tmp_path):
        for name, model in (("base", tiny), ("run", finished[0])):
            done = cli(
                "sample", model, "-p", "x", "--count", 1, "--steps", 2, "--guidance", 2, "--out", tmp_path / name
            )
            assert done.out.startswith("1 picture of 1 prompt in ")
        base, run = ((tmp_path / name / "000-000.png").read_bytes() for name in ("base", "run"))
        assert base != run, "the run's LoRA is in use"


class TestEvaluate:
    @pytest.fixture
    def scores(self, cli, tiny, finished, files, monkeypatch, tmp_path):
        """Run `evaluate` with prompts of the tests in the world's place; returns what it printed and wrote."""

        def prompts(task, split):
            path = tmp_path / f"{task}.jsonl"
            path.write_text("".join(json.dumps({"prompt": f"{words} {task}", "task": task}) + "\n" for words in WORDS))
            return path

        monkeypatch.setattr("opd_ray.world.prompts_path", prompts)
        told = cli("evaluate", tiny).error
        assert f"{tiny} draws 16 pixels; evaluate scores the tiny world's 32" in told
        monkeypatch.setattr("opd_ray.commands.evaluate.PIXELS", 16)
        out = tmp_path / "new" / "scores.json"
        models = [str(tiny), f"{tiny}/", str(finished[0])]
        args = ("evaluate", *models, "--images", 3, "--batch", 2, "--steps", 2, "--guidance", f"{finished[0]}=1")

        def run(*more):
            done = cli(*args, "--out", out, *more)
            assert done.code == 0, done.err
            return models, done, json.loads(out.read_text())

        return run

    def test_models_are_paired(self, scores):
        models, done, told = scores("--json")
        assert json.loads(done.out) == told and done.err == ""
        assert (told["seed"], told["images_per_task"], list(told["models"])) == (0, 3, models)
        assert [told["models"][model]["guidance"] for model in models] == [4.5, 4.5, 1.0]
        first, twin, run = (told["models"][model]["scores"] for model in models)
        assert first == twin != run, "the same model has the same scores"
        assert list(first) == ["compose", "text", "look", "mixed:compose", "mixed:text", "mixed:look"]
        assert first["look"]["n"] == 3 and first["look"]["low"] <= first["look"]["value"] <= first["look"]["high"]
        assert first["text"] == {"value": None, "low": None, "high": None, "n": 0}, "captions of no word"

    def test_several_numbers_of_steps_are_rows_of_their_own(self, scores):
        models, _, told = scores("--steps", "1,2", "--json")
        assert list(told["models"]) == [f"{model}, {steps}" for model in models for steps in ("1 step", "2 steps")]
        base = [told["models"][f"{models[0]}, {steps}"] for steps in ("1 step", "2 steps")]
        assert [one["steps"] for one in base] == [1, 2] and base[0]["scores"] != base[1]["scores"]

    def test_the_table_is_readable_on_80_columns(self, scores):
        models, done, told = scores()
        lines = done.out.splitlines()
        assert max(map(len, lines[:-4])) <= 80
        look = told["models"][models[2]]["scores"]["look"]
        assert any(line.split()[:1] == ["look"] for line in lines)
        assert sum(f"{look['value']:.1e}".split("e")[0] in line for line in lines) >= 1
        assert lines[-4:] == [
            *(f"{model}: guidance {scale}, 2 steps" for model, scale in zip(models, ("4.5", "4.5", "1"), strict=True)),
            "The same held-out prompts and first noises for all, seed 0.",
        ]


def test_the_worlds_models_are_drawn_as_in_the_demo(monkeypatch):
    monkeypatch.setattr("opd_ray.evaluation.models.check_lora", lambda model, path: None)
    demo = load("demo")
    own = {f"world/{task}": demo.teachers[task].guidance for task in ("compose", "text", "look")}
    for name, guidance in [("world", demo.student.guidance), *own.items()]:
        found = find_model(name)
        assert (found.label, found.model.path, found.guidance, found.steps) == (name, "world", guidance, 10)
        assert found.lora == (None if name == "world" else name)


def test_the_four_step_model_is_drawn_in_steps_that_it_knows(cli, tmp_path):
    assert (find_model("world/few").steps, find_model("world/unet").steps) == (4, 50)
    wrong = "--steps 10: world/few was distilled to 1, 2, 4 steps (model.distilled_steps); take one of these"
    assert cli("sample", "world/few", "-p", "x", "--steps", 10, "--out", tmp_path / "a").error == wrong
    assert cli("evaluate", "world/unet", "world/few", "--steps", "4,10").error == wrong
    prompts = ("--prompts", "world/text/train", "--reward", "text")
    assert cli("pairs", "world/few", *prompts, "--steps", 10, "--out", tmp_path / "a.parquet").error == wrong
    assert cli("sample", "world/few", "-p", "a red circle", "--count", 1, "--out", tmp_path / "b").code == 0


def test_a_distilled_run_that_was_never_scored_is_drawn_in_its_own_steps(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("opd_ray.evaluation.models.check_lora", lambda model, path: None)
    folder = tmp_path / "run"
    (folder / "lora").mkdir(parents=True)
    (folder / "lora" / "pytorch_lora_weights.safetensors").touch()
    (folder / "run.json").write_text("{}")
    for steps, drawn in ({}, 3), ({"steps": 2}, 2):
        config = {
            "name": "run",
            "rounds": 1,
            "model": {"path": str(tiny), "distilled_steps": [2, 3]},
            "sampling": {"steps": 3},
            "algorithm": {"name": "pso_offline", "space": "velocity"},
            "pairs": {"files": ["a.parquet"]},
            "evaluation": steps,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert find_model(str(folder)).steps == drawn
