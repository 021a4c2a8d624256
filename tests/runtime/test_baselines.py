"""Baselines of distillation as whole runs on the tiny model: tasks by reward, together and one after the other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_ray.config import LoraConfig, ModelConfig
from opd_ray.errors import ConfigError, ModelError
from opd_ray.models import load_family
from opd_ray.models.lora import WEIGHTS, read_lora
from opd_ray.recipes import load
from tests.runtime.runs import go, metric

GROUPS = {"images_per_task": 4, "item_size": 2, "images_per_prompt": 2}
SCORING = "tests.commands.scoring"
BRIGHT, GREEN = f"{SCORING}:brightness", f"{SCORING}:greenness"


class TestSeveralTasks:
    @pytest.mark.parametrize("name", ["diffusion_nft", "grpo_guard"])
    def test_each_learns_from_rewards_of_its_own(self, config, tmp_path, name):
        """Beside a reward that would change the mean: with the tasks' own, the student is the very same."""
        rewards = {BRIGHT: {}, GREEN: {"probe": "finite"}}
        own = {"task_rewards": {"a": [BRIGHT], "b": [BRIGHT]}}
        done = go(config(name, batch=GROUPS, rewards=rewards, algorithm=own), tmp_path / "own")
        alone = go(config(name, batch=GROUPS), tmp_path / "alone")
        both = go(config(name, batch=GROUPS, rewards=rewards), tmp_path / "both")
        assert done.result["student_sha256"] == alone.result["student_sha256"] != both.result["student_sha256"]

    def test_the_recipes_teach_every_task_by_its_own(self):
        for recipe in ("world_multi_nft", "world_multi_grpo_guard"):
            config = load(recipe)
            assert set(config.prompts.train) == set(config.algorithm.task_rewards) == {"compose", "text", "look"}
            assert config.algorithm.task_rewards["compose"] == ("compose_partial",)
            assert set(config.prompts.eval) == {"compose", "text", "look", "mixed"}

    @pytest.mark.parametrize(
        ("overrides", "text"),
        [
            (
                ["algorithm.task_rewards.txt=[text]"],
                "algorithm.task_rewards.txt: no such task; known: compose, tex",
            ),
            (
                ["algorithm.task_rewards.text=[ocr]"],
                "algorithm.task_rewards.text: no reward 'ocr'; known: compose",
            ),
            (["algorithm.task_rewards.text=[]"], "algorithm.task_rewards.text"),
            (["algorithm.reward_weights.text=0"], "algorithm.task_rewards.text: the weight of text is 0"),
        ],
    )
    def test_names_that_are_not_there(self, overrides, text):
        with pytest.raises(ConfigError) as caught:
            load("world_multi_nft", overrides)
        assert text in str(caught.value)


class TestStart:
    """student.lora.start: training goes on from a LoRA."""

    lora = LoraConfig(rank=4, alpha=8)

    def made(self, tiny, **changes):
        family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
        family.add_lora("student", self.lora.model_copy(update=changes), 7)
        return family

    def test_it_begins_as_the_file_is(self, tiny, tiny_teachers):
        found = self.made(tiny, start=str(tiny_teachers["a"])).adapter_parameters("student")
        expected = read_lora("a", str(tiny_teachers["a"])).tensors
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        assert not any(parameter.requires_grad for parameter in found.values())

    def test_another_alpha_is_made_up_for_in_b(self, tiny, tiny_teachers):
        """The file's factor is 8 / 4, the student's 2 / 4: its B is four times as large."""
        found = self.made(tiny, alpha=2, start=str(tiny_teachers["a"])).adapter_parameters("student")
        expected = read_lora("a", str(tiny_teachers["a"])).tensors
        for key in found:
            assert torch.equal(found[key], (4 if key.endswith("lora_B.weight") else 1) * expected[key]), key

    def test_another_rank_or_other_targets(self, tiny, tiny_teachers, config, tmp_path):
        for changes in ({"rank": 2}, {"targets": ("attn.to_q",)}):
            with pytest.raises(ModelError, match=r"has other modules or another rank than student\.lora.*set rank 4"):
                self.made(tiny, start=str(tiny_teachers["a"]), **changes)
        student = {"lora": {"rank": 2, "start": str(tiny_teachers["a"])}}
        with pytest.raises(ModelError, match=r"student\.lora\.start: LoRA 'student'"):
            go(config("diffusion_nft", student=student), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_cascade_goes_on_where_the_last_one_ended(self, config, tmp_path, monkeypatch):
        """Two stages: a step too small to see from the first's LoRA leaves that LoRA; relative paths are found."""
        monkeypatch.chdir(tmp_path)
        student = {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8}}
        go(config("diffusion_nft", batch=GROUPS, rounds=1, student=student, ema=None), Path("first"))
        student["lora"]["start"] = "first"
        still = {"lr": 1e-30, "weight_decay": 0}
        go(config("diffusion_nft", batch=GROUPS, rounds=1, student=student, ema=None, optimizer=still), Path("second"))
        first, second = (load_file(tmp_path / name / "lora" / WEIGHTS) for name in ("first", "second"))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert any(tensor.any() for key, tensor in first.items() if key.endswith("lora_B.weight"))

    def test_workers_draw_with_it_and_old_begins_as_it(self, config, reports, tiny_teachers, tmp_path):
        """NFT's first update at beta 1: student, `old` and whoever drew are one, whatever the start is."""
        student = {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8, "start": str(tiny_teachers["a"])}}
        go(config("diffusion_nft", batch=GROUPS, rounds=1, student=student), tmp_path / "run")
        ((report,),) = reports
        assert metric(report, "error_good") == metric(report, "error_bad") and report.grad_norm > 0
        assert min(metric(report, "drift")) > 0, "the frozen start of the KL is the base, not what was started from"


def test_a_run_folder_is_a_lora(tmp_path, tiny_teachers):
    """Also for teachers: RUN stands for RUN/lora."""
    (tmp_path / "lora").mkdir()
    save_file(
        load_file(tiny_teachers["a"] / WEIGHTS),
        tmp_path / "lora" / WEIGHTS,
        metadata={"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'},
    )
    with pytest.raises(ModelError):
        read_lora("run", str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    assert read_lora("run", str(tmp_path)).path == tmp_path / "lora" / WEIGHTS
