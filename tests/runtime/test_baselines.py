"""Baselines of distillation as whole runs on the tiny model: tasks by reward, together and one after the other."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_ray.algorithms import Forward, make_algorithm
from opd_ray.algorithms.sft import Sft
from opd_ray.config import LoraConfig, ModelConfig, SftConfig
from opd_ray.errors import ConfigError, ModelError, RunFolderError
from opd_ray.experience import cut
from opd_ray.models import load_family
from opd_ray.models.lora import WEIGHTS, read_lora
from opd_ray.prompts import PromptStream, read_prompts
from opd_ray.recipes import load
from opd_ray.recording import Recorder
from opd_ray.roles import make_teacher
from opd_ray.seeds import fold, noise
from opd_ray.types import Experience, Prompt, Trajectory, WeightVersion, WorkItem
from tests.runtime.runs import go, metric, same

VERSION = WeightVersion(0, 0, 0)


def made(config, folder) -> Recorder:
    """A recorder of a recipe's teachers."""
    train = read_prompts(config.prompts.train, "prompts.train")
    return Recorder(config, make_algorithm(config), train, folder, "cpu")


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
        assert max(metric(report, "drift")) == 0, "the frozen start is what was started from"

    @pytest.mark.parametrize("name", ["pso_pairwise", "flow_grpo"])
    def test_the_reference_is_what_was_started_from_and_stays_that(
        self, config, reports, tiny_teachers, tmp_path, name
    ):
        """Also in a run that goes on while the file has become another."""
        start = tmp_path / "start"
        shutil.copytree(tiny_teachers["a"], start)
        student = {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8, "start": str(start)}}
        whole = go(config(name, batch=GROUPS, student=student), tmp_path / "whole")
        (first, *_), (later, *_) = reports
        if name == "pso_pairwise":
            assert max(metric(first, "ratio")) == 0 < min(metric(later, "ratio"))
            assert first.loss == pytest.approx(math.log(2), abs=1e-6)
        else:
            assert max(metric(first, "kl")) == 0 < min(metric(later, "kl"))
        go(config(name, batch=GROUPS, student=student, rounds=1), tmp_path / "parts")
        shutil.copytree(tiny_teachers["b"], start, dirs_exist_ok=True)
        assert same(go(config(name, batch=GROUPS, student=student), tmp_path / "parts", resume=True), whole)


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


@pytest.fixture(scope="module")
def recordings(make_config, tmp_path_factory):
    """Two rounds of both teachers."""
    folder = tmp_path_factory.mktemp("recordings") / "all"
    recorder = made(make_config(rounds=2), folder)
    items = recorder.left(2)
    assert [item.task for item in items] == ["a"] * 4 + ["b"] * 4, "a teacher's after one another"
    assert list(recorder.record(items)) == items and not made(make_config(rounds=2), folder).left(2)
    return folder


class TestRecorded:
    """Teachers draw once; a student then learns from their pictures, or from their paths."""

    def test_a_recording_is_what_the_teacher_draws_of_the_runs_own_items(self, make_config, recordings):
        """x' = x + (t' - t) v from the noise of a rollout; v is the teacher's answer at these very states."""
        config = make_config()
        found = load_file(recordings / "a" / "000001-001.safetensors")
        stream = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        item = next(one for one in cut(config, make_algorithm(config), stream, 1) if (one.task, one.index) == ("a", 1))
        seeds = [fold(0, "init_noise", 1, prompt.id, n) for prompt, n in zip(item.prompts, item.samples, strict=True)]
        assert torch.equal(found["latents"][:, 0], noise(seeds, found["latents"].shape[2:]))
        sigmas = found["sigmas"]
        for j in range(4):
            step = found["latents"][:, j] + (sigmas[j + 1] - sigmas[j]) * found["velocity"][:, j]
            assert torch.allclose(found["latents"][:, j + 1], step, atol=1e-6)
        cond, empty = (
            {key.removeprefix(part): one for key, one in found.items() if key.startswith(part)}
            for part in ("cond.", "empty.")
        )
        path = Trajectory(replace(item, steps=(0, 1, 2, 3)), VERSION, sigmas, found["latents"], cond, empty)
        answer = make_teacher(config, ("a",)).score(path, "a")
        assert torch.allclose(answer.velocity, found["velocity"], atol=1e-5)

    def test_opd_learns_from_the_teachers_paths(self, make_config, recordings, reports, tmp_path):
        """Its loss at the first update by hand: 1/2 mean((dt (v_S - v_T))^2) at the recorded states."""
        algorithm = {"name": "opd", "states": "recorded"}
        batch = {"images_per_task": 8, "item_size": 2}  # all of the recordings in one round
        still = {"algorithm": algorithm, "recorded": str(recordings), "prompts": None, "rounds": 1, "batch": batch}
        config = make_config(**still)
        done = go(config, tmp_path / "run")
        ((report,),) = reports
        family = load_family(config.model, text=False, image=False)
        losses = []
        for file in recordings.glob("*/*.safetensors"):
            found = load_file(file)
            cond, empty = (
                {key.removeprefix(part): one for key, one in found.items() if key.startswith(part)}
                for part in ("cond.", "empty.")
            )
            for j in range(3):
                t, t_next = found["sigmas"][j : j + 2].tolist()
                mine = family.velocity(found["latents"][:, j], t, cond, empty, 2.0).detach()
                losses.append(float(0.5 * ((t_next - t) * (mine - found["velocity"][:, j])).square().mean()))
        assert report.grad_norm > 0 and report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        rows = 2 * 8 * 3 * 2  # tasks, images, steps, and both branches of guidance
        assert done.rows[0]["forwards"] == {"learner": rows, "reader": 0}, "nobody draws, and no teacher is asked"
        other = make_config(**still, sampling={"steps": 5})
        with pytest.raises(ConfigError, match=r"recorded: the drawings in .* have 4 steps, which are not the 5"):
            go(other, tmp_path / "other")

    def test_a_student_that_is_the_teacher_has_no_loss(self, make_config, tiny_teachers, tmp_path):
        """On its own paths, at its own guidance; started from the teacher's LoRA."""
        student = {"guidance": 2.0, "lora": {"rank": 4, "alpha": 8, "start": str(tiny_teachers["b"])}}
        teachers = {"b": {"lora": str(tiny_teachers["b"]), "guidance": 2.0, "tasks": ["a", "b"]}}
        config = make_config(teachers=teachers)
        recorder = made(config, tmp_path / "own")
        list(recorder.record(recorder.left(1)))
        algorithm = {"name": "opd", "states": "recorded", "loss_target": "v"}
        run = make_config(
            algorithm=algorithm, recorded=str(tmp_path / "own"), prompts=None, rounds=1, student=student, teachers={}
        )
        assert go(run, tmp_path / "run").rows[0]["loss"]["total"] < 1e-12

    def test_sft_learns_from_their_pictures(self, make_config, recordings, reports, tmp_path):
        config = make_config(algorithm={"name": "sft"}, recorded=str(recordings), prompts=None, teachers={})
        whole = go(config, tmp_path / "whole")
        assert all(report.grad_norm > 0 for (report,) in reports)
        assert whole.rows[0]["forwards"] == {"learner": 8, "reader": 0}, "one forward an image, and no guidance"
        go(config.model_copy(update={"rounds": 1}), tmp_path / "parts")
        assert same(go(config, tmp_path / "parts", resume=True), whole)

    @pytest.mark.ray
    @pytest.mark.verify
    @pytest.mark.parametrize(
        ("readers", "changes"),
        [
            pytest.param(2, {"algorithm": {"name": "opd", "states": "recorded"}}, id="opd"),
            pytest.param(1, {"algorithm": {"name": "sft"}, "teachers": {}}, id="sft"),
        ],
    )
    def test_over_ray_it_is_the_student_of_one_process(
        self, make_config, ray_session, recordings, tmp_path, readers, changes
    ):
        """What readers send is what was recorded, and items come in order whoever reads them."""
        changes |= {"recorded": str(recordings), "prompts": None, "rounds": 2}
        many = {"rollout": {"resources": {"cpu": 0.25}, "workers": readers}}
        done = go(make_config("ray", cluster=many, **changes), tmp_path / "ray")
        assert len(done.pids) == readers + 1, "and the learner"
        assert same(done, go(make_config(**changes), tmp_path / "local"))

    def test_what_is_recorded_goes_on_and_is_not_mixed(self, make_config, tmp_path):
        config = make_config()
        first = made(config, tmp_path / "all")
        assert len(list(first.record(first.left(1)))) == 4
        assert [item.round for item in made(config, tmp_path / "all").left(2)] == [1] * 4
        with pytest.raises(RunFolderError, match=r"holds other recordings: seed was 0, now 5"):
            made(make_config(seed=5), tmp_path / "all")
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "thesis.txt").touch()
        with pytest.raises(RunFolderError, match="is not empty and holds no recordings"):
            made(config, tmp_path / "else")


def test_the_loss_of_sft_by_hand():
    """x0 = 2, eps = 0.5: the target is -1.5, a velocity of -1 misses it by 0.5; the last state is the picture."""
    algorithm = Sft(SftConfig(name="sft", space="velocity"))
    target = {"target": torch.full((1, 1, 1, 1), -1.5)}
    forward = Forward(torch.zeros(1, 1, 1, 1), torch.tensor([0.3]), torch.zeros(1), 0, {}, {}, target)
    assert float(algorithm.loss(forward, {"student": torch.full((1, 1, 1, 1), -1.0)}).value) == 0.25
    latents = torch.tensor([7.0, 5.0, 2.0]).reshape(1, 3, 1, 1, 1)
    recorded = {"latents": latents, "sigmas": torch.tensor([1.0, 0.5, 0.0]), "cond.a": torch.ones(1, 1)}
    item = WorkItem(0, "a", 0, 0, (Prompt("p", "p", "a"),), (0,), (0,))
    (found,) = algorithm.forwards(Experience(item, recorded=recorded), 0)
    eps = noise([fold(0, "learner_noise", 0, "a", 0, 0, 0, 0)], (1, 1, 1))
    t = float(found.t)
    assert torch.allclose(found.inputs["target"], eps - 2) and torch.allclose(found.x, (1 - t) * 2 + t * eps)
