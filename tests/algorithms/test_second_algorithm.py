"""Another algorithm through the whole composition root: the loop knows nothing of either."""

import ast
import json
from pathlib import Path

import pytest
import torch

from opd_ray import loop
from opd_ray.algorithms import make_algorithm
from opd_ray.commands.train import run_training
from opd_ray.errors import ConfigError, PromptError
from opd_ray.storage import checkpoint
from tests.algorithms.anchored import record
from tests.algorithms.parts import load, run_config

NAME = "tests.algorithms.anchored:Anchored"


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(folder, load(tiny), ["text", "look"], files=3)
    return folder


def config_of(tiny, folder, **sections):
    algorithm = {"name": NAME, "args": {"strength": 0.5}}
    student = {"lora": {"rank": 4, "alpha": 8}, "guidance": 1.0}
    return run_config(tiny, **({"algorithm": algorithm, "student": student, "recorded": str(folder)} | sections))


def rows(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learned(folder: Path):
    return [{key: row[key] for key in ("round", "loss", "grad_norm", "fit", "drift")} for row in rows(folder)]


def test_it_trains_stops_and_goes_on_bit_for_bit(tiny, recorded, tmp_path):
    whole = run_training(config_of(tiny, recorded, rounds=4), tmp_path / "whole", resume=False)
    run_training(config_of(tiny, recorded, rounds=2), tmp_path / "parts", resume=False)
    parts = run_training(config_of(tiny, recorded, rounds=4), tmp_path / "parts", resume=True)
    assert whole["student_sha256"] == parts["student_sha256"] and whole["ema_sha256"] == parts["ema_sha256"]
    assert learned(tmp_path / "whole") == learned(tmp_path / "parts")
    saved = [checkpoint.newest(tmp_path / name)[0] for name in ("whole", "parts")]
    assert (
        saved[0].state["learner"]
        == saved[1].state["learner"]
        == {
            "updates": 4 * 3,  # rounds x updates
            "student_updates": 4 * 3,
            "scaler": {},
            "algorithm": {"count": 4 * 2},  # rounds x items
        }
    )
    for group in ("student", "adapter.old", "optimizer", "ema"):
        ours, theirs = (one.tensors[group] for one in saved)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()
    # Each update: one item of 2 rows at 3 steps through old, reference and student.
    assert whole["forwards"] == {"learner": 4 * 3 * 2 * 3 * 3, "reader": 0}


def test_the_loop_has_no_case_for_any_algorithm():
    tree = ast.parse(Path(loop.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp, ast.Match))]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"Opd", "RolloutSource", "RecordedSource", "isinstance"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": {"name": "opd"}, "teachers": {"a": {"lora": "x"}}},
            "opd learns from rollouts; give prompts.train in",
        ),
        (
            {"recorded": None, "prompts": {"train": "x"}},
            "Anchored learns from recorded experience; give recorded or pairs in",
        ),
        (
            {"algorithm": {"name": "tests.algorithms.anchored:Marked", "args": {"strength": 1}}},
            "teachers is empty, add",
        ),
        ({"algorithm": {"name": "tests.algorithms.anchored:Scored", "args": {"strength": 1}}}, "rewards is empty, add"),
        (
            {"algorithm": {"name": "tests.algorithms.anchored:Elsewhere", "args": {"strength": 1}}},
            "uses policy 'reference', which is not among its adapters student, old",
        ),
        (
            {"algorithm": {"name": "tests.algorithms.anchored:Jumping", "args": {"strength": 1}}},
            "draws with kernel 'jump'; known: flow, dance, cps, ddim",
        ),
        (
            {"algorithm": {"name": "tests.algorithms.anchored:Streaming", "args": {"strength": 1}}},
            "Streaming streams, but has 3 updates a round or selects items; set streams = False",
        ),
        ({"algorithm": {"name": "tests.algorithms.anchored:no_class"}}, "not a subclass of opd_ray.algorithms.Algorit"),
        ({"algorithm": {"name": NAME}}, "algorithm.args: Anchored needs strength"),
        ({"algorithm": {"name": NAME, "args": {"strngth": 1}}}, "takes no argument 'strngth'; it takes strength, upda"),
        ({"algorithm": {"name": "tests.algorithms.anchored:Missing"}}, "has no 'Missing'"),
    ],
)
def test_what_it_needs_is_asked_for_before_anything_starts(tiny, recorded, sections, message):
    config = config_of(tiny, recorded, **sections)
    with pytest.raises(ConfigError) as caught:
        make_algorithm(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_recordings_is_refused_before_the_run_folder_is_taken(tiny, tmp_path):
    with pytest.raises(PromptError, match=r"no recorded experience; expected <task>/<name>.safetensors"):
        run_training(config_of(tiny, tmp_path / "none"), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()
