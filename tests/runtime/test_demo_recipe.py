"""The demo's own recipe, by its own command: the same student wherever the work is done and whoever dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_ray.metrics import rows
from opd_ray.storage.run_folder import read_json
from tests.runtime.runs import alive, bare_environment, descendants

pytestmark = [pytest.mark.verify, pytest.mark.timeout(1800)]
ROUNDS = 6
RECIPE = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SHORT = [f"rounds={ROUNDS}", "checkpoint.every=2", "evaluation.images_per_task=0"]
VARIANTS = {
    "one rollout worker, own teacher workers": ["cluster.rollout.workers=1", "cluster.share_teachers=false"],
    "one process": ["cluster.runtime=local"],
}


def start(out: Path, *overrides: str, resume: bool = False) -> subprocess.Popen[str]:
    options = [part for override in [*SHORT, *overrides] for part in ("-o", override)]
    command = [Path(sys.executable).with_name("opd-ray"), "train", str(RECIPE), "--out", str(out), *options]
    return subprocess.Popen(
        [*command, "--resume"] if resume else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=bare_environment(),
    )


def finish(process: subprocess.Popen[str], out: Path) -> tuple[str, str]:
    """The student's hash, and what was said on the way."""
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return read_json(out / "demo" / "result.json")["student_sha256"], errors


def rounds_done(out: Path) -> int:
    path = out / "demo" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(process: subprocess.Popen[str], out: Path, rounds: int) -> None:
    while rounds_done(out) < rounds:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def marking(driver: int) -> list[int]:
    """Teacher workers that are at work now, by the title that Ray gives a process."""
    found = []
    for pid in descendants(driver):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::teacher"):
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    """The hash of the undisturbed run: two rollout workers, one worker for all teachers."""
    out = tmp_path_factory.mktemp("undisturbed")
    return finish(start(out), out)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_place_of_the_work_changes_no_bit(variant, expected, tmp_path) -> None:
    assert finish(start(tmp_path, *VARIANTS[variant]), tmp_path)[0] == expected


def test_a_run_killed_outright_resumes_to_the_same_student(expected, tmp_path) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path, 3)  # past the checkpoint of round 2: one round is done again
    everybody = [process.pid, *descendants(process.pid)]
    process.kill()
    process.communicate()
    left = alive(everybody, within_s=120)  # Ray's two agents look for their raylet about once a minute
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "Ray's processes end with the run that started them"
    assert not (tmp_path / "demo" / "result.json").exists()
    assert finish(start(tmp_path, resume=True), tmp_path)[0] == expected


def test_a_killed_teacher_worker_is_replaced_and_changes_no_bit(expected, tmp_path) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path, 2)
    while not (busy := marking(process.pid)):
        assert process.poll() is None, process.communicate()
    os.kill(busy[0], signal.SIGKILL)
    student, said = finish(process, tmp_path)
    assert "was lost" in said
    assert student == expected


def test_an_old_attempt_that_wakes_up_while_a_new_one_runs_ends_and_writes_nothing(expected, tmp_path) -> None:
    old = start(tmp_path)
    wait_for(old, tmp_path, 2)
    os.kill(old.pid, signal.SIGSTOP)
    workers = descendants(old.pid)
    new = start(tmp_path, resume=True)
    try:
        wait_for(new, tmp_path, 4)
        os.kill(old.pid, signal.SIGCONT)
        _, said = old.communicate(timeout=120)
    finally:
        old.kill()
    assert old.returncode == 2 and "attempt 1 has taken over; attempt 0" in said, said
    assert finish(new, tmp_path)[0] == expected
    assert [row["round"] for row in rows(tmp_path / "demo" / "metrics.jsonl")] == list(range(ROUNDS))
    state = json.loads(next((tmp_path / "demo" / "checkpoints").glob(f"step-{ROUNDS:06d}/state.json")).read_text())
    assert state["driver"]["attempt"] == 1
    assert read_json(tmp_path / "demo" / "status.json")["attempt"] == 1
    assert not alive(workers, within_s=120)
