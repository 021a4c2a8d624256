import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from rich.console import Console
from safetensors.torch import load_file

from opd_ray.recipes import load
from opd_ray.world import (
    TASKS,
    UNETS,
    lora_path,
    pipeline_path,
    prompts_path,
    record_path,
    scorers,
)
from opd_ray.world.build import build
from opd_ray.world.drawing import draw
from opd_ray.world.network import LAYERS, encode_ids, load_pipeline, tokenize
from opd_ray.world.settings import STUDENT_GUIDANCE, Settings
from opd_ray.world.vocabulary import MAX_TOKENS


def _prompts(task, count):
    lines = prompts_path(task, "heldout").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(pipeline_path())


def test_importing_the_package_is_light():
    code = "import sys, opd_ray.world; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_unknown_names_are_refused_with_what_is_there():
    with pytest.raises(ValueError, match="compose, text, look"):
        lora_path("sound")
    with pytest.raises(ValueError, match="mixed/heldout"):
        prompts_path("mixed", "train")


def test_everything_shipped_is_under_twelve_megabytes_and_the_unets_under_twelve_more():
    root = pipeline_path().parent
    files = [path for path in root.rglob("*") if path.is_file()]
    unets = sum(path.stat().st_size for path in files if path.relative_to(root).parts[0] in UNETS)
    assert unets < 12e6 and sum(path.stat().st_size for path in files) - unets < 12e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_stock_diffusers_draws_from_the_folder():
    pipe = StableDiffusion3Pipeline.from_pretrained(str(pipeline_path())).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a red circle", 'the word "bako"'],
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=2.0,
        max_sequence_length=MAX_TOKENS,
    ).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_training_encodes_as_the_stock_pipeline_does(pipe):
    prompts = ['a red circle and the word "bako"', "", "a calm view"]
    sequence, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )
    ours = encode_ids(pipe, tokenize(pipe, prompts))
    torch.testing.assert_close(ours[0], sequence, rtol=0, atol=0)
    torch.testing.assert_close(ours[1], pooled, rtol=0, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_lora_files_carry_alpha_and_move_every_tensor_that_can_matter(name):
    folder = lora_path(name)
    tensors = load_file(str(folder / "pytorch_lora_weights.safetensors"))
    assert all(key.startswith("transformer.") for key in tensors)
    # The last block drops its context, so what its context would ask for reaches no output.
    idle = f"transformer.transformer_blocks.{LAYERS - 1}.attn.add_q_proj.lora_B.weight"
    assert {key for key, value in tensors.items() if value.abs().max() == 0} == {idle}
    pipe = load_pipeline(pipeline_path())
    pipe.load_lora_weights(str(folder))
    config = next(iter(pipe.transformer.peft_config.values()))
    assert (config.r, config.lora_alpha) == (32, 64)
    bound = [key for key, _ in pipe.transformer.named_parameters() if "lora_" in key]
    assert len(bound) == len(tensors)


def _recorded():
    return json.loads(record_path().read_text())["scores"]["models"]


@pytest.mark.parametrize("name", TASKS)
def test_each_specialist_is_far_above_base_on_its_own_task(name):
    models = _recorded()
    assert models[name][name][name] >= models["base"][name][name] + 0.40


def test_each_specialist_loses_somewhere_and_is_queried_as_it_was_trained_without_guidance():
    models = _recorded()
    for name in TASKS:
        elsewhere = [other for other in TASKS if other != name]
        assert any(models[name][other][other] < models["base"][other][other] for other in elsewhere)
        assert models[name]["guidance"] == Settings().specialists[name].guidance == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_weights_score_as_recorded(name, pipe):
    recorded = _recorded()
    prompts = _prompts(name, 96)
    base = getattr(scorers, name)(draw(pipe, prompts, STUDENT_GUIDANCE), prompts).mean()
    teacher = load_pipeline(pipeline_path())
    teacher.load_lora_weights(str(lora_path(name)))
    images = draw(teacher, prompts, recorded[name]["guidance"])
    best = getattr(scorers, name)(images, prompts).mean()
    # 96 pictures: within about two standard errors of the record's 256.
    assert float(best) == pytest.approx(recorded[name][name][name], abs=0.12)
    assert float(base) == pytest.approx(recorded["base"][name][name], abs=0.12)


def _tiny():
    """A build of seconds: one specialist of two rounds of two prompts."""
    settings = Settings().scaled(0.0003)
    compose = replace(settings.specialists["compose"], rounds=2, images=24)
    return replace(settings, specialists={"compose": compose})


def test_build_makes_a_world_and_resumes(tmp_path):
    settings, console = _tiny(), Console(quiet=True)
    record = build(tmp_path, settings, console)
    assert set(record["scores"]["models"]) == {"base", "compose"}
    assert set(record["unet_scores"]["models"]) == set(UNETS)
    assert record["settings"]["specialists"]["compose"]["recipe"] == "world_nft"
    stamp = (tmp_path / "pipeline" / "model_index.json").stat().st_mtime_ns
    again = build(tmp_path, settings, console)
    assert again == record
    assert (tmp_path / "pipeline" / "model_index.json").stat().st_mtime_ns == stamp

    (run,) = (tmp_path / "work" / "runs").glob("compose-*/")
    trained = load(str(run / "config.yaml"))
    assert trained.model.path == str(tmp_path / "pipeline") and trained.rounds == 2
    assert trained.algorithm.reward_weights == {"compose": 0}
    left = load_file(str(run / "lora" / "pytorch_lora_weights.safetensors"))
    made = load_file(str(tmp_path / "lora" / "compose" / "pytorch_lora_weights.safetensors"))
    assert left.keys() == made.keys()
    assert all(torch.equal(made[key], left[key].half()) for key in left)
