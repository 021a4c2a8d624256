"""The recipes of SDXL's few-step models and D3PO: what they say runs, on small random models of the same files."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from opd_ray.algorithms import make_algorithm
from opd_ray.models.base import sigmas_of
from opd_ray.models.unet import SDXL
from opd_ray.planning import check_memory, needs
from opd_ray.recipes import load
from tests.models.tiny_unet import BETAS, make_tiny_sdxl
from tests.planning.sdxl import write_configs
from tests.runtime.runs import go

CONFIGS = Path(__file__).parent.parent / "configs"
BRIGHT = "tests.commands.scoring:brightness"
TIMESTEPS = {"sdxl_turbo_pso": [999, 749, 499, 249], "sdxl_dmd2_pso": [999, 874, 749, 624, 499, 374, 249, 124]}


def parted(recipe: str, tmp_path: Path) -> str:
    """The folder of what the recipe's header makes of published parts, made by the same lines of tiny ones."""
    base = make_tiny_sdxl(
        tmp_path / "base", scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    )
    weights, made = tmp_path / "dmd2.bin", tmp_path / "dmd2"
    other = make_tiny_sdxl(tmp_path / "other", seed=1)
    torch.save(
        SDXL.load(load("sdxl_dmd2_pso", [f"model.path={other}"]).model, text=False, image=False).network.state_dict(),
        weights,
    )
    lines = re.findall(r"^#   (.*)$", (CONFIGS / f"{recipe}.yaml").read_text(), re.MULTILINE)
    code = "\n".join(line for line in lines if "huggingface_hub" not in line)
    for there, here in {
        '"madebyollin/sdxl-vae-fp16-fix"': f"{str(base / 'vae')!r}",
        '"stabilityai/stable-diffusion-xl-base-1.0"': f"{str(base)!r}",
        'hf_hub_download("tianweiy/DMD2", "dmd2_sdxl_4step_unet_fp16.bin")': f"{str(weights)!r}",
        '"models/sdxl-dmd2"': f"{str(made)!r}",
    }.items():
        assert there in code
        code = code.replace(there, here)
    exec(code, {})
    return str(made)


@pytest.fixture
def folder(request, tmp_path):
    """A tiny model of a recipe's files."""

    def make(recipe: str) -> str:
        return parted(recipe, tmp_path) if "dmd2" in recipe else str(make_tiny_sdxl(tmp_path / "turbo"))

    return make


@pytest.mark.parametrize("recipe", TIMESTEPS)
def test_a_recipe_of_sdxl_draws_at_the_models_own_timesteps_and_learns(recipe, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo blue dogs\n")
    overrides = ["rounds=1", "model.resolution=null", "batch={images_per_task: 4, item_size: 4, images_per_prompt: 2}"]
    overrides += [
        f"prompts.train.pickscore={prompts}",
        f"prompts.eval.pickscore={prompts}",
        "cluster=local",
        "cluster.runtime=local",
    ]
    overrides += [
        f"rewards={{{BRIGHT}: {{}}}}",
        f"evaluation.rewards.pickscore=[{BRIGHT}]",
        "evaluation.images_per_task=1",
    ]
    config = load(recipe, [f"model.path={folder(recipe)}", *overrides])
    schedule = SDXL.read_schedule(config.model)
    assert schedule.timesteps(config.sampling.steps).tolist() == TIMESTEPS[recipe]
    outcome = go(config, tmp_path / "run")
    (row,) = outcome.rows
    assert row["grad_norm"] > 0 and set(row["ratio"]["pickscore"].values()) == {0.0}
    assert len(row["ratio"]["pickscore"]) == config.sampling.steps - 1, "in one update, all steps but the last"
    assert len(outcome.result["scores"]["student"]) == 1


@pytest.mark.parametrize("recipe", TIMESTEPS)
def test_a_recipe_of_sdxl_fits_its_cards_by_the_published_shapes(recipe, tmp_path):
    model = f"model.path={write_configs(tmp_path / 'sdxl')}"
    config = load(recipe, [model])
    shape = SDXL.shape(config.model)
    assert shape.parameters["denoiser"] == 2_567_463_684  # UNet2DConditionModel of SDXL
    assert shape.parameters["vae"] == pytest.approx(83.7e6, rel=0.01)
    assert shape.pixels == config.model.resolution
    make_algorithm(config).check(sigmas_of(config.model, config.sampling.steps))
    found = {need.role: need for need in needs(config)}
    assert set(found) == {"rollout", "learner"}
    assert found["learner"].weights == pytest.approx(2 * 2.567, rel=0.01)
    check_memory(config, list(found.values()))


def test_d3po_is_one_update_over_all_steps_of_an_ordinary_path(tmp_path):
    config = load("world_d3po")
    algorithm = make_algorithm(config)
    assert algorithm.updates_per_round == 1 and algorithm.shared_noise
    assert len(algorithm.trained_steps(config.sampling.steps)) == config.algorithm.steps_per_update == 19
    algorithm.check(sigmas_of(config.model, config.sampling.steps))
    small = ["rounds=2", "batch={images_per_task: 4, item_size: 4, images_per_prompt: 2}", "sampling.steps=4"]
    small += ["cluster=local", "cluster.runtime=local", "evaluation.images_per_task=0", "rewards={look: {}}"]
    first, second = go(load("world_d3po", small), tmp_path / "run").rows
    steps = {float(value) for task in first["ratio"].values() for value in task.values()}
    assert steps == {0.0}, "the student is its reference before it has learned"
    assert max(value for task in second["ratio"].values() for value in task.values()) > 0
