"""What a Ray of our own leaves behind: nothing, however its driver ends; and after SIGKILL, until somebody cleans."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from opd_ray.planning import doctor
from opd_ray.runtime import session
from opd_ray.runtime.session import PREFIX, Session, clean, forsaken
from opd_ray.storage import checkpoint
from opd_ray.storage.run_folder import read_json
from tests.runtime.jobs import MARK, processes, until
from tests.runtime.runs import bare_environment

pytestmark = pytest.mark.ray

WORKER = """
import signal, sys
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.handle import WorkerSpec
from tests.runtime.toys import Toy

signal.signal(signal.SIGTERM, lambda *told: None)  # as one that ends its round first
backend = RayBackend(object_store_mb=80)
worker = backend.start(WorkerSpec("toy", Toy, 1, {"cpu": 0.25}), "toy-0")
while True:
    assert backend.wait([worker.call("ready", bulk=0).done], 60)
    print("up", flush=True)
    sys.stdin.readline()
"""
COMMAND = "from opd_ray import cli; cli.main()"
FAILING = """
from opd_ray import cli
from opd_ray.run import Run

def fail(self, *args):
    raise ZeroDivisionError("of a plugin")

Run.finish_round = fail
cli.main()
"""


class Place:
    """A folder that Ray takes for the system's temporary one, and the processes that were told of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, script: str, *args: object) -> subprocess.Popen[str]:
        """In a process group of its own, as a shell starts it."""
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            env=bare_environment() | {"RAY_TMPDIR": str(self.folder), MARK: self.folder.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """All of them, found by what they inherited, which is not how the package finds them."""
        return processes(self.folder.name)

    def sessions(self) -> list[Path]:
        """The folders of our Rays."""
        return sorted(self.folder.glob(f"{PREFIX}*"))

    def empty(self, segments: set[str]) -> bool:
        """No process, no folder, no object store."""
        until(lambda: not self.processes(), 5)
        assert list(self.folder.iterdir()) == []
        mapped = set().union(*(plasma(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()))
        inodes = {str(entry.inode()) for entry in os.scandir("/dev/shm")}
        return not segments & (mapped | inodes)


def plasma(pid: int) -> set[str]:
    """Inodes of the object stores that a process has mapped. Ray unlinks their files at once."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "/dev/shm/plasma" in line}


@pytest.fixture
def place():
    # Not below pytest's folder: the paths of Ray's sockets may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="end-", dir="/tmp") as folder:
        made = Place(Path(folder))
        try:
            yield made
        finally:
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)
            until(lambda: not made.processes(), 10)


@pytest.fixture
def train(make_config, tmp_path, place):
    """`train` of many rounds, or as many as are asked for; returns once the first is done and says what it mapped."""

    def start(script=COMMAND, rounds=200, *more, wait=True):
        config = make_config("ray", rounds=rounds, cluster={"share_teachers": True})
        path, rows = tmp_path / "tiny.yaml", tmp_path / "tiny" / "metrics.jsonl"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        before = rows.read_bytes().count(b"\n") if rows.exists() else 0
        process = place.start(script, "train", path, "--out", tmp_path, *more)
        if wait:
            until(
                lambda: process.poll() is not None or (rows.exists() and rows.read_bytes().count(b"\n") > before), 150
            )
            assert process.poll() is None, process.stderr.read()
        segments = set().union(*map(plasma, place.processes()))
        assert segments or not wait
        return process, segments

    return start


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """Exit code and stderr."""
    _, err = process.communicate(timeout=within_s)
    return process.returncode, err


@pytest.mark.verify
def test_a_signal_to_the_whole_group_ends_the_round_and_then_ray(train, place, tmp_path) -> None:
    """As `timeout` sends it: to its child, then to everybody in the child's group, among them the child."""
    process, segments = train()
    until(lambda: checkpoint.newest(tmp_path / "tiny")[0], 30)
    time.sleep(0.1)  # now another round is under way
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    code, err = ended(process, 60)
    assert code == 3 and "stopped: stopped after round " in err, err
    assert "lost" not in err, "Ray lived on until the round was done"
    status = read_json(tmp_path / "tiny" / "status.json")
    assert status["status"] == "stopped"
    assert checkpoint.newest(tmp_path / "tiny")[0].round == status["round"] >= 2
    assert place.empty(segments)


def test_a_signal_to_its_group_ends_no_ray_and_after_a_sigkill_doctor_removes_it_and_nothing_else(
    place, monkeypatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(place.folder))
    killed = place.start(WORKER)
    assert killed.stdout.readline() == "up\n"
    os.killpg(killed.pid, signal.SIGTERM)
    killed.stdin.write("still?\n")
    killed.stdin.flush()
    assert killed.stdout.readline() == "up\n", "the same worker answers"
    (folder,) = place.sessions()
    segments = set().union(*map(plasma, place.processes()))
    living, foreign = Session(), place.folder / "ray" / "session_2026-01-01_00-00-00_000000_1"
    foreign.mkdir(parents=True)
    (place.folder / f"{PREFIX}unmarked").mkdir()
    reader = subprocess.Popen(["tail", "-f", folder / "driver.json"], stdout=subprocess.DEVNULL)
    try:
        before = place.processes()
        assert clean() == [] and place.processes() == before and len(before) >= 6 and segments
        assert doctor.killed_runs().status == "ok"
        killed.kill()
        ended(killed, 10)
        assert len(place.processes()) >= 2, "which is what this is about"
        assert forsaken() == [folder] and str(folder) in doctor.killed_runs().found
        said, err = place.start(COMMAND, "doctor", "--clean").communicate(timeout=60)
        assert said.startswith(f"removed {folder}, the Ray of process {killed.pid} (-c), which was killed; "), err
        assert reader.poll() is None, "a process that reads there is none of Ray's"
        assert living.folder.is_dir() and foreign.is_dir()
        assert clean() == [] and forsaken() == []
    finally:
        reader.kill()
        reader.wait()
    living.remove()
    foreign.rmdir()
    foreign.parent.rmdir()
    (place.folder / f"{PREFIX}unmarked").rmdir()
    assert place.empty(segments)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [({}, True), ({"host": "another"}, True), ({"boot": "before"}, True), ({"host": "another", "boot": "its"}, False)],
)
def test_another_machines_ray_in_a_shared_folder_is_left_alone(tmp_path, monkeypatch, changes, ours) -> None:
    """There a lock may be each machine's own, so that ours says nothing of it."""
    monkeypatch.setattr(session, "_base", lambda: tmp_path)
    mark = tmp_path / f"{PREFIX}x" / "driver.json"
    mark.parent.mkdir()
    mark.write_text(json.dumps({"pid": 1, "command": "train", **session._machine(), **changes}))
    assert forsaken() == ([mark.parent] if ours else [])
    assert len(clean()) == int(ours) and mark.exists() != ours


@pytest.mark.verify
def test_after_a_sigkill_the_next_run_removes_what_is_left(train, place, tmp_path) -> None:
    process, segments = train(rounds=12)
    (folder,) = place.sessions()
    process.kill()
    ended(process, 10)
    assert folder.is_dir()
    code, err = ended(train(COMMAND, 12, "--resume", wait=False)[0], 200)
    assert code == 0 and f"removed {folder}, the Ray of process {process.pid} " in " ".join(err.split()), err
    assert read_json(tmp_path / "tiny" / "status.json")["status"] == "done"
    assert place.empty(segments)


@pytest.mark.verify
def test_a_run_that_comes_to_its_end_leaves_nothing(train, place) -> None:
    process, segments = train(rounds=6)
    assert ended(process, 120)[0] == 0
    assert place.empty(segments)


@pytest.mark.verify
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing(train, place, times) -> None:
    process, segments = train()
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    assert ended(process, 60)[0] == 3
    assert place.empty(segments)


@pytest.mark.verify
def test_ctrl_c_while_ray_starts_leaves_nothing(train, place) -> None:
    process, _ = train(wait=False)
    until(place.sessions, 60)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process, 60)[0] == 3
    assert place.empty(set())


@pytest.mark.verify
def test_a_run_that_fails_leaves_nothing(train, place) -> None:
    process, _ = train(FAILING, wait=False)
    code, err = ended(process, 200)
    assert code == 1 and "ZeroDivisionError: of a plugin" in err
    assert place.empty(set())


@pytest.mark.verify
@pytest.mark.parametrize("program", ["raylet", "gcs_server"])
def test_a_ray_that_ends_under_its_run_stops_it_soon(train, place, tmp_path, program) -> None:
    process, segments = train()
    (pid,) = (pid for pid in place.processes() if Path(f"/proc/{pid}/exe").resolve().name == program)
    os.kill(pid, signal.SIGKILL)
    code, err = ended(process, 40)
    assert code == 3 and f"stopped: Ray's {program} (process {pid}) has ended; --resume goes on" in err, err
    assert read_json(tmp_path / "tiny" / "status.json")["status"] == "stopped"
    assert place.empty(segments)
