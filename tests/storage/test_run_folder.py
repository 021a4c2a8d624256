"""Who owns a run folder, and files that are whole or absent."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.storage import run_folder
from opd_ray.storage.run_folder import claim, locked, newest_attempt, read_json, write_json_atomic

IDENTITY = {"seed": 0, "sampling": {"steps": 10, "kernel": "flow"}, "tasks": ["a", "b"]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_attempts_count_the_starts(tmp_path):
    run = tmp_path / "runs" / "demo"
    assert [claim(run, IDENTITY, resume=True) for _ in range(3)] == [0, 1, 2]
    assert newest_attempt(run) == 2
    assert names(run) == [".lock", "run.json"]


def test_an_existing_run_needs_resume(tmp_path):
    claim(tmp_path, IDENTITY)
    with pytest.raises(RunFolderError, match="has a run already; go on with it by --resume"):
        claim(tmp_path, IDENTITY)
    assert newest_attempt(tmp_path) == 0


def test_another_run_is_refused_by_the_keys_that_differ(tmp_path):
    claim(tmp_path, IDENTITY)
    other = {"seed": 0, "sampling": {"steps": 20, "kernel": "flow", "noise": 0.5}, "tasks": ["a"]}
    with pytest.raises(RunFolderError) as caught:
        claim(tmp_path, other, resume=True)
    message = str(caught.value)
    assert "sampling.steps was 10, now 20" in message
    assert "sampling.noise was absent, now 0.5" in message
    assert 'tasks was ["a", "b"], now ["a"]' in message
    assert "seed" not in message and "kernel" not in message and "\n" not in message
    assert newest_attempt(tmp_path) == 0


def test_tuples_and_key_order_do_not_make_another_run(tmp_path):
    claim(tmp_path, {"a": (1, 2), "b": {"x": 1, "y": 2}})
    assert claim(tmp_path, {"b": {"y": 2, "x": 1}, "a": [1, 2]}, resume=True) == 1


def test_what_others_wrote_into_run_json_stays(tmp_path):
    claim(tmp_path, IDENTITY)
    path = tmp_path / "run.json"
    write_json_atomic(path, read_json(path) | {"versions": {"torch": "2"}})
    claim(tmp_path, IDENTITY, resume=True)
    assert read_json(path)["versions"] == {"torch": "2"}
    assert len(read_json(path)["identity_sha256"]) == 64


@pytest.mark.parametrize("resume", [False, True])
def test_somebody_elses_folder_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(RunFolderError, match=r"not empty and has no run\.json"):
        claim(tmp_path, IDENTITY, resume=resume)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": 1}', '{"attempt": "x", "identity": {}}'])
def test_a_broken_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    for action in (
        lambda: claim(tmp_path, IDENTITY, resume=True),
        lambda: newest_attempt(tmp_path),
    ):
        with pytest.raises(RunFolderError, match=r"run\.json"):
            action()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"):
        claim(tmp_path / "file" / "run", IDENTITY)


def test_claims_at_the_same_time_get_different_attempts(tmp_path):
    attempts = []
    threads = [
        threading.Thread(target=lambda: attempts.append(claim(tmp_path, IDENTITY, resume=True))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(attempts) == list(range(8))


def test_a_held_lock_is_an_error_not_a_hang_and_a_dead_holder_frees_it(tmp_path):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(RunFolderError, match="locked by another process"),
            locked(tmp_path, timeout_s=0.1),
        ):
            pass
        holder.kill()
        with locked(tmp_path, timeout_s=5):
            pass


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json_atomic(path, {"round": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"loss": float("nan")})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json_atomic(path, {"round": 2})
    assert read_json(path) == {"round": 1}
    assert names(tmp_path) == ["status.json"]


def test_floats_survive_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-320, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2]
    write_json_atomic(tmp_path / "x.json", values)
    assert [x.hex() for x in read_json(tmp_path / "x.json")] == [x.hex() for x in values]
    assert json.loads((tmp_path / "x.json").read_text())[0] == 0.1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")


class Full(io.FileIO):
    """A file on a disk that has room for so many bytes more."""

    room = 0

    def write(self, content):
        return super().write(bytes(content)[: self.room])


def test_the_last_word_on_a_full_disk_is_whole_or_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json_atomic(path, {"status": "running", "round": 1000})
    Full.room = size = path.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda file, mode, buffering: Full(file, "r+"))
        with pytest.raises(OSError, match=r"No space left on device: '.*status\.json'"):
            run_folder.overwrite_json(path, {"status": "stopped", "why": "x" * size})
    assert read_json(path) == {"status": "running", "round": 1000}
    run_folder.overwrite_json(path, {"status": "stopped"})
    assert read_json(path) == {"status": "stopped"}
