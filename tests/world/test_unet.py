"""The U-Net of fifty steps and its distillation to four, as they ship."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from opd_ray.world import TASKS, UNETS, pipeline_path, prompts_path, record_path, scorers
from opd_ray.world.autoencoder import decode, encode
from opd_ray.world.drawing import draw_few
from opd_ray.world.network import load_pipeline
from opd_ray.world.unet import FEW, centred, load_unet_pipeline

JUDGED = ("compose", "text")
"""Tasks that a base does not leave to its specialists: `look` is a taste, and these pictures are drawn without it."""


def recorded():
    return json.loads(record_path().read_text())["unet_scores"]["models"]


def judged(row):
    return sum(row[task][task] for task in JUDGED) / len(JUDGED)


def test_stock_diffusers_draws_from_the_folders():
    for name in UNETS:
        pipe = StableDiffusionPipeline.from_pretrained(str(pipeline_path(name)), safety_checker=None).to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        images = pipe("a red circle", height=32, width=32, num_inference_steps=2, output_type="pt").images
        assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_its_autoencoder_is_the_first_bases_without_a_shift():
    vae, images = load_pipeline(pipeline_path()).vae, torch.rand(4, 3, 32, 32)
    ours, latents = centred(vae), encode(vae, images)
    assert ours.config.shift_factor is None or ours.config.shift_factor == 0
    assert torch.allclose(ours.encode(images * 2 - 1).latent_dist.mean * ours.config.scaling_factor, latents, atol=1e-5)
    drawn = ours.decode(latents / ours.config.scaling_factor).sample.div(2).add(0.5).clamp(0, 1)
    assert torch.allclose(drawn.detach(), decode(vae, latents), atol=1e-5)


def test_four_steps_keep_most_of_fifty_and_are_far_above_the_undistilled_at_their_cost():
    """Four forwards each: the undistilled one without guidance, which would cost it as many again."""
    rows = recorded()
    few, whole = judged(rows["few"]["4"]), judged(rows["unet"]["50"])
    assert few >= 0.85 * whole
    assert few >= judged(rows["unet"]["4 unguided"]) + 0.20
    assert judged(rows["few"]["1"]) < judged(rows["few"]["2"]) + 0.02 and judged(rows["few"]["2"]) < few + 0.02


def test_the_distilled_models_steps_are_those_that_it_was_trained_at():
    pipe = load_unet_pipeline(pipeline_path("few"))
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == list(FEW)


@pytest.mark.parametrize(("name", "steps"), [("unet", 20), ("few", 4), ("few", 1)])
def test_the_shipped_weights_score_about_as_recorded(name, steps):
    row = recorded()[name][str(min(steps, 50) if name == "few" else 50)]
    pipe = load_unet_pipeline(pipeline_path(name))
    for task in JUDGED:
        lines = prompts_path(task, "heldout").read_text().splitlines()[:64]
        prompts = [json.loads(line)["prompt"] for line in lines]
        found = float(getattr(scorers, task)(draw_few(pipe, prompts, steps, row["guidance"], seed=3), prompts).mean())
        assert found == pytest.approx(row[task][task], abs=0.15), (name, task)  # 64 pictures; twenty steps for fifty


def test_every_task_was_scored():
    for rows in recorded().values():
        assert all(set(TASKS) <= row.keys() for row in rows.values())
