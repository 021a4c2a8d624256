"""Specialists are trained by `opd-ray train` in a process of its own."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from opd_ray.errors import Stopped
from opd_ray.recipes import load
from opd_ray.world import TASKS, pipeline_path
from opd_ray.world.settings import Settings
from opd_ray.world.specialists import WEIGHTS, overrides, train

SHIPPED = pipeline_path().parent


@pytest.mark.parametrize("task", TASKS)
def test_a_specialist_learns_its_own_task_from_the_folder_being_built(task, tmp_path):
    one = Settings().specialists[task]
    config = load(one.recipe, overrides(tmp_path, task, one, 32, 7))
    assert config.algorithm.name == "diffusion_nft" and config.seed == 7
    assert config.model.path == str(tmp_path / "pipeline")
    assert config.prompts.train == {task: str(tmp_path / "prompts" / f"{task}_train.jsonl")}
    assert (config.rounds, config.batch.images_per_task, config.optimizer.lr) == (one.rounds, 96, 1e-3)
    assert config.student.guidance == one.guidance == load("demo").teachers[task].guidance
    assert config.student.lora.alpha == 64 and config.student.lora.targets == load("demo").student.lora.targets
    learned = [name for name in config.rewards if config.algorithm.reward_weights.get(name, 1) > 0]
    assert learned == [{"compose": "compose_partial"}.get(task, task)] and task in config.rewards


def test_a_training_that_cannot_start_is_told_with_its_own_last_words(tmp_path):
    with pytest.raises(Stopped, match=r"train nothing ended with exit code 2 .*one\.log.*no recipe 'nothing'"):
        train("nothing", tmp_path / "runs" / "one", [], lambda count, values: None)


@pytest.mark.verify
def test_an_interrupted_training_ends_its_round_and_goes_on_to_the_same_weights(tmp_path):
    one = replace(Settings().specialists["look"], rounds=3, images=24)
    changed = overrides(SHIPPED, "look", one, 4, 0)
    told = []

    def interrupt(count, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(one.recipe, tmp_path / "cut", changed, interrupt)
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    assert status["status"] == "stopped" and 0 < len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) < 3
    train(one.recipe, tmp_path / "cut", changed, lambda count, values: told.append(values["look"]))
    train(one.recipe, tmp_path / "whole", changed, lambda count, values: None)
    assert len(told) == 3
    cut, whole = (load_file(str(tmp_path / name / "lora" / WEIGHTS)) for name in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)
