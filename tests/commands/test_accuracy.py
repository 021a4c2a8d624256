"""`opd-ray accuracy`: what a run has come to prefer, from its predictions alone."""

import json
import re

import pytest
import torch

from opd_ray.actors.pairs import PairsActor
from opd_ray.algorithms.dpo import DiffusionDpo
from opd_ray.commands.train import run_training
from opd_ray.config import DpoConfig, PairsConfig
from opd_ray.evaluation.implicit import implicit_accuracy
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading
from opd_ray.types import Experience, Prompt, WorkItem
from tests.algorithms.parts import LORA, load, run_config
from tests.pairs import files


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Winners are red, losers blue."""
    return files.parquet(tmp_path_factory.mktemp("pairs") / "a.parquet", 24)


@pytest.fixture(scope="module")
def run(tiny, pairs, tmp_path_factory):
    """Twelve rounds of Flow-DPO on them."""
    sections = {
        "rounds": 12,
        "algorithm": {"name": "diffusion_dpo", "beta": 20.0, "draws": 2},
        "student": {"lora": {"rank": 4, "alpha": 8}, "guidance": 1.0},
        "batch": {"images_per_task": 12, "item_size": 6},
        "optimizer": {"lr": 1e-2},
        "pairs": {"files": str(pairs)},
    }
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_training(run_config(tiny, **sections), folder, resume=False)
    return folder


def test_a_run_on_pairs_prefers_the_better_pictures(cli, run, pairs):
    told = json.loads(cli("accuracy", run, "--pairs", pairs, "--count", 24, "--json").out)
    (found,) = told["runs"].values()
    assert found["n"] == 24 and told["draws"] == 8
    assert found["value"] > 0.9 and found["low"] <= found["value"] <= found["high"]
    assert re.search(r": \d\.\d{3} \(\d\.\d{3} to .* pairs", cli("accuracy", run, "--pairs", pairs, "--count", 10).out)
    assert re.search(r": \d\.\d{3} of 1 pairs", cli("accuracy", run, "--pairs", pairs, "--count", 1).out)
    losses = [json.loads(line)["loss"]["total"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_a_student_that_learned_nothing_is_indifferent_and_half_right(tiny, pairs):
    family = load(tiny, whole=True)
    family.add_lora("lora", LORA, 0)
    order = Order(index_pairs(PairsConfig(files=str(pairs))), 0, 1024)
    reader = PairsActor(family, lambda side: lambda at: order.rows(Reading(side), at), size=4)
    item = WorkItem(0, "pairs", 0, 0, tuple(Prompt(str(n), "", "pairs") for n in range(4)), (0,) * 4, ())
    experience = Experience(item, recorded=reader.read(0).tensors)
    algorithm = DiffusionDpo(DpoConfig(name="diffusion_dpo", draws=8))
    assert implicit_accuracy(family, "lora", algorithm, [experience]) == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 4}
    torch.manual_seed(0)
    for parameter in family.adapter_parameters("lora").values():
        parameter.data.normal_(std=0.1)
    assert implicit_accuracy(family, "lora", algorithm, [experience])["value"] in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_student_that_stayed_what_it_began_as_is_indifferent(cli, run, tiny, pairs, tmp_path):
    """Though its LoRA prefers one or the other, compared with the model without any."""
    sections = {
        "rounds": 1,
        "algorithm": {"name": "diffusion_dpo", "beta": 20.0, "draws": 2},
        "student": {"lora": {"rank": 4, "alpha": 8, "start": str(run)}, "guidance": 1.0},
        "batch": {"images_per_task": 12, "item_size": 6},
        "optimizer": {"lr": 1e-30, "weight_decay": 0},
        "pairs": {"files": str(pairs)},
    }
    run_training(run_config(tiny, **sections), tmp_path / "still", resume=False)
    told = json.loads(cli("accuracy", tmp_path / "still", "--pairs", pairs, "--count", 24, "--json").out)
    assert [one["value"] for one in told["runs"].values()] == [0.5]


def test_what_cannot_be_asked_is_said_in_one_line(cli, tmp_path, pairs, run):
    assert "no such run" in cli("accuracy", run.parent / "other", "--pairs", pairs).error
    assert "s3:// is an address" in cli("accuracy", "s3://x/y", "--pairs", pairs).error
    assert "cannot be read" in cli("accuracy", run, "--pairs", tmp_path / "none.parquet").error
