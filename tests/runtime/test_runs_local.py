"""Whole runs in this process: what is counted, and what a stop leaves."""

import math

import pytest
import torch

from opd_ray.actors import TeacherActor
from opd_ray.algorithms import make_algorithm
from opd_ray.errors import LearnerLostError, NotFiniteError, RunFolderError, Stopped, UserError
from opd_ray.learners.engine import LossScale
from opd_ray.metrics import rows
from opd_ray.models import load_family
from opd_ray.preflight import identity
from opd_ray.run import MAX_REBUILDS
from opd_ray.storage import checkpoint
from opd_ray.storage.run_folder import claim, read_json
from tests.runtime.runs import go, same


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    return go(make_config(), tmp_path_factory.mktemp("whole") / "run")


def test_two_runs_are_one(make_config, whole, tmp_path) -> None:
    again = go(make_config(), tmp_path / "run")
    assert again.result["student_sha256"] == whole.result["student_sha256"]
    assert again.result["ema_sha256"] == whole.result["ema_sha256"]
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in whole.rows]


def test_one_base_for_all_roles_is_the_same_student(make_config, whole, tmp_path, monkeypatch) -> None:
    loads = []
    monkeypatch.setattr(
        "opd_ray.roles.load_family", lambda *args, **kwargs: loads.append(1) or load_family(*args, **kwargs)
    )
    shared = go(make_config(cluster={"share_base": True, "share_teachers": True}), tmp_path / "run")
    assert loads == [1]
    assert shared.result["student_sha256"] == whole.result["student_sha256"]
    assert [row["forwards"] for row in shared.rows] == [row["forwards"] for row in whole.rows]


def test_a_step_that_overflows_publishes_the_same_weights_once_more(make_config, tmp_path, monkeypatch) -> None:
    published = []
    monkeypatch.setattr(LossScale, "start", 2.0**100)

    def watch(run, live) -> None:
        publish = run.learner.publish
        run.learner.publish = lambda: published.append(publish()) or published[-1]

    done = go(make_config(rounds=2, precision="fp16"), tmp_path / "run", watch=watch)
    assert [row["skipped_steps"] for row in done.rows] == [1, 1]
    assert len({weights.sha256 for weights in published}) == 1
    assert [str(weights.version) for weights in published] == ["0.0.0", "0.0.1", "0.0.2"]
    assert len([note for note in done.notes if "the fp16 gradient overflowed" in note]) == 2


def test_another_seed_is_another_student(make_config, whole, tmp_path) -> None:
    other = go(make_config(seed=1), tmp_path / "run")
    assert other.result["student_sha256"] != whole.result["student_sha256"]


def test_no_forward_is_wasted(make_config, whole) -> None:
    """Rows: 4 images of each of 2 tasks in items of 2, 2 trained steps; guidance other than 1 doubles them.

    An item is drawn as far as the last step that it is trained on.
    """
    config = make_config()
    algorithm, drawn = make_algorithm(config), []
    for number in range(3):
        last = [max(algorithm.steps(4, config.seed, number, task, index)) for task in "ab" for index in (0, 1)]
        drawn.append(sum(last) * 2 * 2)
    assert len(set(drawn)) > 1 and max(drawn) < 2 * 4 * 4 * 2
    assert [row["forwards"] for row in whole.rows] == [
        {"rollout": rollout, "teacher": 4 * 2 * 1 + 4 * 2 * 2, "learner": 2 * 4 * 2 * 2} for rollout in drawn
    ]
    assert whole.result["forwards"] == {"rollout": sum(drawn), "teacher": 72, "learner": 96}


@pytest.mark.parametrize("algorithm", [{"steps_per_item": 2}, {"noise_level": 0.5}])
def test_drawings_that_come_in_parts_are_the_same_run(make_config, algorithm, tmp_path) -> None:
    """Also in its counts of forwards."""
    runs = {}
    for chunks in (1, 2, 3):
        labels = []

        def watch(run, live, labels=labels) -> None:
            submit = run.dispatcher.submit
            run.dispatcher.submit = lambda job: labels.append(job.label) or submit(job)

        longer = {"algorithm": {"name": "opd"} | algorithm, "sampling": {"steps": 6}}
        config = make_config(**longer, cluster={"step_chunks": chunks})
        runs[chunks] = go(config, tmp_path / str(chunks), watch=watch), labels
    counts = [len(labels) for _, labels in runs.values()]
    assert counts[0] == 3 * 4 * 2 < counts[1] < counts[2], "rounds, items; a drawing and a mark"
    assert "drawing round 0 a[0]" in runs[1][1]
    for chunks in (2, 3):
        assert any(label.startswith("drawing round 0 a[0], states 0 to ") for label in runs[chunks][1])
        assert same(runs[chunks][0], runs[1][0])


def test_strictly_on_policy_unless_asked_otherwise(whole) -> None:
    assert [row["staleness"] for row in whole.rows] == [0, 0, 0]
    assert [row["weight_version"] for row in whole.rows] == ["0.0.1", "0.0.2", "0.0.3"]


@pytest.mark.parametrize("bound", [1, 2])
def test_staleness_grows_to_its_bound_and_no_further(make_config, bound, tmp_path) -> None:
    seen = []

    def watch(run, live) -> None:
        take, finish_round = run.learner.take, run.learner.finish_round
        lags = set()

        def taking(one) -> None:
            lags.add(run.learner.version.version - one.share().trajectory[0].weights.version)
            take(one)

        def finishing(number) -> None:
            seen.append(list(lags))
            lags.clear()
            finish_round(number)

        run.learner.take, run.learner.finish_round = taking, finishing

    config = make_config(cluster={"max_staleness": bound}, rounds=5)
    done = go(config, tmp_path / "run", watch=watch)
    expected = [min(round, bound) for round in range(5)]
    assert [row["staleness"] for row in done.rows] == expected
    assert seen == [[lag] for lag in expected], "also by what the trajectories themselves say"


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(make_config, whole, tmp_path, every) -> None:
    """Stopped after the first round: with a checkpoint there, whenever the next one is due."""

    def stop(run, live) -> None:
        live.after_round = lambda: setattr(run, "stopping", True)

    config = make_config(checkpoint={"every": every})
    first = go(config, tmp_path / "run", watch=stop)
    assert first.error.exit_code == 3 and len(first.rows) == 1
    assert checkpoint.newest(tmp_path / "run")[0].round == 1
    assert read_json(tmp_path / "run" / "result.json")["status"] == "stopped"
    second = go(config, tmp_path / "run", resume=True)
    assert second.result["student_sha256"] == whole.result["student_sha256"]
    assert second.result["ema_sha256"] == whole.result["ema_sha256"]
    assert [row["loss"] for row in second.rows] == [row["loss"] for row in whole.rows]
    assert second.result["forwards"] == whole.result["forwards"]
    assert second.rows[-1]["weight_version"].startswith("1.")


def test_rows_after_the_last_checkpoint_are_written_again_and_not_twice(make_config, whole, tmp_path) -> None:
    def stop(run, live) -> None:
        def after_round() -> None:
            if run.round == 2:
                raise Stopped("before any checkpoint")

        live.after_round = after_round

    config = make_config(checkpoint={"every": 3})
    assert len(go(config, tmp_path / "run", watch=stop).rows) == 2
    again = go(config, tmp_path / "run", resume=True)
    assert [row["round"] for row in again.rows] == [0, 1, 2]
    assert again.result["student_sha256"] == whole.result["student_sha256"]


def test_resuming_a_run_that_is_done_changes_nothing(make_config, tmp_path) -> None:
    done = go(make_config(rounds=1), tmp_path / "run")
    again = go(make_config(rounds=1), tmp_path / "run", resume=True)
    assert again.result["student_sha256"] == done.result["student_sha256"]
    assert len(again.rows) == 1


@pytest.mark.parametrize("step", ["make_backend", "note_facts"])
def test_a_first_start_that_fails_leaves_the_name_free(make_config, tmp_path, monkeypatch, step) -> None:
    def fail(*arguments) -> None:
        (tmp_path / "run" / "logs").mkdir()  # as a worker that does not come up leaves it
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(f"opd_ray.build.{step}", fail)
        with pytest.raises(UserError, match="no room"):
            go(make_config(rounds=1), tmp_path / "run")
    assert go(make_config(rounds=1), tmp_path / "run").result["status"] == "done"


def test_nan_of_a_teacher_stops_the_run_resumably_and_is_named(make_config, whole, tmp_path, monkeypatch) -> None:
    score = TeacherActor.score

    def broken(self, trajectory, teacher):
        with monkeypatch.context() as patch:
            if (trajectory.item.round, teacher) == (1, "b"):
                patch.setattr(self.families[teacher], "velocity", lambda x, *rest: torch.full_like(x, math.nan))
            return score(self, trajectory, teacher)

    monkeypatch.setattr(TeacherActor, "score", broken)
    stopped = go(make_config(), tmp_path / "run")
    assert isinstance(stopped.error, NotFiniteError) and stopped.error.exit_code == 3
    text = str(stopped.error)
    assert "teacher b" in text and "round 1" in text and ", b'" in text, "teacher, round, prompt"
    assert read_json(tmp_path / "run" / "result.json")["why"] == text
    assert checkpoint.newest(tmp_path / "run")[0].round == 1
    monkeypatch.undo()
    resumed = go(make_config(), tmp_path / "run", resume=True)
    assert resumed.result["student_sha256"] == whole.result["student_sha256"]


def test_a_teacher_that_cannot_be_loaded_is_the_users_error(make_config, tmp_path) -> None:
    teachers = {"a": {"lora": str(tmp_path / "none"), "guidance": 1.0}}
    config = make_config(teachers=teachers | {"b": {"lora": str(tmp_path / "none"), "tasks": ["b"]}})
    with pytest.raises(UserError):
        go(config, tmp_path / "run")


def test_an_old_attempt_adds_no_row_to_what_a_newer_one_has_taken_over(make_config, tmp_path) -> None:
    """It finds out at the end of its round, as after a long sleep, and not only at the next heartbeat."""
    config = make_config()

    def watch(run, live) -> None:
        def taken_over():
            if run.round == 1:
                claim(tmp_path / "run", identity(config), resume=True)

        run.dispatcher.backend.object_store = taken_over  # it is looked at before the row is written

    with pytest.raises(RunFolderError, match="attempt 1 has taken over; attempt 0 ends here"):
        go(config, tmp_path / "run", watch=watch)
    assert [row["round"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0]
    assert checkpoint.newest(tmp_path / "run")[0].round == 1


@pytest.mark.parametrize("losses", [1, MAX_REBUILDS, MAX_REBUILDS + 1])
def test_a_learner_that_is_lost_comes_back_unless_it_is_lost_again_and_again(
    make_config, reference, losses, tmp_path
) -> None:
    """In the third of four rounds, of which the checkpoint holds two; rounds that end start the count again."""
    left = {1: 1, 2: losses}

    def watch(run, live) -> None:
        update = run.learner.update

        def losing(number):
            if left.get(run.round):
                left[run.round] -= 1
                raise LearnerLostError("update: learner rank 0 was lost")
            return update(number)

        run.learner.update = losing

    config = make_config(rounds=4, checkpoint={"every": 2})
    done = go(config, tmp_path / "run", watch=watch)
    if losses <= MAX_REBUILDS:
        assert not done.error and same(done, reference(4))
    else:
        assert done.error.exit_code == 3 and "lost; --resume goes on" in str(done.error)
        assert [row["round"] for row in done.rows] == [0, 1]
        done = go(config, tmp_path / "run", resume=True)
        assert same(done, reference(4))
    assert [row["round"] for row in done.rows] == [0, 1, 2, 3]


def test_a_role_without_a_worker_is_in_the_status(make_config, tmp_path) -> None:
    seen = []

    def watch(run, live) -> None:
        for paused in (("teacher.a", 5.0, "its last worker is gone"), None):
            run.dispatcher.paused = lambda paused=paused: paused
            run.status()
            seen.append(read_json(tmp_path / "run" / "status.json"))

    go(make_config(rounds=1), tmp_path / "run", watch=watch)
    waiting = seen[0]["waiting"]
    assert (waiting["for"], waiting["why"]) == ("teacher.a", "its last worker is gone")
    assert waiting["since"] == pytest.approx(seen[0]["time"] - 5.0, abs=1)
    assert seen[1]["waiting"] is None
