"""Whole runs on U-Nets, in this process: distilled, resumed, drawn from, and what is refused."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from opd_ray.actors.rollout import SampleRequest, draw_pictures
from opd_ray.config import Config, LoraConfig, ModelConfig
from opd_ray.errors import ModelError
from opd_ray.evaluation.models import find_model
from opd_ray.models import load_family
from opd_ray.models.teachers import check_checkpoint
from opd_ray.types import Prompt
from tests.models.conftest import fill
from tests.models.tiny_unet import make_tiny_sd, make_tiny_sdxl, sd_scheduler
from tests.runtime.runs import go, same

FULL = {"student": {"guidance": 2.0, "lora": None}, "ema": {"decay": 0.5, "every": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> its base, with a LoRA teacher over it in the folder `teacher`."""
    found = {}
    for family, make in (("sd", make_tiny_sd), ("sdxl", make_tiny_sdxl)):
        folder = make(tmp_path_factory.mktemp("models") / family)
        base = load_family(ModelConfig(family=family, path=str(folder)), text=False, image=False)
        base.add_lora("student", LoraConfig(rank=4, alpha=8), 0)
        fill(base, "student")
        base.save_lora("student", folder.parent / "teacher")
        found[family] = folder
    return found


@pytest.fixture(scope="module")
def unet_config(make_config, models):
    def make(family="sd", **changes):
        model = {"family": family, "path": str(models[family])} | changes.pop("model", {})
        lora = str(models[family].parent / "teacher")
        teachers = {"a": {"lora": lora, "guidance": 1.0}, "b": {"lora": lora, "guidance": 2.0}}
        return make_config(**({"rounds": 2, "model": model, "teachers": teachers} | changes))

    return make


@pytest.fixture(scope="module")
def distilled(unet_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "run"
    changes = {"rounds": 6, "optimizer": {"lr": 1e-2}, "algorithm": {"name": "opd"}, "ema": None}
    return folder, go(unet_config(**changes), folder)


def test_distillation_closes_the_gap(distilled):
    """Same prompts' states and a LoRA teacher over the same base: the velocity gap falls."""
    _, outcome = distilled
    for task in "ab":
        gaps = [sum(row["gap"][task].values()) for row in outcome.rows]
        assert 0 < gaps[-1] < 0.7 * gaps[0]


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        ("sd", {"kernel": "ddim", "noise_level": 1.0, "objective": "kl"}),
        ("sdxl", {"kernel": "ddim", "noise_level": 1.0}),
        ("sdxl", {"kernel": "cps", "noise_level": 1.0}),
    ],
)
def test_it_works_wherever_the_kernel_is_gaussian(unet_config, tmp_path, family, algorithm):
    config = unet_config(family, algorithm={"name": "opd", **algorithm})
    outcome = go(config, tmp_path / "run")
    gaps = [gap for row in outcome.rows for steps in row["gap"].values() for gap in steps.values()]
    assert len(outcome.rows) == 2 and all(0 < gap < float("inf") for gap in gaps)
    assert all(0 < row["grad_norm"] < float("inf") for row in outcome.rows)


def test_a_resumed_run_is_the_same(unet_config, tmp_path):
    whole = go(unet_config(), tmp_path / "whole")
    go(unet_config(rounds=1), tmp_path / "parts")
    assert same(go(unet_config(), tmp_path / "parts", resume=True), whole)


def test_the_run_is_a_model_to_draw_with_and_its_card_loads_it(distilled, models):
    folder, _ = distilled
    family = find_model(str(folder)).load()
    text = (folder / "lora" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    snippet = snippet.replace("path/to/lora", str(folder / "lora")).replace("path/to/sd", str(models["sd"]))
    assert "import DDIMScheduler, StableDiffusionPipeline\n" in snippet
    exec(snippet.replace("num_inference_steps=40", "num_inference_steps=2"), names := {})
    request = SampleRequest("", None, 2.0, 4, 0, (Prompt("cat", "a red cat", "a"),), (0,))
    ours = draw_pictures(family, request)
    noise = torch.empty(0)

    def keep(x, sigmas, initial=family.initial):
        nonlocal noise
        noise = x
        return initial(x, sigmas)

    family.initial = keep
    assert torch.equal(draw_pictures(family, request), ours)
    names["pipe"].set_progress_bar_config(disable=True)
    theirs = names["pipe"](
        "a red cat", guidance_scale=2.0, num_inference_steps=4, latents=noise, output_type="pt"
    ).images
    assert torch.allclose(ours, theirs, atol=1e-4)
    family.use(None)
    assert not torch.allclose(draw_pictures(family, request), theirs, atol=1e-3)


def test_what_was_trained_whole_is_a_unet_that_diffusers_loads(unet_config, models, tmp_path):
    folder = tmp_path / "run"
    go(unet_config(**FULL), folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    base = UNet2DConditionModel.from_pretrained(models["sd"] / "unet")
    own = dict(unet.named_parameters())
    assert all(not torch.equal(own[name], before) for name, before in base.named_parameters())
    assert not (folder / "lora").exists() and not (folder / "transformer").exists()
    found = find_model(str(folder))
    assert found.denoiser == str(folder / "unet")
    assert all(torch.equal(own[name], parameter) for name, parameter in found.load().network.named_parameters())
    card = (folder / "unet" / "README.md").read_text()
    assert "unet=unet" in card and "A unet for text-to-image" in card
    StableDiffusionPipeline.from_pretrained(models["sd"], unet=unet)


def test_a_step_count_that_the_model_does_not_know_is_refused(unet_config):
    known = {"model": {"distilled_steps": [1, 2, 4]}}
    config = unet_config(**known)
    assert config.sampling.steps == 4
    assert Config.model_validate(config.model_dump(mode="json")) == config, "as a run folder holds it, with every key"
    with pytest.raises(ValueError, match=r"sampling.steps 3: the model was distilled to 1, 2, 4 steps"):
        unet_config(**known, sampling={"steps": 3})
    prompts = {"train": {"a": "a.txt", "b": "b.txt"}, "eval": {"a": "a.txt"}}
    unet_config(**known, prompts=prompts, evaluation={"images_per_task": 0})
    with pytest.raises(ValueError, match=r"evaluation.steps 40: the model was distilled to 1, 2, 4 steps"):
        unet_config(**known, prompts=prompts)
    with pytest.raises(ValueError, match=r"evaluation.steps 8: the model"):
        unet_config(**known, prompts=prompts, evaluation={"steps": [4, 1, 8]})


def test_a_teacher_of_another_schedule_is_refused(models, tmp_path):
    student = ModelConfig(family="sd", path=str(models["sd"]))
    other = make_tiny_sd(tmp_path / "v", scheduler=sd_scheduler(prediction_type="v_prediction"))
    with pytest.raises(ModelError, match=r"prediction is v_prediction, the student's epsilon"):
        check_checkpoint("a", student, student.model_copy(update={"path": str(other)}))
    trailing = student.model_copy(update={"spacing": "trailing"})
    with pytest.raises(ModelError, match=r"timestep spacing is leading, the student.s trailing"):
        check_checkpoint("a", trailing, student)
