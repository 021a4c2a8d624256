"""``opd-ray evaluate --prompts`` and ``opd-ray score``: through workers, resumable, one row a picture."""

import json
import re
import shutil
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest

from opd_ray.evaluation import workers
from opd_ray.evaluation.parts import Results
from tests.commands import judges
from tests.commands.conftest import BRIGHT

PROMPTS = [("a red cat", "colors"), ("two dogs", "counting"), ("a blue car", "colors"), ("old house", None)]
MOODY = "{tests.commands.judges:moody: {probe: finite}, " + BRIGHT + ": {}}"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "things.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "tag": tag}) + "\n" for text, tag in PROMPTS))
    return path


@pytest.fixture
def evaluate(cli, tiny, prompts, tmp_path):
    """Run it on two samples of each prompt; returns the outcome and the folder."""

    def run(name, *more, rewards=BRIGHT, models=(str(tiny),)):
        out = tmp_path / name
        asked = ("--prompts", prompts, "--rewards", rewards, "--images-per-prompt", 2, "--steps", 2, "--batch", 3)
        return cli("evaluate", *models, *asked, "--guidance", 2, "--out", out, *more), out

    return run


def table(out):
    return pq.read_table(out / "images.parquet").to_pylist()


def told(out):
    return json.loads((out / "summary.json").read_text())


def test_one_row_a_picture_and_what_is_made_of_them(evaluate, tiny, finished):
    models = (str(tiny), str(finished[0]))
    done, out = evaluate("two", "--json", models=models)
    assert done.code == 0, done.err
    rows, summary = table(out), told(out)
    assert json.loads(done.out) == summary and done.err == ""
    assert [row["prompt"] for row in rows] == [text for _ in models for text, _ in PROMPTS for _ in range(2)]
    assert [row["sample"] for row in rows] == [0, 1] * 8 and {row["task"] for row in rows} == {"things"}
    assert {row["file"] for row in rows} == {str(file.relative_to(out)) for file in out.rglob("*.png")}
    scores = {model: [row[f"score_{BRIGHT}"] for row in rows if row["model"] == model] for model in models}
    assert len({*scores[models[0]], *scores[models[1]]}) == 16, "each has noise of its own"
    cell = summary["scores"][models[0]]["things"][BRIGHT]
    assert cell["value"] == pytest.approx(sum(scores[models[0]]) / 8) and cell["n"] == 8 and cell["failed"] == 0
    better = sum(ours > theirs for ours, theirs in zip(scores[models[0]], scores[models[1]], strict=True))
    (win,) = summary["wins"]
    assert (win["model"], win["over"], win["value"], win["n"]) == (*models, better / 8, 8)
    assert set(summary["tags"][models[0]]["things"][BRIGHT]["by_tag"]) == {"colors", "counting"}
    assert summary["versions"]["packages"]["torch"] and summary["models"][models[1]]["files"]["lora"]
    reward = summary["versions"]["rewards"][BRIGHT]
    assert reward["code"] == BRIGHT and len(reward["code_sha256"]) == 64 and "1 probe pair" in reward["proof"]
    assert reward["weights"] == {} and reward["packages"] == summary["versions"]["packages"]
    assert "| things | a red cat | ![](pictures/0-" in (out / "summary.md").read_text()


def test_what_a_reward_prints_is_not_in_the_result(evaluate):
    done, out = evaluate("told", "--json", rewards="{tests.commands.judges:talkative: {probe: finite}}")
    assert json.loads(done.out) == told(out) and "scoring" in done.err


def test_the_same_pictures_and_scores_whoever_draws_them_and_in_whatever_order(evaluate, monkeypatch):
    _, one = evaluate("one")
    assert evaluate("two", "-o", "cluster.rollout.workers=2")[0].code == 0
    order = Results.left
    monkeypatch.setattr(Results, "left", lambda self, parts: order(self, parts)[::-1])
    assert evaluate("backwards", "-o", "cluster.rollout.workers=3")[0].code == 0
    monkeypatch.undo()
    done, other = evaluate("batches", "--batch", 8)
    assert done.code == 0, done.err
    for name in ("two", "backwards"):
        assert table(one) == table(one.parent / name)
        for file in one.rglob("*.png"):
            assert file.read_bytes() == (one.parent / name / file.relative_to(one)).read_bytes()
    for ours, theirs in zip(table(one), table(other), strict=True):  # another forward batch: float arithmetic
        assert ours[f"score_{BRIGHT}"] == pytest.approx(theirs[f"score_{BRIGHT}"], abs=1e-5)
        assert ours["prompt_id"] == theirs["prompt_id"]


def test_whoever_was_stopped_goes_on(evaluate, monkeypatch):
    _, whole = evaluate("whole")
    with monkeypatch.context() as patch:
        write = Results.write

        def stopping(self, part, found):
            write(self, part, found)
            if len(self.rows) == 2:
                raise KeyboardInterrupt

        patch.setattr(Results, "write", stopping)
        done, out = evaluate("parts")
        assert done.code == 3 and "6 of 8 pictures are done; run it again to go on" in done.err
        assert not (out / "images.parquet").exists() and len(list((out / "parts").iterdir())) == 2
    assert (
        "holds another evaluation: seed was 0, now 1. Choose another --out" in evaluate("parts", "--seed", 1)[0].error
    )
    begun = []
    with monkeypatch.context() as patch:
        begin = workers.Workers._begin
        patch.setattr(workers.Workers, "_begin", lambda self, part: begun.append(part.name) or begin(self, part))
        assert evaluate("parts")[0].code == 0
    assert begun == ["00-00-0000006"], "the others were there"
    assert table(out) == table(whole) and told(out) == told(whole) and not (out / "parts").exists()
    with monkeypatch.context() as patch:
        patch.setattr("opd_ray.build.make_backend", None)  # nothing is left to do
        assert evaluate("parts")[0].code == 0
    assert told(out) == told(whole)


def test_what_a_reward_failed_on_is_left_out_told_and_tried_again(evaluate, tmp_path, monkeypatch):
    """One reward answers to every picture, the other one raises at those of dogs, until it is mended.

    2 of 8 are less than max_failed 0.3 allows, 2 of the 6 in the parts that are done again would be more.
    """
    allow = ("-o", "cluster.rewards.default.max_failed=0.3", "-o", "cluster.rewards.default.retries=1")
    monkeypatch.setenv("MOOD", "bad")
    done, out = evaluate("moody", *allow, rewards=MOODY)
    assert done.code == 0, done.err
    assert "2 pictures left out of a mean (summary.md says why); run it again to try again" in done.out
    name = "tests.commands.judges:moody"
    assert told(out)["versions"]["rewards"][name]["weights"] == {"mood.bin": "00ff"}
    failed = [row for row in table(out) if row[f"error_{name}"]]
    assert [row["prompt"] for row in failed] == ["two dogs"] * 2
    assert all(row[f"score_{name}"] is None and row[f"score_{BRIGHT}"] is not None for row in failed)
    cells = told(out)["scores"][next(iter(told(out)["scores"]))]["things"]
    assert (cells[name]["n"], cells[name]["failed"], cells[BRIGHT]["n"]) == (6, 2, 8)
    values = [row[f"score_{name}"] for row in table(out) if row[f"score_{name}"] is not None]
    assert cells[name]["value"] == pytest.approx(sum(values) / 6)
    assert "ValueError: not in the mood" in (out / "summary.md").read_text()
    before = table(out)
    done, _ = evaluate("moody", *allow, rewards=MOODY)
    assert done.code == 0 and table(out) == before, done.err
    monkeypatch.setenv("MOOD", "good")
    with monkeypatch.context() as patch:
        patch.setitem(judges.moody.weights, "mood.bin", "ffff")
        error = evaluate("moody", *allow, rewards=MOODY)[0].error
        assert f'was scored by other rewards: {name}.weights.mood.bin was "00ff", now "ffff". Choose another' in error
        assert table(out) == before
    assert evaluate("moody", *allow, rewards=MOODY)[0].code == 0
    assert not any(row[f"error_{name}"] for row in table(out)) and told(out)["failures"] == []


def test_a_reward_that_fails_too_often_ends_it(evaluate, monkeypatch):
    monkeypatch.setenv("MOOD", "bad")
    done, out = evaluate("moody", "-o", "cluster.rewards.default.retries=1", rewards=MOODY)
    assert done.code == 3 and "moody failed on 1 of 8 pictures, more than max_failed 0.05 allows" in done.err
    assert "ValueError: not in the mood" in done.err and (out / "parts").exists()


def test_pictures_are_scored_as_when_they_were_drawn(cli, evaluate, tmp_path):
    """But for the rounding of a PNG to 8 bits: at most half a step of 1/255."""
    _, out = evaluate("drawn")
    done = cli("score", out, "--rewards", BRIGHT, "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    for ours, theirs in zip(table(tmp_path / "scores"), table(out), strict=True):
        assert ours[f"score_{BRIGHT}"] == pytest.approx(theirs[f"score_{BRIGHT}"], abs=0.5 / 255)
        assert [ours[name] for name in ("prompt", "model", "sample", "tag", "file")] == [
            theirs[name] for name in ("prompt", "model", "sample", "tag", "file")
        ]
    assert told(tmp_path / "scores")["pictures"] == 8
    for place in (out, tmp_path / "scores"):
        links = re.findall(r"!\[\]\((.*?)\)", (place / "summary.md").read_text())
        assert len(links) == 4 and all((place / unquote(link)).is_file() for link in links)
    shutil.rmtree(out / "pictures")
    assert "8 of 8 pictures are not there" in cli("score", out, "--rewards", BRIGHT, "--out", tmp_path / "x").error


def test_a_picture_that_cannot_be_read_is_a_row_that_failed(cli, evaluate, tmp_path, monkeypatch):
    """It is no failure of a reward: that fails on the other picture of its prompt, 1 of 8, and 2 of 8 would end it."""
    _, out = evaluate("drawn")
    file = next(out.rglob("00001-0.png"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("MOOD", "bad")
    allow = ("-o", "cluster.rewards.default.max_failed=0.2", "-o", "cluster.rewards.default.retries=1")
    done = cli("score", out, "--rewards", MOODY, "--out", tmp_path / "scores", *allow)
    assert done.code == 0 and "2 pictures left out of a mean" in done.out, done.err
    failed = [row for row in table(tmp_path / "scores") if row[f"error_{BRIGHT}"]]
    assert [row["file"] for row in failed] == [str(file.relative_to(out))] and failed[0][f"score_{BRIGHT}"] is None
    assert f"{file} is broken (" in failed[0]["error_tests.commands.judges:moody"]
    assert sum(row[f"score_{BRIGHT}"] is not None for row in table(tmp_path / "scores")) == 7
    assert told(tmp_path / "scores")["failures"][0]["error"] == failed[0][f"error_{BRIGHT}"]


def test_fewer_prompts_and_pictures_tasks_by_name_and_rewards_of_a_file(evaluate, prompts, tmp_path):
    (tmp_path / "rewards.yaml").write_text(f"rewards:\n  {BRIGHT}:\n")
    more = ("--prompts", f"other={prompts}", "--images", 2, "--pictures", 1)
    done, out = evaluate("few", *more, rewards=tmp_path / "rewards.yaml")
    assert done.code == 0, done.err
    rows = table(out)
    assert [row["task"] for row in rows] == ["things"] * 4 + ["other"] * 4
    assert [row["file"] is not None for row in rows] == [True, True, False, False] * 2
    assert len(list(out.rglob("*.png"))) == 4
    assert len({row[f"score_{BRIGHT}"] for row in rows}) == 8, "another task is other noise"


def test_refusals_are_one_line(evaluate, cli, tiny, prompts, tmp_path, no_start):
    def refused(*more, **asked):
        return evaluate("refused", *more, **asked)[0].error

    (tmp_path / "list.yaml").write_text("- a")
    for rewards, expected in [
        (" ", "--rewards names no reward; for instance pickscore"),
        ("nope", "reward 'nope' is unknown. Known:"),
        (f"{{{BRIGHT}: {{power: 2}}}}", "brightness takes no argument 'power'"),
        ("{a: [", "not YAML"),
        (tmp_path / "list.yaml", "expected a mapping of names to arguments"),
        (tmp_path / "no.yaml", "cannot be read"),
    ]:
        assert expected in refused(rewards=rewards)
    for more, expected in [
        (("--prompts", tmp_path / "no.jsonl"), "no.jsonl: cannot be read (No such file"),
        (("--prompts", f"t={tmp_path / 'no.jsonl'}"), "no.jsonl: cannot be read (No such file"),
        (("--cluster", "nope"), "no cluster file 'nope'; known: "),
        (("-o", "rounds=3"), "-o rounds=3: expected a key of cluster"),
        (("-o", "cluster.rollout.workers=0"), "cluster.rollout.workers"),
        (("-o", "cluster.rollout.workerz=1"), "unknown key 'workerz'"),
    ]:
        assert expected in refused(*more)
    assert "draws 16 pixels and world 32; give --resolution for all" in refused(models=(str(tiny), "world"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty and holds no evaluation" in evaluate("full")[0].error
    assert "--rewards needs --prompts" in cli("evaluate", tiny, "--rewards", BRIGHT).error
    assert "--images-per-prompt needs --prompts" in cli("evaluate", tiny, "--images-per-prompt", 2).error
    assert "is no folder; expected GenEval's" in cli("score", tmp_path / "no", "--rewards", BRIGHT).error
    assert "--rewards names no reward" in cli("score", tmp_path).error


def test_rewards_get_the_metadata_of_prompts_during_training_too(cli, recipe, tmp_path):
    rows = [{"prompt": f"some {words}", "task": "a", "level": level} for words, level in [("cats", 0.25), ("dogs", 1)]]
    trained = [row | {"task": task} for row in rows for task in "ab"]
    for name, of in (("held", rows), ("train", trained)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    reward = "tests.commands.judges:told"
    path = recipe(
        prompts={"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held.jsonl")},
        rewards={reward: {"probe": "finite"}},
        evaluation={"images_per_task": 2, "steps": 1, "every": 1, "rewards": {"a": [reward]}},
    )
    done = cli("train", path, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.err
    first, _ = map(json.loads, (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines())
    assert first["evaluation"] == {"a": 0.625}
    assert json.loads(done.out)["scores"]["student"]["a"]["value"] == 0.625


@pytest.mark.verify
def test_ray_draws_and_scores_the_same(evaluate):
    _, here = evaluate("here")
    done, out = evaluate("ray", "--cluster", "local", "-o", "cluster.rollout.workers=2")
    assert done.code == 0, done.err
    assert table(out) == table(here)
    for file in here.rglob("*.png"):
        assert file.read_bytes() == (out / file.relative_to(here)).read_bytes()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"cluster.rewards.{BRIGHT}.retrys=3", f"cluster.rewards.{BRIGHT}: unknown key 'retrys'"),
        ("cluster.rewards={'tests.commands.scoring:brigth': {batch: 2}}", "scoring:brigth: no such reward; known: "),
        ("cluster.rewards.brigth.batch=2", "cluster.rewards.brigth: no such reward; known: "),
        (f"cluster.rewards.{BRIGHT}.batch=0", "batch"),
    ],
)
def test_a_placement_that_no_reward_has_is_refused(evaluate, key, said):
    done, out = evaluate("placed", "-o", key)
    assert said in done.error and not out.exists()


def test_a_reward_of_a_package_is_placed_by_its_dotted_name(evaluate):
    done, _ = evaluate("placed", "-o", f"cluster.rewards.{BRIGHT}.batch=2", "-o", f"cluster.rewards.{BRIGHT}.retries=0")
    assert done.code == 0, done.err
