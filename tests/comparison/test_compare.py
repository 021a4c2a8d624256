"""A comparison that is small enough to run: resumed, killed, and with an arm that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_ray.commands.compare import compare
from opd_ray.commands.train import run_training
from opd_ray.comparison.nodes import Node, Place, overrides_of
from opd_ray.comparison.protocol import read_protocol
from opd_ray.errors import RunFolderError
from opd_ray.recipes import load
from opd_ray.storage.run_folder import read_json
from tests.comparison.test_protocol import small, written
from tests.conftest import SmallDisk

LORA = {"student.lora": {"rank": 2, "alpha": 4}, "student.guidance": 1.0, "sampling.steps": 2}


def tiny() -> dict[str, Any]:
    """A specialist, its distillation, a merge, and a router, one round each."""
    data = small(seeds=[0])
    data["tuning"]["rates"] = [1e-3]
    data["judged"]["truth"] = "opd_ray.world.samples:illustrations"
    data["set"] = LORA
    nft = {
        "algorithm": {"name": "diffusion_nft"},
        "batch": {"images_per_task": 4, "item_size": 4, "images_per_prompt": 4},
        "rewards": {"look": {}},
        "prompts": {"train": {"look": "world/look/train"}},
        "evaluation": {},
    }
    opd = {
        "algorithm": {"name": "opd"},
        "batch": {"images_per_task": 4, "item_size": 4},
        "teachers": {"look": {"lora": "{teacher}", "guidance": 1.0}},
        "rewards": {},
        "prompts": {"train": {"look": "world/look/train"}},
        "evaluation": {},
    }
    data["arms"] = {
        "base": {"do": "base", "group": "Main", "says": "as it is"},
        "teacher": {"group": "Main", "says": "of look", "recipe": "world_nft", "rounds": 4, "set": nft, "curve": 2},
        "student": {"group": "Main", "says": "distilled", "recipe": "demo", "set": opd},
        "merged": {"do": "merge", "group": "Main", "says": "of both", "of": ["teacher", "student"]},
        "router": {"do": "router", "group": "Main", "says": "told", "by_task": {"look": "teacher"}},
    }
    return data


def run(protocol: Path, out: Path, *more: str, jobs: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(protocol, out, *more, jobs=jobs), capture_output=True, text=True, timeout=300)


def command(protocol: Path, out: Path, *more: str, jobs: int = 1) -> list[str]:
    start = [sys.executable, "-c", "from opd_ray.cli import main; main()", "compare"]
    return [*start, str(protocol), "--out", str(out), "--jobs", str(jobs), *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A comparison that was stopped in its first training and went on."""
    folder = tmp_path_factory.mktemp("compare")
    protocol, out = written(folder, tiny()), folder / "out"
    first = subprocess.Popen(command(protocol, out), stderr=subprocess.PIPE, text=True)
    rows = out / "work" / "teacher-s0" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not rows.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 3, told
    assert "run it again to go on" in told
    second = run(protocol, out)
    assert second.returncode == 0, second.stderr
    return protocol, out, second.stdout


def test_it_goes_on_where_it_was_stopped(done: tuple[Path, Path, str]) -> None:
    """The specialist is the one that an uninterrupted run makes, bit for bit."""
    protocol, out, _ = done
    chosen, _ = read_protocol(protocol)
    node = Node("teacher-s0", "train", "teacher", 0, ())
    config = load("world_nft", overrides_of(chosen, node, Place(out)))
    whole = run_training(config, protocol.parent / "whole", resume=False)
    assert read_json(out / "work" / "teacher-s0" / "result.json")["ema_sha256"] == whole["ema_sha256"]


def test_what_it_writes(done: tuple[Path, Path, str]) -> None:
    _, out, told = done
    found = read_json(out / "comparison.json")
    rows = found["rows"]
    assert set(rows) == {"base", "teacher", "student", "merged", "router"}
    assert found["done"] == found["total"] == 7
    # The router is the specialist where it is asked for it.
    assert rows["router"]["scores"] == rows["teacher"]["scores"]
    assert rows["router"]["gauges"]["fidelity"] == rows["teacher"]["gauges"]["fidelity"]
    (images,) = rows["student"]["costs"]["images"]
    assert images == {"free": 4, "parallel": 4 + 16, "serial": 4 + 16}
    (seconds,), (teacher,) = rows["student"]["costs"]["core_seconds"], rows["teacher"]["costs"]["core_seconds"]
    assert seconds["serial"] == pytest.approx(seconds["free"] + teacher["free"])
    lines = (out / "work" / "teacher-s0" / "metrics.jsonl").read_text().splitlines()
    learned = [json.loads(line)["scores"]["look"] for line in lines]
    assert found["core_hours"] * 3600 == pytest.approx(seconds["serial"], abs=1.0), "and the merge"
    assert [point["images"] for point in rows["teacher"]["curves"][0]] == [8, 16] and len(learned) == 4
    rewards = [(learned[0] + learned[1]) / 2, (learned[2] + learned[3]) / 2]
    assert [point["reward"] for point in rows["teacher"]["curves"][0]] == pytest.approx(rewards)
    page = (out / "comparison.md").read_text()
    assert found["protocol_sha256"] in page
    assert "**student** distilled" in page
    assert "H1" in told
    assert (out / "sheet-1.png").read_bytes().startswith(b"\x89PNG")
    assert all("<svg" in (out / f"{name}.svg").read_text() for name in ("curve-look", "proxy-and-gauge"))


def test_the_last_point_of_a_curve_is_the_model_itself(done: tuple[Path, Path, str]) -> None:
    """A checkpoint's moving average draws what the exported LoRA draws."""
    judged = read_json(done[1] / "judged" / "teacher-s0.json")
    assert judged["curve"][-1]["scores"]["look"] == pytest.approx(judged["scores"]["look"], abs=1e-5)
    assert judged["curve"][0]["scores"]["look"] != judged["scores"]["look"]


def test_another_protocol_does_not_go_on_in_its_folder(done: tuple[Path, Path, str], tmp_path: Path) -> None:
    data = tiny()
    data["arms"]["student"]["rounds"] = 2
    kept = done[1] / "protocol.yaml"
    with pytest.raises(RunFolderError, match=f"another protocol, which is in {kept}; go on with that one"):
        compare(written(tmp_path, data), out=done[1])
    assert kept.read_bytes() == done[0].read_bytes()
    with pytest.raises(RunFolderError, match="was begun without --quick; go on so"):
        compare(kept, out=done[1], quick=True)


def test_an_arm_that_fails_stops_what_needs_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny()
    (tmp_path / "broken.py").write_text("def reward(images, prompts):\n    raise ValueError('out of order')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    broken = {"rewards": {"broken:reward": {"probe": "finite"}}}
    data["arms"]["teacher"]["set"] = data["arms"]["teacher"]["set"] | broken
    data["arms"] = {name: data["arms"][name] for name in ("base", "teacher", "student")}
    found = run(written(tmp_path, data), tmp_path / "out")
    assert found.returncode == 2
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 4 of 5 could not be done; first teacher-s0: ")
    assert "out of order" in last
    assert "Traceback" not in found.stderr
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"].keys() == {"base"}


def alone(name: str, **changes: Any) -> dict[str, Any]:
    """The base and one arm of `tiny`."""
    data = tiny() | changes
    return data | {"arms": {one: data["arms"][one] for one in ("base", name)}, "hypotheses": {}}


@pytest.mark.verify
def test_a_full_disk_in_training_stops_the_comparison_with_its_reason(
    small_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    """Files of a run, pictures and tables find no room; nothing else is tried, and more room is enough to go on."""
    out = tmp_path / "out"
    disk = small_disk(out, 2 * 2**20)
    data = alone("teacher")
    data["arms"] = {"teacher": data["arms"]["teacher"], "base": data["arms"]["base"]}
    protocol = written(tmp_path, data)
    disk.fill(12 * 4096)
    found = run(protocol, out)
    assert found.returncode == 3, found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"stopped: {out}/work/teacher-s0"), last
    assert "cannot be written (No space left on device)" in last
    assert last.endswith("Free some room, then run the command again")
    assert "memory" not in found.stderr
    assert "Traceback" not in found.stderr
    assert not (out / "judged").exists()
    disk.enlarge(64 * 2**20)
    again = run(protocol, out)
    assert again.returncode == 0, again.stderr


def test_a_full_disk_under_the_tables_stops_in_one_line(
    done: tuple[Path, Path, str], small_disk: Callable[[Path, int], SmallDisk], tmp_path: Path
) -> None:
    protocol, finished, _ = done
    out = tmp_path / "out"
    disk = small_disk(out, 4 * 2**20)
    for part in ("protocol.json", "judged", "costs", "pictures"):
        copy = shutil.copytree if (finished / part).is_dir() else shutil.copy
        copy(finished / part, out / part)
    disk.fill(4096)
    found = run(protocol, out, "--tables")
    assert found.returncode == 3, found.stderr
    assert found.stderr.startswith(f"stopped: {out}"), found.stderr
    assert found.stderr.endswith("Free some room, then run the command again\n")
