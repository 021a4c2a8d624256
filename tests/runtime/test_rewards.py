"""Rewards with workers and environments of their own, and what becomes of what they cannot score."""

import json
import zipfile
from pathlib import Path

import pytest

from opd_ray.errors import ConfigError, TooManyFailedError
from opd_ray.metrics import MetricsLog
from opd_ray.runtime.cluster import _resolved
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.scoring import Watch
from opd_ray.types import Prompt, Scored
from tests.runtime.runs import go, same

BRIGHT, HERE = "tests.commands.scoring:brightness", "tests.rewards.isolated"
SMALL = {"resources": {"cpu": 0.25}}


def wheel(folder, version, source):
    """A package of one file, as pip knows it."""
    name, info = "scale_of_rewards", f"scale_of_rewards-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", source)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path.as_uri()


def scored(prompts, *rewards, batch=4, **changes):
    """Sections of a run that learns from rewards, and is evaluated by them."""
    names = list(rewards)
    return {
        "rounds": 2,
        "algorithm": {"name": "ddpo"},
        "rewards": {name: {} for name in names},
        "batch": {"images_per_task": 4, "item_size": 4},
        "teachers": {},
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "evaluation": {"images_per_task": 5, "steps": 2, "batch": batch, "rewards": {"a": names, "b": names}},
    } | changes


@pytest.mark.ray
@pytest.mark.verify  # pip copies this venv
@pytest.mark.parametrize("by", ["py_modules", "pip"])
def test_two_rewards_have_two_versions_of_one_package_at_once(make_config, ray_session, prompts, tmp_path, by):
    old = wheel(tmp_path, "1.0", "FACTOR = 2\n")
    new = wheel(tmp_path, "2.0", "def factor():\n    return 3\n")
    if by == "pip":
        old, new = old.removeprefix("file://"), new.removeprefix("file://")
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    own = {
        f"{HERE}:old": SMALL | {"runtime_env": {by: [old], "env_vars": here}},
        f"{HERE}:new": SMALL | {"runtime_env": {by: [new], "env_vars": here}},
        "default": SMALL,
    }
    settings = scored(prompts, BRIGHT, *(f"{HERE}:{name}" for name in ("old", "new")))
    done = go(make_config("ray", cluster={"rewards": own}, **settings), tmp_path / "run")
    means = [row["scores"] for row in done.rows] + [
        {key: score["value"] for key, score in done.result["scores"]["student"].items()}
    ]
    for row in means:
        bright, twice, thrice = (
            [value for key, value in sorted(row.items()) if name in key] for name in ("brightness", ":old", ":new")
        )
        assert twice == pytest.approx([2 * value for value in bright], rel=1e-5)
        assert thrice == pytest.approx([3 * value for value in bright], rel=1e-5)
    roles = {"reward", f"reward.{HERE}:old", f"reward.{HERE}:new"}
    assert roles <= done.rows[0]["roles"].keys()
    assert done.result["evaluation"]["rewards"] == dict.fromkeys(settings["rewards"], "ranks 1 probe pair")


@pytest.mark.ray
def test_an_environment_that_cannot_be_made_is_said_in_one_line(make_config, ray_session, prompts, tmp_path):
    absent = (tmp_path / "scale_of_rewards-9.0-py3-none-any.whl").as_uri()
    own = {f"{HERE}:old": SMALL | {"runtime_env": {"py_modules": [absent]}}}
    with pytest.raises(ConfigError) as caught:
        go(make_config("ray", cluster={"rewards": own}, **scored(prompts, f"{HERE}:old")), tmp_path / "run")
    assert "scale_of_rewards-9.0" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.verify
def test_what_a_reward_never_answers_is_set_aside_at_its_deadline(make_config, ray_session, prompts, tmp_path):
    name = f"{HERE}:sleepy"
    own = {name: SMALL | {"deadline_s": 3, "retries": 1, "max_failed": 0.5}}
    settings = scored(prompts, BRIGHT, name, batch=1, rounds=1)
    settings |= {"algorithm": {"name": "ddpo"}, "prompts": {"train": {"a": str(only(tmp_path))}, "eval": str(prompts)}}
    done = go(make_config("ray", cluster={"rewards": own | {"default": SMALL}}, **settings), tmp_path / "run")
    assert done.error is None
    failed = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in failed} == {name} and {"tree" in row["prompt"] for row in failed} == {True}
    assert all("3 workers were lost one after the other" in row["error"] for row in failed)
    student = done.result["scores"]["student"]
    assert student[f"a:{BRIGHT}"]["n"] == 5 and student[f"a:{name}"]["n"] == 4, "left out of the mean"
    assert done.result["evaluation"]["failed"] == {"base": 2, "student": 2}


def only(folder):
    path = folder / "few.txt"
    path.write_text("red cat, a\ntwo dogs, a\n")
    return path


class Choosy:
    """Cannot score pictures of trees."""

    def __init__(self, probes=1):
        self.probes = lambda: []

    def __call__(self, images, prompts):
        if any("tree" in prompt for prompt in prompts):
            raise ValueError("no trees, please")
        return images.mean((1, 2, 3))


CHOOSY = f"{__name__}:Choosy"


@pytest.fixture
def failing(make_config, prompts, monkeypatch):
    monkeypatch.setattr("opd_ray.actors.reward.PAUSE_S", 0.0)

    def made(max_failed, **changes):
        settings = scored(prompts, BRIGHT, **changes)
        settings["rewards"] |= {CHOOSY: {"probe": "finite"}}
        return make_config(cluster={"rewards": {"default": SMALL | {"max_failed": max_failed}}}, **settings)

    return made


def test_failures_are_listed_and_teach_nothing(failing, tmp_path):
    whole = go(failing(0.5), tmp_path / "whole")
    failed = [json.loads(line) for line in (tmp_path / "whole" / "failures.jsonl").read_text().splitlines()]
    told = [row for row in failed if "model" not in row]
    assert told and {row["error"] for row in failed} == {"ValueError: no trees, please"}
    assert all("a tree" in row["prompt"] and row["reward"] == CHOOSY for row in failed)
    assert sum(row.get("failed", {}).get(CHOOSY, 0) for row in whole.rows) == len(told)
    assert any("scores of round" in note and "failures.jsonl" in note for note in whole.notes)
    assert (tmp_path / "whole" / "report.html").exists()
    go(failing(0.5, rounds=1), tmp_path / "parts")
    assert same(go(failing(0.5), tmp_path / "parts", resume=True), whole)


def test_above_the_configured_share_the_run_stops_and_can_go_on(failing, tmp_path):
    stopped = go(failing(0.05), tmp_path / "run")
    assert f"reward {CHOOSY} failed on " in str(stopped.error) and "no trees, please" in str(stopped.error)
    assert "max_failed 0.05 allows" in str(stopped.error) and "--resume" in str(stopped.error)
    done = go(failing(1.0), tmp_path / "run", resume=True)
    assert done.result["status"] == "done"
    failed = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert len({json.dumps(row) for row in failed}) == len(failed), "what is done again is listed once"


def test_rounds_before_the_one_that_fails_are_kept(failing, tmp_path, monkeypatch):
    """Checkpoints are rare, and the third round is the first one with a picture of a tree."""
    seen, score = [], Choosy.__call__

    def late(self, images, prompts):
        seen.append(prompts)
        return score(self, images, prompts if len(seen) > 8 else ["no such thing"] * len(prompts))

    monkeypatch.setattr(Choosy, "__call__", late)
    rare = {"rounds": 4, "checkpoint": {"every": 10}}
    stopped = go(failing(0.0, **rare), tmp_path / "run")
    assert "no trees" in str(stopped.error) and len(stopped.rows) >= 1
    kept = len(stopped.rows)
    assert f"going on after round {kept} of 4" in go(failing(1.0, **rare), tmp_path / "run", resume=True).notes


def test_the_share_is_of_those_pictures_that_a_reward_applies_to(tmp_path):
    prompt, nan = Prompt("p", "p", "a"), float("nan")
    scored = Scored({"one": [nan, 1.0] + [nan] * 8}, {"one": {0: "no"}})
    watch = Watch({"one": 0.4}, MetricsLog(tmp_path / "failures.jsonl", []), lambda text: None)
    with pytest.raises(TooManyFailedError, match="reward one failed on 1 of 2 pictures of round 1, more than max_fail"):
        watch.set_aside([(prompt, 0, scored, place) for place in range(10)], "round 1")


def test_a_reward_that_falls_silent_is_told_of_once(tmp_path):
    """NaN of every picture: it is no 0, and others are learned from alone, but not in silence."""
    notes = []
    watch = Watch({}, MetricsLog(tmp_path / "failures.jsonl", []), notes.append)
    rounds = [{"one": [0.1, 0.2], "two": [1.0, 2.0]}] + 5 * [{"two": [1.0, 2.0]}] + [{"one": [0.1, 0.2]}]
    told = [watch.same(values) for values in rounds]
    assert [len(texts) for texts in told] == [0, 0, 0, 1, 0, 0, 0] and notes == told[3]
    assert notes[0].startswith("reward one scored no picture of the last 3 rounds, and did before: it answers NaN")


def test_a_variable_may_be_that_of_where_the_run_starts(monkeypatch):
    spec = WorkerSpec("reward", Choosy, 1, {}, runtime_env={"env_vars": {"KEY": "${OPD_RAY_SECRET}", "TWO": "2"}})
    with pytest.raises(ConfigError, match=r"env_vars.KEY of reward names \$\{OPD_RAY_SECRET\}, which is not set"):
        _resolved(spec)
    monkeypatch.setenv("OPD_RAY_SECRET", "word")
    assert _resolved(spec) == {"KEY": "word", "TWO": "2"}


def test_a_reward_that_stops_varying_is_told_of(make_config, prompts, tmp_path):
    name = "tests.commands.scoring:constant"
    settings = scored(prompts, BRIGHT, rounds=3)
    settings["rewards"] |= {name: {"probe": "finite"}}
    done = go(make_config(**settings), tmp_path / "run")
    said = f"reward {name} gave 22.3 to every picture of the last 3 rounds: it tells nothing apart"
    assert [note for note in done.notes if note.startswith(said)] and done.rows[-1]["remarks"][0].startswith(said)
    assert not any(BRIGHT in note and "tells nothing" in note for note in done.notes)
    judged = f"reward {name} gave 22.3 to each of 20 pictures of the evaluation: it tells nothing apart"
    assert judged in done.notes and done.result["evaluation"]["remarks"] == [judged]
    report = (tmp_path / "run" / "report.html").read_text()
    assert (
        said in report
        and judged in report
        and "it ranks nothing (probe: finite)" in report
        and "ranks 1 probe pair" in report
    )
    assert done.result["evaluation"]["rewards"][name] == "finite"


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ({"runtime_env": {"pip": ["a"]}}, "runtime_env: with runtime local every reward is in this process"),
        ({"runtime_env": {"pipp": ["a"]}}, "pipp is not among pip, uv, conda"),
        ({"retries": -1}, "retries"),
    ],
)
def test_what_a_placement_cannot_be(make_config, prompts, placement, said):
    with pytest.raises(ValueError, match=said):
        make_config(cluster={"rewards": {"default": placement}}, **scored(prompts, BRIGHT))
