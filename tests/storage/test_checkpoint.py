"""Checkpoints: exact; whatever breaks on disk is named, and the newest intact one is found."""

import contextlib
import errno
import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from opd_ray.errors import RunFolderError, Stopped
from opd_ray.storage import checkpoint, run_folder
from opd_ray.storage.checkpoint import Checkpoint, newest, save


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    assert run_folder.claim(folder, {"seed": 0}) == 0
    return folder


def example(round, scale=1.0):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(round)) * scale
    return Checkpoint(
        round,
        {
            "student": {"b.lora_B": weight.T, "a.lora_A": weight.bfloat16()},
            "optimizer": {
                "exp_avg": weight.double(),
                "step": torch.tensor(3.0),
                "none": torch.empty(0, 2),
            },
            "ema": {"tied": weight, "same": weight, "flag": torch.tensor([True])},
            "algorithm": {},
        },
        {
            "lr": 0.1,
            "third": 1 / 3,
            "tiny": 5e-324,
            "zero": -0.0,
            "cursor": {"text": 2**53 + 1},
            "none": [None, True],
        },
    )


def same(a, b):
    assert a is not None and b is not None
    assert a.round == b.round and a.state == b.state
    assert repr(a.state) == repr(b.state)  # also -0.0, and 1 against 1.0
    assert {group: list(tensors) for group, tensors in a.tensors.items()} == {
        group: list(tensors) for group, tensors in b.tensors.items()
    }
    for group, tensors in a.tensors.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == b.tensors[group][name].dtype
            assert torch.equal(tensor, b.tensors[group][name])
    return True


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_comes_back_exactly_and_in_order(run):
    path = save(run, example(10), attempt=0, keep=3)
    assert path == run / "checkpoints" / "step-000010"
    found, notes = newest(run)
    assert same(found, example(10)) and notes == []


def test_what_is_loaded_is_writable_and_apart_from_the_files(run):
    save(run, example(1), attempt=0, keep=1)
    found, _ = newest(run)
    for tensors in found.tensors.values():
        for tensor in tensors.values():
            tensor.fill_(7)
    assert same(newest(run)[0], example(1))


def test_no_checkpoint_is_no_error(run, tmp_path):
    assert newest(run) == (None, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_the_newest_ones_are_kept(run):
    for round in (8, 9, 10, 100):
        save(run, example(round), attempt=0, keep=2)
    assert folders(run) == ["step-000010", "step-000100"]
    assert newest(run)[0].round == 100
    save(run, example(1_000_000), attempt=0, keep=1)
    assert folders(run) == ["step-1000000"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def garble(path):
    path.write_bytes(b"\xff{")


def empty(path):
    path.write_bytes(b"{}")


@pytest.mark.parametrize(
    ("damage", "file", "why"),
    [
        (cut, "student.safetensors", r"student\.safetensors has \d+ of \d+ bytes"),
        (flip, "student.safetensors", r"student\.safetensors was changed"),
        (remove, "optimizer.safetensors", r"optimizer\.safetensors is missing"),
        (cut, "state.json", r"state\.json has \d+ of \d+ bytes"),
        (flip, "state.json", r"state\.json was changed"),
        (remove, "manifest.json", r"manifest\.json is missing"),
        (cut, "manifest.json", r"manifest\.json cannot be read"),
        (garble, "manifest.json", r"manifest\.json cannot be read"),
        (empty, "manifest.json", r"manifest\.json cannot be read"),
    ],
)
def test_a_damaged_one_is_skipped_by_name_and_the_one_before_is_used(run, damage, file, why):
    save(run, example(10), attempt=0, keep=3)
    damage(save(run, example(20), attempt=0, keep=3) / file)
    found, notes = newest(run)
    assert same(found, example(10))
    (note,) = notes
    assert note.startswith("checkpoints/step-000020 is damaged and was skipped: ") and "\n" not in note
    assert re.search(why, note)


def test_no_single_changed_byte_is_ever_loaded(run):
    """Every byte of every file: the checkpoint is skipped, or (space in the manifest) the same."""
    small = Checkpoint(5, {"student": {"w": torch.tensor([1.5])}}, {"cursor": {"text": 12}})
    folder = save(run, small, attempt=0, keep=1)
    loaded = 0
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for index in range(len(original)):
            changed = bytearray(original)
            changed[index] ^= 1
            path.write_bytes(changed)
            found, notes = newest(run)
            if found is None:
                assert len(notes) == 1 and "\n" not in notes[0]
            else:
                loaded += same(found, small)
                assert path.name == "manifest.json"
        path.write_bytes(original)
    assert same(newest(run)[0], small)
    assert loaded < 100


def test_a_folder_under_another_name_is_no_other_round(run):
    path = save(run, example(10), attempt=0, keep=3)
    shutil.copytree(path, path.with_name("step-000030"))
    found, notes = newest(run)
    assert found.round == 10 and "round 30" in notes[0]


def of_format(path, number):
    path.write_text(path.read_text().replace('"format": 1', f'"format": {number}'))


def test_a_format_of_the_future_is_refused_by_name(run):
    """It is whole, so that to skip it would lose what it holds without a word."""
    save(run, example(10), attempt=0, keep=3)
    path = save(run, example(20), attempt=0, keep=3)
    of_format(path / "manifest.json", 2)
    text = f"{path} is of format 2, and this opd-ray reads up to format 1; go on with the opd-ray that wrote it, or "
    with pytest.raises(RunFolderError, match=re.escape(text)):
        newest(run)
    path.rename(run / "kept")
    assert same(newest(run)[0], example(10))
    of_format(run / "checkpoints" / "step-000010" / "manifest.json", 0)
    found, notes = newest(run)
    assert found is None and "is not of format 1" in notes[0]


def test_one_of_the_future_is_not_counted_among_those_that_stay(run):
    of_format(save(run, example(20), attempt=0, keep=1) / "manifest.json", 2)
    save(run, example(10), attempt=0, keep=1)
    assert folders(run) == ["step-000010", "step-000020"]


class Crash(BaseException):
    """The process is gone: nothing that handles errors may run."""


@pytest.mark.parametrize("after", range(11))
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_a_crash_at_any_point_leaves_a_checkpoint(run, monkeypatch, after, again):
    """Cut off after each file operation in turn; only what lies on disk counts."""
    old, new = example(20 if again else 10), example(20, scale=2.0)
    commits = 9 if again else 7  # six files and a rename; to replace takes two more operations
    save(run, old, attempt=0, keep=1)
    operations = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal operations
            operations += 1
            if operations > after:
                raise Crash
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", dying(checkpoint._write))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(checkpoint.shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(Crash):
            save(run, new, attempt=0, keep=1)
    found, notes = newest(run)
    assert notes == []
    committed = found.tensors["ema"]["tied"].equal(new.tensors["ema"]["tied"])
    assert same(found, new if committed else old)
    assert committed == (after >= commits)
    # The next attempt cleans up and goes on.
    attempt = run_folder.claim(run, {"seed": 0}, resume=True)
    save(run, new, attempt=attempt, keep=1)
    assert folders(run) == ["step-000020"] and same(newest(run)[0], new)


def test_an_old_attempt_cannot_write(run, monkeypatch):
    save(run, example(10), attempt=0, keep=3)
    assert run_folder.claim(run, {"seed": 0}, resume=True) == 1
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", lambda *_: pytest.fail("it wrote before it looked"))
        with pytest.raises(RunFolderError, match="attempt 1 has taken over; attempt 0 must not"):
            save(run, example(20), attempt=0, keep=3)
    assert folders(run) == ["step-000010"]
    save(run, example(20), attempt=1, keep=3)


def test_an_attempt_that_grows_old_while_it_writes_does_not_commit(run, monkeypatch):
    def takeover(folder):
        monkeypatch.undo()
        run_folder.claim(run, {"seed": 0}, resume=True)

    monkeypatch.setattr(checkpoint.run_folder, "sync", takeover)  # just before the commit
    with pytest.raises(RunFolderError, match="attempt 1 has taken over"):
        save(run, example(20), attempt=0, keep=3)
    assert folders(run) == []


def test_an_old_attempt_whose_temporary_folder_was_removed_is_told_why(run, monkeypatch):
    write = checkpoint._write

    def takeover(path, content):
        monkeypatch.undo()
        write(path, content)
        save(run, example(30), attempt=run_folder.claim(run, {"seed": 0}, resume=True), keep=3)

    monkeypatch.setattr(checkpoint, "_write", takeover)
    with pytest.raises(RunFolderError, match="attempt 1 has taken over"):
        save(run, example(20), attempt=0, keep=3)
    assert folders(run) == ["step-000030"]


def test_stale_temporary_folders_go_but_a_newer_attempts_stays(run):
    (run / "checkpoints").mkdir()
    for name in (".tmp-0-step-000007", ".tmp-5-step-000007"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "student.safetensors").write_bytes(b"half")
    save(run, example(10), attempt=0, keep=1)
    assert folders(run) == [".tmp-5-step-000007", "step-000010"]


def test_a_full_disk_leaves_the_previous_one_and_no_rubbish(run, monkeypatch):
    save(run, example(10), attempt=0, keep=1)

    def full(path, content):
        path.write_bytes(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(Stopped, match=r"step-000020: cannot be written \(No space left on device\)"):
        save(run, example(20), attempt=0, keep=1)
    assert folders(run) == ["step-000010"] and same(newest(run)[0], example(10))


def test_a_disk_that_is_really_full_is_told_in_numbers(run, small_disk):
    disk = small_disk(run, 200_000)
    run_folder.claim(run, {"seed": 0})
    save(run, example(10), attempt=0, keep=1)
    large = Checkpoint(20, {"student": {"w": torch.zeros(75_000)}})
    with pytest.raises(Stopped) as caught:
        save(run, large, attempt=0, keep=1)
    assert re.fullmatch(
        rf"{run}/checkpoints/step-000020: cannot be written \(No space left on device\): 0\.3 MB needed, "
        r"0\.[12] MB free; the last good checkpoint stays\. Free some room, then go on with --resume",
        str(caught.value),
    )
    assert folders(run) == ["step-000010"] and same(newest(run)[0], example(10))
    disk.enlarge(2**20)
    save(run, large, attempt=0, keep=1)
    assert folders(run) == ["step-000020"]


def test_damaged_ones_do_not_push_intact_ones_out(run):
    save(run, example(10), attempt=0, keep=2)
    cut(save(run, example(20), attempt=0, keep=2) / "student.safetensors")
    save(run, example(30), attempt=0, keep=2)
    assert folders(run) == ["step-000010", "step-000020", "step-000030"]
    save(run, example(40), attempt=0, keep=2)
    assert folders(run) == ["step-000030", "step-000040"]


def test_the_manifest_is_written_last_and_everything_is_synced_first(run, monkeypatch):
    synced = []
    fsync = checkpoint.os.fsync
    monkeypatch.setattr(
        checkpoint.os,
        "fsync",
        lambda fd: (synced.append(stat.S_ISDIR(checkpoint.os.fstat(fd).st_mode)), fsync(fd)),
    )
    written = []
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda path, data: (written.append(path.name), write(path, data)))
    save(run, example(10), attempt=0, keep=1)
    assert written[-1] == "manifest.json"
    assert synced == [False] * len(written) + [True, True]  # the files, their folder, its parent


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"betas": (0.9, 0.99)}, "state.betas"),
        ({"a": {"optimizer": {0: 1}}}, "state.a.optimizer"),
        ({"a": [{"b": (1,)}]}, "state.a"),
    ],
)
def test_state_that_json_would_change_is_refused(run, state, where):
    with pytest.raises(ValueError, match=f"^{where} does not survive JSON"):
        save(run, Checkpoint(1, {}, state), attempt=0, keep=1)
    assert newest(run) == (None, [])


def test_bad_arguments_are_refused(run):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(run, Checkpoint(1, {}, {"loss": float("nan")}), attempt=0, keep=1)
    with pytest.raises(ValueError, match=r"'\.\./x' is no file name"):
        save(run, Checkpoint(1, {"../x": {}}, {}), attempt=0, keep=1)
    with pytest.raises(ValueError, match="keep is 0"):
        save(run, example(1), attempt=0, keep=0)
    with pytest.raises(RunFolderError, match=r"run\.json: no such file"):
        save(run / "unclaimed", example(1), attempt=0, keep=1)


def test_nothing_in_a_checkpoint_is_pickled(run):
    path = save(run, example(10), attempt=0, keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
