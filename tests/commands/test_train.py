"""`train` from its start to every kind of end, and on from there."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_ray.actors import TeacherActor
from opd_ray.digest import digest
from opd_ray.learners import Learner
from opd_ray.run import Run

ROUNDS = 4
SETTINGS = ("-o", f"rounds={ROUNDS}", "-o", "checkpoint.every=2", "-o", "evaluation.images_per_task=0", "--json")
GO_ON = "go on from the last checkpoint with --resume"


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(cli, recipe, whole_folder):
    """The result of a run that nobody disturbed."""
    done = cli("train", recipe(), "--out", whole_folder, *SETTINGS)
    return json.loads(done.out)


@pytest.fixture
def run(cli, recipe, tmp_path):
    """`train` into one folder, as often as it takes."""
    path = recipe()
    return lambda *args: cli("train", path, "--out", tmp_path, *SETTINGS, *args)


def told(folder: Path, name: str):
    return json.loads((folder / "small" / name).read_text())


def same(done, whole) -> bool:
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["forwards"] == whole["forwards"] and result["rounds"] == ROUNDS
    return [result[key] for key in ("student_sha256", "ema_sha256")] == [
        whole[key] for key in ("student_sha256", "ema_sha256")
    ]


def in_round(monkeypatch, number, act):
    """Do something before an update of this round (0-based)."""
    update = Learner.update

    def acting(self, *args):
        if self.updates == number:
            act()
        return update(self, *args)

    monkeypatch.setattr(Learner, "update", acting)


def test_what_others_print_is_not_in_the_result(run, monkeypatch):
    in_round(monkeypatch, 1, lambda: sys.stdout.write("a worker died\n"))
    done = run("-o", "rounds=2")
    assert json.loads(done.out)["status"] == "done" and "a worker died" in done.err


def test_a_broken_reward_shows_before_the_first_round(cli, recipe, tmp_path):
    reward = "tests.commands.scoring:total"
    keys = {"rewards": {key: [reward] for key in ("a", "b", "mixed")}}
    unproven = cli("train", recipe(rewards={reward: {}}, evaluation=keys), "--out", tmp_path)
    assert unproven.code == 2 and f"rewards.{reward}: it has no probes() that show that it works" in unproven.err
    path = recipe(rewards={reward: {"probe": "finite"}}, evaluation=keys)
    done = cli("train", path, "--out", tmp_path)
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1] == (
        f"error: reward {reward} answered shape [] on its probe picture; "
        "expected a number for each picture (shape [1]); mend it, or take it out"
    )
    assert not (tmp_path / "small" / "metrics.jsonl").exists()
    done = cli("train", recipe(), "--out", tmp_path)
    assert done.code == 0 and "rewards are not used" not in done.err, "its name is free"


def test_rewards_that_nobody_asks_are_said_to_be_idle(run):
    assert "rewards are not used: there is nothing to score without prompts.eval" in run("-o", "rounds=1").err


def test_a_signal_ends_the_round_and_leaves_a_checkpoint(run, whole, monkeypatch, tmp_path):
    in_round(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = run()
    assert done.code == 3 and done.out == ""
    assert "stopping after this round, with a checkpoint; once more stops at once" in done.err
    assert done.err.splitlines()[-1] == f"stopped: stopped after round 3 of {ROUNDS}; --resume goes on from there"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "small" / "checkpoints" / "step-000003").is_dir()
    result, status = told(tmp_path, "result.json"), told(tmp_path, "status.json")
    assert result["status"] == status["status"] == "stopped" and result["rounds"] == status["round"] == 3
    assert result["forwards"]["rollout"] == 3 * whole["forwards"]["rollout"] / ROUNDS
    monkeypatch.undo()
    again = run("--resume")
    assert same(again, whole) and f"going on after round 3 of {ROUNDS}" in again.err
    assert told(tmp_path, "result.json")["status"] == "done"


def test_the_second_signal_stops_at_once(run, whole, monkeypatch, tmp_path):
    in_round(monkeypatch, 3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    done = run()
    assert done.code == 3 and done.err.splitlines()[-1] == f"stopped: interrupted; {GO_ON}"
    assert told(tmp_path, "status.json")["status"] == "stopped"
    monkeypatch.undo()
    again = run("--resume")
    assert same(again, whole) and f"going on after round 2 of {ROUNDS}" in again.err


def test_a_job_of_ray_gives_its_round_up_shortly_before_it_would_be_killed(run, whole, monkeypatch, tmp_path):
    def act():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)  # deadlines are seen once a second

    for name, value in {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_JOB_STOP_WAIT_TIME_S": "3"}.items():
        monkeypatch.setenv(name, value)
    in_round(monkeypatch, 3, act)
    done = run()
    assert done.code == 3
    said = "stopped at once, since Ray waits no longer; --resume goes on from the last checkpoint"
    assert done.err.splitlines()[-1] == f"stopped: {said}" and told(tmp_path, "result.json")["why"] == said
    assert told(tmp_path, "status.json")["status"] == told(tmp_path, "result.json")["status"] == "stopped"
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    again = run("--resume")
    assert again.code == 3 and "stopped after the last of 4 rounds" in again.err
    monkeypatch.undo()
    assert same(run("--resume"), whole)


@pytest.mark.parametrize("address", ["s3://bucket/runs", "gs://bucket", "hdfs://name/runs"])
def test_an_address_as_a_run_folder_is_refused_with_what_to_do(cli, recipe, no_start, address, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = cli("train", recipe(), "--out", address)
    assert done.code == 2
    assert f"{address.partition('://')[0]}:// is an address" in done.error and "mount it as a file system" in done.error
    assert not [path for path in tmp_path.rglob("*") if path.name in {"bucket", "name"}]


def test_a_run_folder_in_rays_copy_of_the_working_directory_is_refused(cli, recipe, no_start, monkeypatch, tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    done = cli("train", recipe())
    assert "runs/small lies in Ray's own copy" in done.error and "--out /shared/runs" in done.error
    assert not list(copy.iterdir())


def test_a_signal_in_the_last_round_leaves_the_evaluation_to_the_next_attempt(run, whole, monkeypatch, tmp_path):
    in_round(monkeypatch, ROUNDS - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = run()
    assert done.code == 3 and "stopped after the last of 4 rounds; --resume evaluates" in done.err
    monkeypatch.undo()
    assert same(run("--resume"), whole)


def test_a_signal_before_and_after_the_rounds_stops_at_once(run, whole, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    for where, more in (("opd_ray.build.make_backend", []), ("opd_ray.run.Run.result", ["--resume"])):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupted)
            done = run(*more)
            assert done.code == 3 and done.err.splitlines()[-1] == f"stopped: interrupted; {GO_ON}"
    assert same(run("--resume"), whole)


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.verify)])
def test_a_process_that_is_ended_from_outside_goes_on_bit_identically(run, recipe, whole, tmp_path, kind):
    rounds = tmp_path / "small" / "metrics.jsonl"
    script = "import sys; from opd_ray.cli import main; sys.argv[0] = 'opd-ray'; main()"
    # More rounds than it gets to: where it is stopped does not matter.
    args = ["train", recipe(), "--out", tmp_path, *SETTINGS, "-o", "rounds=100"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (rounds.exists() and rounds.read_bytes().count(b"\n") >= 1) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    reached = rounds.read_bytes().count(b"\n")
    assert 0 < reached < ROUNDS, err
    assert out == "" and "Traceback" not in err
    assert process.returncode == (3 if kind == signal.SIGINT else -signal.SIGKILL)
    assert told(tmp_path, "status.json")["status"] == ("stopped" if kind == signal.SIGINT else "running")
    assert same(run("--resume"), whole)


def test_a_teachers_nan_stops_the_run_with_nothing_lost(run, whole, monkeypatch, tmp_path):
    score, save, saved = TeacherActor.score, Run.save, []

    def saving(self):
        save(self)
        saved.append(self.round)

    def broken(self, trajectory, teacher):
        with monkeypatch.context() as patch:
            if (trajectory.item.round, teacher) == (3, "b"):
                patch.setattr(self.families[teacher], "velocity", lambda x, *rest: torch.full_like(x, math.nan))
            return score(self, trajectory, teacher)

    monkeypatch.setattr(TeacherActor, "score", broken)
    monkeypatch.setattr(Run, "save", saving)
    done = run()
    assert done.code == 3 and "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("stopped: teacher b answered NaN or infinity in round 3 for 2 prompts, first 'train ")
    assert "check the teacher's weights and precision, then go on with --resume" in line
    assert saved == [2, 3], "the last whole round is saved, and waited for"
    assert (tmp_path / "small" / "checkpoints" / "step-000003").is_dir()
    monkeypatch.undo()
    again = run("--resume")
    assert same(again, whole) and f"going on after round 3 of {ROUNDS}" in again.err


def test_a_run_that_fails_says_so(run, whole, monkeypatch, tmp_path):
    def fail():
        raise ZeroDivisionError("of a plugin")

    in_round(monkeypatch, 3, fail)
    with pytest.raises(ZeroDivisionError):  # with its traceback, and exit code 1 from the interpreter
        run()
    result = told(tmp_path, "result.json")
    assert result["status"] == told(tmp_path, "status.json")["status"] == "failed"
    assert result["why"] == "ZeroDivisionError: of a plugin"
    monkeypatch.undo()
    assert same(run("--resume"), whole)


def test_a_damaged_checkpoint_is_skipped_with_a_note(run, whole, tmp_path):
    assert run().code == 0
    damaged = tmp_path / "small" / "checkpoints" / "step-000004" / "student.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = run("--resume")
    assert "checkpoints/step-000004 is damaged and was skipped: student.safetensors has " in again.err
    assert f"going on after round 2 of {ROUNDS}" in again.err
    assert same(again, whole)


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_full_disk_stops_the_run_resumably(run, whole, small_disk, monkeypatch, tmp_path, left):
    """Nothing at all can be written any more, or all but a checkpoint."""
    disk = small_disk(tmp_path / "small", 8 * 2**20)
    in_round(monkeypatch, 3, lambda: disk.fill(left))
    done = run()
    assert done.code == 3 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith(f"stopped: {tmp_path}/small/") and last.endswith("then go on with --resume")
    assert " cannot be written (No space left on device)" in last
    assert ("checkpoints/step-000004: " in last and " MB needed, 0.0 MB free; the last good" in last) or not left
    assert told(tmp_path, "status.json")["status"] == "stopped"
    assert sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir()) == ["step-000002"]
    monkeypatch.undo()
    again = run("--resume")
    assert again.code == 3 and again.err.splitlines()[-1].startswith("stopped: "), "it is as full as before"
    disk.enlarge(16 * 2**20)
    again = run("--resume")
    assert same(again, whole) and f"going on after round 2 of {ROUNDS}" in again.err


def test_a_checkpoint_of_a_later_release_is_not_skipped(run, tmp_path):
    assert run().code == 0
    path = tmp_path / "small" / "checkpoints" / "step-000004"
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 7'))
    again = run("--resume")
    assert again.code == 2 and "Traceback" not in again.err
    assert again.err.splitlines()[-1].startswith(
        f"error: {path} is of format 7, and this opd-ray reads up to format 1; "
    )


def test_resume_where_nothing_is_yet(run, whole):
    done = run("--resume")
    assert same(done, whole) and "no checkpoint to resume from: starting at round 0" in done.err


def test_what_a_resumed_run_may_change(run, tmp_path):
    assert run("-o", "rounds=1").code == 0
    before = (tmp_path / "small" / "run.json").read_bytes()
    for change, expected in [
        ("optimizer.lr=0.5", "optimizer.lr was 0.01, now 0.5"),
        ("student.guidance=1", "student.guidance was 2.0, now 1.0"),
        ("teachers.a.guidance=2", "teachers.a.guidance was 1.0, now 2.0"),
        ("seed=1", "seed was 0, now 1"),
        ("--seed 2", "seed was 0, now 2"),
        ("ema=null", "ema was absent, now null"),
    ]:
        error = run("--resume", *(change.split() if change.startswith("--") else ("-o", change))).error
        assert error.startswith(f"{tmp_path / 'small'} belongs to another run: ") and expected in error
        assert error.endswith("Choose another name, start it as it was, or add --force where the weights still fit")
    assert (tmp_path / "small" / "run.json").read_bytes() == before, "a refusal changes nothing"
    allowed = ("rounds=2", "checkpoint.keep=1", "cluster.share_teachers=true", "cluster.rollout.workers=2")
    done = run("--resume", *(part for change in allowed for part in ("-o", change)))
    assert done.code == 0 and json.loads(done.out)["rounds"] == 2
    lines = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]


def test_a_resumed_run_finds_what_it_was_trained_with_wherever_it_lies(cli, recipe, files, tiny_teachers, tmp_path):
    a, b, prompts = tmp_path / "a", tmp_path / "b", tmp_path / "p.jsonl"
    shutil.copytree(tiny_teachers["a"], a)
    shutil.copy(files / "train.jsonl", prompts)
    link = tmp_path / "link"
    link.symlink_to(a)
    teachers = {"a": {"lora": str(link), "guidance": 1.0}, "b": {"lora": str(tiny_teachers["b"]), "guidance": 3.0}}
    path = recipe(teachers=teachers, prompts={"train": str(prompts)}, rewards={}, evaluation=None)

    def run(rounds, *args):
        return cli("train", path, "--out", tmp_path, *SETTINGS, "-o", f"rounds={rounds}", *args)

    assert run(1).code == 0
    a.rename(b)
    link.unlink()
    link.symlink_to(b)
    assert run(2, "--resume").code == 0, "moved, and the same"
    link.unlink()
    link.symlink_to(tiny_teachers["b"])
    refused = run(3, "--resume")
    assert refused.code == 2 and refused.out == ""
    line = refused.err.splitlines()[-1]
    assert "the file of teacher 'a' are not those of round 2; put them back, start another run, or add --force" in line
    link.unlink()
    link.symlink_to(b)
    prompts.write_text(prompts.read_text().replace("red cat", "red cow", 1))
    line = run(3, "--resume").err.splitlines()[-1]
    assert "the prompts of 'a' are not those of round 2; put them back" in line
    shutil.copy(files / "train.jsonl", prompts)
    assert json.loads(run(3, "--resume").out)["rounds"] == 3


def test_what_is_saved_is_the_average(whole, whole_folder):
    saved = load_file(whole_folder / "small" / "lora" / "pytorch_lora_weights.safetensors")
    assert digest({name.removeprefix("transformer."): tensor for name, tensor in saved.items()}) == whole["ema_sha256"]
    assert whole["ema_sha256"] != whole["student_sha256"]


def test_a_finished_run_can_be_scored_later(cli, recipe, files, tmp_path):
    bare, full = recipe(rewards={}, evaluation=None, prompts={"train": str(files / "train.jsonl")}), recipe()
    first = json.loads(cli("train", bare, "--out", tmp_path, "--json", "--seed", "0").out)
    assert first["scores"] == {}
    scored = json.loads(cli("train", full, "--out", tmp_path, "--json", "--seed", "0", "--resume").out)
    assert list(scored["scores"]) == ["base", "teacher:a", "teacher:b", "student"]
    assert scored["student_sha256"] == first["student_sha256"]


def test_an_average_that_was_never_taken_is_said(run):
    done = run("-o", "rounds=1", "-o", "ema.every=2")
    assert "no average was taken in 1 optimizer steps, since ema.every is 2: lora/ holds the last weights" in done.err
    told = json.loads(done.out)
    assert told["ema_sha256"] == told["student_sha256"]


def test_an_older_attempt_leaves_the_folder_to_the_newer_one(run, monkeypatch, tmp_path):
    def take_over():
        path = tmp_path / "small" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attempt": 7}))

    in_round(monkeypatch, 1, take_over)
    done = run()
    assert done.code == 2 and "attempt 7 has taken over; attempt 0" in done.err
    assert not (tmp_path / "small" / "result.json").exists()


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_room_for(cli, run, recipe, ray_session, tmp_path):
    path = recipe(cluster={"runtime": "ray", "rollout": {"workers": 99}, "teachers": {"default": {"workers": 2}}})
    done = cli("train", path, "--out", tmp_path, *SETTINGS)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("error: no room for 104 workers: asked {CPU: 104}; ") and "per node {CPU: " in line
    assert "missing {CPU: " in line and "Lower workers or their cpu, gpu, resources in the cluster file" in line
    assert run("--resume", "-o", "rounds=1").code == 0, "the folder is not lost"


def test_force_goes_on_with_another_method_as_far_as_the_weights_fit(run, tmp_path):
    assert run("-o", "rounds=2").code == 0
    refused = run("--resume", "-o", "optimizer.lr=0.5")
    assert refused.code == 2 and "optimizer.lr" in refused.err and "--force" in refused.err
    assert run("--resume", "--force", "-o", "optimizer.lr=0.5", "-o", "rounds=3").code == 0
    assert told(tmp_path, "result.json")["rounds"] == 3
    fits_not = run("--resume", "--force", "-o", "student.lora.rank=2", "-o", "rounds=4")
    assert fits_not.code == 2 and "student.lora.rank" in fits_not.err
    assert run("--force").code == 2
