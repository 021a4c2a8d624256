"""Specialists and the student that they teach, in one job: each stage a run that stays, whatever happens to another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_ray.commands.stages import Driver
from opd_ray.errors import ConfigError, UserError
from opd_ray.learners import Learner
from opd_ray.metrics import rows
from opd_ray.recipes import load, specialist
from opd_ray.report.table import stages_table
from opd_ray.stages import stages, workers
from tests.runtime.runs import alive, bare_environment, descendants

PATIENT = "tests.commands.scoring:patient"
STAGES = ("a", "b", "student")


@pytest.fixture(scope="module")
def job(recipe, files, tmp_path_factory):
    """Write a job of two specialists, of which each learns from how bright its drawings are, and their student.

    ``rl`` has other sections of the specialists' recipe, ``changes`` of the job's.
    """

    prompts = tmp_path_factory.mktemp("prompts")
    for task in "ab":
        (prompts / f"{task}.txt").write_text(f"red cat {task}\ntwo dogs {task}\n")

    def write(rl=None, **changes):
        folder = tmp_path_factory.mktemp("job")
        settings = {
            "name": None,
            "rounds": 4,
            "student": {"guidance": 1.0, "lora": {"rank": 4, "alpha": 8}},
            "algorithm": {"name": "diffusion_nft"},
            "batch": {"images_per_task": 4, "item_size": 4, "images_per_prompt": 2},
            "teachers": None,
            "rewards": {PATIENT: {}},
            "prompts": {"train": {"a": str(prompts / "a.txt")}},
            "evaluation": None,
            "checkpoint": {"every": 1},
            "cluster": {"runtime": "ray", "rollout": {"workers": 7}},  # of no account: the job's is
        }
        shutil.copy(recipe(**settings | (rl or {})), folder / "reward.yaml")
        roles = {role: {"resources": {"cpu": 0.1}} for role in ("rollout", "learner")}
        roles |= {role: {"default": {"resources": {"cpu": 0.1}}} for role in ("teachers", "rewards")}
        teaching = {
            "specialists": {
                "a": {"recipe": "reward.yaml"},
                "b": {"recipe": "reward.yaml", "set": {"prompts.train": {"b": str(prompts / "b.txt")}}},
            },
            "teachers": {name: {"lora": f"specialists/{name}", "guidance": 1.0} for name in "ab"},
            "rewards": None,
            "prompts": {"train": str(files / "train.jsonl")},
            "evaluation": {"images_per_task": 0},
            "checkpoint": {"every": 1},
            "cluster": roles | {"runtime": "local", "share_teachers": True},
        }
        shutil.copy(recipe(**teaching | changes), folder / "job.yaml")
        return folder / "job.yaml"

    return write


@pytest.fixture(scope="module")
def whole(cli, job, tmp_path_factory):
    """A job that nobody disturbed, in this process: its folder, its result, and what it said."""
    out = tmp_path_factory.mktemp("whole")
    done = cli("train", job(), "--out", out, "--json")
    assert done.code == 0, done.err
    return out / "small", json.loads(done.out), done.err


def told(folder, name="result.json"):
    return json.loads((folder / name).read_text())


def same(folder, whole) -> bool:
    """Every stage ended with the weights that it has in an undisturbed job."""
    found = [told(folder / stage) for stage in STAGES]
    assert [result["status"] for result in found] == ["done"] * 3
    return [result["student_sha256"] for result in found] == [
        told(whole[0] / stage)["student_sha256"] for stage in STAGES
    ]


def test_each_stage_is_a_run_of_its_own_and_the_student_learns_from_what_the_others_left(whole):
    folder, result, said = whole
    assert result["student_sha256"] == told(folder / "student")["student_sha256"]
    assert len({told(folder / stage)["student_sha256"] for stage in STAGES}) == 3
    for stage in STAGES:
        assert (folder / stage / "report.html").is_file() and (folder / stage / "checkpoints").is_dir()
    used = told(folder / "student", "run.json")["teachers"]
    assert {name: facts["path"] for name, facts in used.items()} == {
        name: str(folder / name / "lora" / "pytorch_lora_weights.safetensors") for name in "ab"
    }
    assert [line for line in said.splitlines() if line.endswith(" begins")] == [
        "specialist a begins",
        "specialist b begins",
        "student begins",
    ]


def test_what_each_stage_took_is_told(whole):
    folder, result, _ = whole
    took = result["stages"]
    assert told(folder, "stages.json") == {"stages": list(STAGES), "took": took}
    assert [took[name]["images"] for name in ("a", "b", "student")] == [4 * 4, 4 * 4, 2 * 2 * 2]
    seconds = {name: sum(row["seconds"]["round"] for row in rows(folder / name / "metrics.jsonl")) for name in STAGES}
    assert {name: took[name]["seconds"] for name in STAGES} == pytest.approx(seconds)
    serial, parallel = took["one after the other"], took["at the same time"]
    assert serial["seconds"] == pytest.approx(seconds["a"] + seconds["b"])
    assert parallel["seconds"] == pytest.approx(max(seconds["a"], seconds["b"]))
    assert serial["core_seconds"] == parallel["core_seconds"] == took["a"]["core_seconds"] + took["b"]["core_seconds"]
    assert 0 < took["a"]["core_seconds"] <= seconds["a"], "one thread, one worker at a time"
    assert stages_table(took).row_count == 5


def test_status_shows_each_stage(cli, whole, tmp_path):
    folder, *_ = whole
    heads = [line for line in cli("status", folder).out.splitlines() if " rounds done" in line]
    assert [head.split(",")[:2] for head in heads] == [
        ["a: done", " 4 of 4 rounds done"],
        ["b: done", " 4 of 4 rounds done"],
        ["student: done", " 2 of 2 rounds done"],
    ]
    assert list(json.loads(cli("status", folder, "--json").out)) == list(STAGES)
    assert cli("status", folder, "--watch").code == 0, "it has ended"
    assert "not a run folder" in cli("status", folder.parent).error


def test_a_finished_specialist_is_used_again_and_never_trained_again(cli, job, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "student")
    before = {name: (tmp_path / "small" / name / "lora").stat().st_mtime_ns for name in "ab"}
    run = lambda *args: cli("train", job(), "--out", tmp_path, *args)  # noqa: E731
    done = run()
    assert done.code == 0 and same(tmp_path / "small", whole)
    assert f"specialist a: trained already, in {tmp_path}/small/a" in done.err and "specialist a begins" not in done.err
    assert {name: (tmp_path / "small" / name / "lora").stat().st_mtime_ns for name in "ab"} == before
    assert [told(tmp_path / "small" / name, "run.json")["attempt"] for name in "ab"] == [0, 0]
    assert "come to its end already" in run().error
    (tmp_path / "other.txt").write_text("red cat b\nthree dogs b\n")
    for change, said in {
        f"prompts.train={{b: {tmp_path}/other.txt}}": "has come to its end, trained otherwise: prompts of b are others",
        "rounds=2": "has 4 rounds, and 2 are asked for",
        "optimizer.lr=0.5": "has come to its end, trained otherwise: optimizer.lr was 0.01, now 0.5. Give the job",
    }.items():
        refused = run("--resume", "--force", "-o", f"specialists.b.set.{change}").error
        assert refused.startswith(f"specialist b: {tmp_path}/small/b ") and said in refused


def test_a_job_that_was_moved_goes_on_with_force(cli, job, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "small")
    run = lambda *args: cli("train", job(), "--out", tmp_path, "--resume", *args)  # noqa: E731
    assert f'trained otherwise: teachers.a.lora was "{whole[0]}/a", now "{tmp_path}/small/a"' in run().error
    done = run("--force")
    assert done.code == 0 and same(tmp_path / "small", whole), done.err


def test_a_signal_in_the_first_stage_stops_the_job_and_resume_goes_on(cli, job, whole, monkeypatch, tmp_path):
    update = Learner.update

    def act(self, *args):
        if self.updates == 1 and (tmp_path / "small" / "b").is_dir():
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)

    monkeypatch.setattr(Learner, "update", act)
    done = cli("train", job(), "--out", tmp_path)
    assert done.code == 3
    assert done.err.splitlines()[-1] == (
        "stopped: specialist b: stopped after round 2 of 4; --resume goes on from there"
    )
    assert [told(tmp_path / "small" / name)["status"] for name in "ab"] == ["done", "stopped"]
    assert not (tmp_path / "small" / "student").exists()
    monkeypatch.undo()
    again = cli("train", job(), "--out", tmp_path)
    assert "specialist b: " in again.error and "was begun already; go on with --resume" in again.error
    again = cli("train", job(), "--out", tmp_path, "--resume")
    assert again.code == 0 and "going on after round 2 of 4" in again.err and same(tmp_path / "small", whole)


REFUSED = [
    ({"specialists.a.recipe": "gone"}, "specialists.a.recipe: no recipe 'gone'; known: "),
    ({"specialists.a.recipe": "job.yaml"}, "specialists.a: its recipe has specialists of its own"),
    ({"specialists.a.set.name": "x"}, "specialists.a.set: name is the same for all stages; take it out"),
    ({"specialists.a.set.rounds.many": 1}, "specialists.a.set.rounds.many: rounds is a value, not a section"),
    ({"specialists.a.set.rouns": 1}, "specialists.a (", "unknown key 'rouns' (did you mean 'rounds'?)"),
    ({"specialists.a.set.batch.item_size": 3}, "specialists.a (", "batch.item_size 3 does not divide batch.images"),
    ({"specialists.a.set.student.lora": None}, "specialists.a: student.lora null trains the denoiser itself"),
    ({"specialists.a.set.model.path": "world"}, "specialists.a: model.path is world, and the student's "),
    ({"specialists.a.set.cluster.runtime": "ray"}, "cluster.runtime is the same for all stages"),
    ({"specialists.a.set.cluster.rewards.look.workers": 2}, "cluster.rewards.look: no such reward; known: tests.com"),
    ({"specialists.c.recipe": "world_nft"}, "specialists.c teaches nobody; give a teacher lora: specialists/c"),
    ({"specialists.student.recipe": "world_nft"}, "specialist name 'student' is not free: it names a run folder"),
    ({"teachers.a.lora": "specialists/c"}, "teachers.a.lora specialists/c: no such specialist; known: a, b"),
]


@pytest.mark.parametrize(("given", "said"), [(given, said) for given, *said in REFUSED], ids=lambda x: str(x)[:40])
def test_a_stage_that_cannot_run_is_refused_in_one_line(job, given, said):
    ((key, value),) = given.items()
    with pytest.raises(ConfigError) as caught:
        load(str(job()), [f"{key}={json.dumps(value)}"])
    assert all(part in str(caught.value) for part in said) and "\n" not in str(caught.value)


def test_a_specialist_has_the_seed_and_the_cluster_of_the_job(job):
    config = load(str(job()), ["seed=5", "cluster.rollout.threads=2", "specialists.b.set.cluster.rollout.workers=3"])
    made = {name: specialist(config, name) for name in "ab"}
    assert {one.seed for one in made.values()} == {5} and [one.name for one in made.values()] == ["a", "b"]
    assert {one.cluster.rollout.threads for one in made.values()} == {2}
    assert [one.cluster.rollout.workers for one in made.values()] == [1, 3]
    assert [list(one.prompts.train) for one in made.values()] == [["a"], ["b"]]


def test_what_only_its_files_show_is_refused_before_anything_starts(cli, job, no_start, tmp_path):
    broken = cli("train", job(), "--out", tmp_path, "-o", "specialists.b.set.prompts.train={b: gone.txt}")
    assert broken.error.startswith("specialist b: ") and "gone.txt" in broken.error
    assert not list(tmp_path.iterdir())
    student = cli("train", job(), "--out", tmp_path, "-o", "student.lora.targets=[nope]")
    assert student.error == "student: LoRA 'student': targets nope match no linear layer" or "nope" in student.error


def test_a_driver_that_is_refused_is_named_with_its_own_words(job, tmp_path):
    first, _ = stages(load(str(job())), tmp_path)
    driver = Driver(first[1], ["--resume"], "127.0.0.1:1")
    driver.process.wait(timeout=120)
    driver.end()
    error = driver.error()
    assert isinstance(error, UserError)
    assert str(error) == f"specialist b: {tmp_path}/b.yaml: no such file"


@pytest.mark.ray
def test_specialists_that_do_not_fit_together_are_refused_before_anything_starts(cli, job, ray_session, tmp_path):
    done = cli("train", job(), "--out", tmp_path, "-o", "cluster.runtime=ray", "-o", "cluster.rollout.resources.cpu=99")
    assert done.code == 2 and not list(tmp_path.iterdir())
    line = done.err.splitlines()[-1]
    assert line.startswith("error: specialist a and specialist b at the same time: no room for 6 workers: asked {CPU: ")
    assert "missing {CPU: 198}" in line


class Job:
    """`opd-ray train` on a Ray of its own, in a process of its own; its specialists wait for each other."""

    def __init__(self, path, out, *flags):
        script = "import sys; from opd_ray.cli import main; sys.argv[0] = 'opd-ray'; main()"
        args = ["train", str(path), "--out", str(out), "-o", "cluster.runtime=ray", *flags]
        self.folder, self.said, self.hold = out / "small", out / "said.txt", out / "hold"
        self.hold.touch()
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script, *args],
                stdout=file,
                stderr=file,
                env=bare_environment() | {"HOLD": str(self.hold)},
            )

    def release(self):
        """Let the first round end, once both specialists are in theirs."""
        until(self, lambda: all((self.folder / name / "status.json").exists() for name in "ab"))
        self.hold.unlink()

    def driver(self, name):
        """The process of one stage."""
        for pid in descendants(self.process.pid):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if str(self.folder / f"{name}.yaml").encode() in file.read().split(b"\0"):
                    return pid
        raise AssertionError(f"no driver of {name}")

    def rounds(self):
        """How many each specialist has finished."""
        return [len(list(rows(self.folder / name / "metrics.jsonl"))) for name in "ab"]

    def end(self):
        """Its exit code and what it said."""
        return self.process.wait(timeout=280), self.said.read_text()


def until(job, true):
    """Wait for something, while the job lives."""
    deadline = time.monotonic() + 250
    while not true():
        assert job.process.poll() is None and time.monotonic() < deadline, job.said.read_text()
        time.sleep(0.02)


@pytest.mark.ray
def test_specialists_train_at_the_same_time_and_give_the_same_student(job, whole, tmp_path):
    run = Job(job(), tmp_path)
    run.release()
    code, said = run.end()
    assert code == 0, said
    assert same(run.folder, whole)
    spans = []
    for name in "ab":
        told = list(rows(run.folder / name / "metrics.jsonl"))
        spans.append((told[0]["time"] - told[0]["seconds"]["round"], told[-1]["time"]))
    assert max(start for start, _ in spans) < min(end for _, end in spans), "in their rounds at the same time"
    for name in STAGES:
        assert f"{name} | round 4/4 | " in said if name != "student" else "student | round 2/2 | " in said


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.parametrize("what", ["interrupt", "driver", "job"])
def test_whatever_ends_in_the_first_stage_resume_gives_the_same_student(job, whole, tmp_path, what):
    # More rounds than they get to: where they are stopped does not matter.
    more = [part for name in "ab" for part in ("-o", f"specialists.{name}.set.rounds=100")]
    run = Job(job(), tmp_path, *more)
    run.release()
    until(run, lambda: all(run.rounds()))
    below, b = descendants(run.process.pid), run.driver("b")
    os.kill(b if what == "driver" else run.process.pid, signal.SIGINT if what == "interrupt" else signal.SIGKILL)
    code, said = run.end()
    assert not alive(below, within_s=90), "nothing of it stays"
    done, last = run.rounds(), said.splitlines()[-1]
    assert 1 <= max(done) < 4, "otherwise this says nothing"
    if what == "interrupt":
        told = f"specialist a after round {done[0]} of 100, specialist b after round {done[1]} of 100"
        assert (code, last) == (3, f"stopped: {told}; --resume goes on from there")
    elif what == "driver":
        said = "specialist b: its driver was ended by SIGKILL; --resume goes on from the last checkpoints"
        assert (code, last) == (3, f"stopped: {said}")
        assert json.loads((run.folder / "a" / "result.json").read_text())["status"] == "stopped"
    else:
        assert code == -signal.SIGKILL
    again = Job(job(), tmp_path, "--resume")
    again.hold.unlink()
    code, said = again.end()
    assert code == 0 and same(run.folder, whole), said


def test_the_shipped_job_fits_two_cores():
    """Each part of it at the same time, as its cluster file places it."""
    first, student = stages(load("world_two_stages"), Path("runs"))
    asked = [
        sum(spec.resources["cpu"] for stage in part for spec in workers(stage.config)) for part in (first, [student])
    ]
    assert asked == pytest.approx([3 * (0.25 + 0.25 + 0.1), 5 * 0.25]) and max(asked) <= 2
