"""Rates from a run's rows and from files, and `opd-ray plan` over them."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from opd_ray.cli import app
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.planning.rates import Rates
from opd_ray.recipes import load

GOOD = {
    "item_size": 12,
    "items": {"compose": 2, "text": 2, "look": 2},
    "seconds": {"rollout": 0.4, "teacher": 0.2},
    "learner": {"serial": 0.1, "shared": 1.2},
}


def write(path, data):
    path.write_text(yaml.safe_dump(data))
    return path


def run_folder(path, rows, *overrides):
    config = load("demo", overrides)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number, factor=1.0):
    """A round of six items; the first ones are slow."""
    return {
        "round": number,
        "seconds": {"round": 4.0, "wait": 1.5, "update": 2.5},
        "busy": {"rollout": 99.0, "teacher": 99.0, "learner": 2.0},
        "roles": {
            "rollout": {"workers": 2, "busy": 2.4 * factor, "transfer": 0.6, "answers": 6},
            "teacher": {"workers": 1, "busy": 1.2 * factor, "transfer": 0.0, "answers": 6},
            "reward": {"workers": 1, "busy": 0.0, "answers": 0},
            "learner": {"workers": 1, "busy": 2.0},
        },
    }


def test_rates_of_a_run_are_medians_without_the_first_rounds(tmp_path) -> None:
    rows = [row(0, 50), row(1, 20), *(row(n) for n in range(2, 6)), row(6, 9)]
    rows[3]["seconds"]["checkpoint"] = 0.7
    found = Rates.from_run(run_folder(tmp_path, rows))
    assert found.items == {"compose": 2, "text": 2, "look": 2} and found.item_size == 12
    assert found.seconds == pytest.approx({"rollout": 0.4, "teacher": 0.2})
    assert found.transfer == pytest.approx({"rollout": 0.1})
    assert found.held("rollout") == pytest.approx(0.5)
    assert found.learner.shared == pytest.approx(2.0) and found.learner.serial == pytest.approx(0.5)
    assert found.checkpoint == pytest.approx(0.1)


def test_an_older_run_has_busy_seconds_alone(tmp_path) -> None:
    rows = [row(n) | {"roles": {}} | {"busy": {"rollout": 3.0, "teacher": 1.5, "learner": 2.0}} for n in range(4)]
    found = Rates.from_run(run_folder(tmp_path, rows))
    assert found.seconds == pytest.approx({"rollout": 0.5, "teacher": 0.25})


def test_items_that_are_handed_over_in_parts_count_whole(tmp_path) -> None:
    rows = [row(n) for n in range(4)]
    for each in rows:
        each["roles"]["rollout"]["answers"] = 18
    assert Rates.from_run(run_folder(tmp_path, rows)).seconds["rollout"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("recipe", "overrides", "streams"),
    [
        ("demo", [], True),
        ("world_pso", [], False),
        ("world_ddpo", [], False),
        ("world_dpo", [], False),
        ("demo", ["cluster.learner.backend=fsdp2"], False),
        ("demo", ["cluster.learner.backend=deepspeed", "cluster.learner.zero_stage=1"], True),
        ("demo", ["cluster.learner.backend=deepspeed"], False),
    ],
)
def test_whether_the_learner_waits_for_all_items_is_the_recipes(recipe, overrides, streams) -> None:
    rates = Rates.model_validate(GOOD | {"items": {"all": 2}, "streams": not streams})
    assert rates.for_config(load(recipe, overrides)).streams == streams


def test_a_run_on_pairs_has_readers_and_nothing_to_divide(tmp_path) -> None:
    asked = ["plan", "pso_style", "-o", "prompts=null", "-o", "rewards={}"]
    shown = CliRunner().invoke(app, asked).output
    assert "reader" in shown and "learner" in shown and "nothing to divide" in shown
    assert not {"rollout", "teacher", "--from-run"} & set(shown.split())
    scored = CliRunner().invoke(app, ["plan", "pso_style"]).output
    assert {"reader", "rollout"} <= set(scored.split()), "it has prompts.eval"
    found = CliRunner().invoke(app, [*asked, "--from-run", str(tmp_path)]).exception
    assert isinstance(found, ConfigError) and "pso_style reads its experience and draws none: --from-run" in str(found)


def test_a_run_without_teachers_lists_none() -> None:
    shown = CliRunner().invoke(app, ["plan", "world_pso"]).output
    assert "rollout" in shown and "teacher" not in shown


def test_a_run_without_rounds_tells_nothing(tmp_path) -> None:
    with pytest.raises(RunFolderError, match="no round with times"):
        Rates.from_run(tmp_path)


def test_what_is_written_is_read_again(tmp_path) -> None:
    rates = Rates.model_validate(GOOD)
    (tmp_path / "rates.yaml").write_text(rates.to_yaml())
    assert Rates.read(tmp_path / "rates.yaml") == rates
    (tmp_path / "rates.json").write_text(json.dumps(GOOD))
    assert Rates.read(tmp_path / "rates.json") == rates


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 1}, "unknown key 'speed'; allowed: item_size, items, seconds"),
        (
            {"seconds": {"rollout": 1, "teacher.texts": 1}},
            "seconds.teacher.texts: no such role; allowed: rollout, teach",
        ),
        ({"seconds": {"teacher": 1}}, "seconds.rollout is missing"),
        ({"seconds": {"rollout": -1}}, "seconds: rollout takes 0 seconds or more, got -1"),
        ({"items": {}}, "items: each teacher marks 1 item a round or more"),
        ({"learner": {"serial": 1}}, "learner.shared is missing"),
        ({"item_size": 0}, "item_size: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, change, said) -> None:
    with pytest.raises(ConfigError) as refused:
        Rates.read(write(tmp_path / "rates.yaml", GOOD | change))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_another_batch_takes_work_in_proportion() -> None:
    found = Rates.model_validate(GOOD).for_config(load("demo", ["batch.item_size=6", "batch.images_per_task=48"]))
    assert found.items == {"compose": 8, "text": 8, "look": 8}
    assert found.seconds == pytest.approx({"rollout": 0.2, "teacher": 0.1})
    assert found.learner.serial == pytest.approx(0.1) and found.learner.shared == pytest.approx(2.4)
    lacking = GOOD | {"seconds": {"rollout": 1.0, "teacher.text": 1.0}}
    with pytest.raises(ConfigError, match=r"seconds\.teacher\.compose is missing"):
        Rates.model_validate(lacking).for_config(load("demo"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", "demo", *map(str, arguments)], catch_exceptions=True)


def test_plan_without_rates_says_how_to_get_them() -> None:
    done = invoke()
    assert done.exit_code == 0 and "learner" in done.output
    assert "--from-run RUN" in " ".join(done.output.split())


def test_plan_with_rates_divides_slots_and_draws_the_curve(tmp_path) -> None:
    file, svg = write(tmp_path / "rates.yaml", GOOD), tmp_path / "curve.svg"
    done = invoke("--rates", file, "--gpus", 12, "--out", svg)
    assert done.exit_code == 0, done.exception
    said = " ".join(done.output.split())
    assert "counts worker slots" in said and "bottleneck:" in said and "cluster.max_staleness=1 would give" in said
    assert svg.read_text().startswith("<svg xmlns=") and svg.read_text().count("<circle") == 5


def test_plan_as_json(tmp_path) -> None:
    done = invoke("--rates", write(tmp_path / "rates.yaml", GOOD), "--gpus", 12, "--json")
    data = json.loads(done.output)
    assert [need["role"] for need in data["memory"]] == ["rollout", "teachers", "learner"]
    split = data["split"]
    assert sum(split["split"]["workers"].values()) == split["split"]["units"] <= 12
    assert [point["total"] for point in split["curve"]] == [4, 8, 12]
    assert set(split["one_more"]) == {"rollout", "teacher", "learner"}
    assert json.loads(invoke("--json").output)["split"] is None


def test_plan_refuses_what_it_cannot_do(tmp_path) -> None:
    file = write(tmp_path / "rates.yaml", GOOD)
    assert "at least 3" in str(invoke("--rates", file, "--gpus", 2).exception)
    assert "give one of them" in str(invoke("--rates", file, "--from-run", tmp_path).exception)
    assert "nothing to divide" in str(invoke("--rates", file, "-o", "cluster.runtime=local").exception)
    assert "ends in .svg" in str(invoke("--rates", file, "--out", tmp_path / "curve.png").exception)
