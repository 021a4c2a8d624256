"""Gradients of tasks as a run of an optimizer leaves them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_ray.comparison.angles import BATCHES, _gradients, cosines
from opd_ray.comparison.nodes import Node, Place
from opd_ray.comparison.protocol import read_protocol
from opd_ray.comparison.work import perform
from tests.comparison.test_compare import tiny
from tests.comparison.test_protocol import written


def test_the_angles_of_two_tasks(tmp_path: Path) -> None:
    """Each task's batches have their gradients at the same weights, so its halves agree better than tasks do."""
    data = tiny()
    student = data["arms"]["student"]
    student["set"] |= {
        "teachers": {task: {"lora": f"world/{task}", "guidance": 1.0} for task in ("look", "text")},
        "prompts": {"train": {task: f"world/{task}/train" for task in ("look", "text")}},
        "batch": {"images_per_task": 16, "item_size": 16},
    }
    student["rounds"] = BATCHES
    angles = {"do": "cosines", "group": "Angles", "says": "of it", "of": ["student"]}
    data["arms"] = {"base": data["arms"]["base"], "student": student, "angles": angles}
    protocol, _ = read_protocol(written(tmp_path, data))
    place = Place(tmp_path / "out")
    perform(protocol, Node("student-s0", "train", "student", 0, ()), place)
    found = cosines(protocol, Node("angles-s0", "cosines", "angles", 0, ()), place)
    assert found.keys() == {"start", "end"}
    for where in found.values():
        assert where["look and text"] < min(where["look and look"], where["text and text"]) <= 1
    run = place.work("angles-end-look-s0")
    weights = [load_file(run / "checkpoints" / f"step-{n:06d}" / "student.safetensors") for n in (1, BATCHES)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-9 for name in weights[0])
    first, *_, last = _gradients(run, 0.9)
    state = [load_file(run / "checkpoints" / f"step-{n:06d}" / "optimizer.safetensors") for n in (1, 3, 4)]
    name = next(name for name in sorted(state[0]) if name.endswith(":exp_avg"))
    size = state[0][name].numel()
    assert first[:size] == pytest.approx(10 * state[0][name].double().flatten(), rel=1e-6)
    again = 0.9 * state[1][name].double().flatten() + 0.1 * last[:size]
    assert torch.allclose(again, state[2][name].double().flatten(), rtol=1e-5, atol=1e-12)
