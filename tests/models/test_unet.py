"""Stable Diffusion and SDXL against the stock pipelines, and what they refuse to load."""

import itertools
import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from opd_ray.config import ModelConfig
from opd_ray.diffusion import cps, ddim, sample
from opd_ray.errors import ModelError
from opd_ray.models import load_family
from opd_ray.models.base import count_numbers
from opd_ray.testing import check_family
from tests.models.conftest import PROMPTS
from tests.models.test_sd3 import edit
from tests.models.tiny_unet import BETAS, make_tiny_sd, make_tiny_sdxl, sd_scheduler, turbo_scheduler

PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """The folder of a random Stable Diffusion 1.5."""
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """The folder of a random SDXL-Turbo."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


def config(family, folder, **changes):
    return ModelConfig(family=family, path=str(folder), **changes)


def load(family, folder, **changes):
    return load_family(config(family, folder, **changes), text=True, image=True)


def stock(family, folder):
    pipeline = PIPELINES[family].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(family, seed=1):
    return torch.randn((2, *family.latent_shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(family, noise, guidance, num_steps, kernel=ddim, level=0.0, seed=None, last_is_random=True):
    """As a rollout draws; ``seed`` of the steps' noises, which diffusers draws from one generator."""
    cond, uncond = family.encode(PROMPTS), family.empty()
    sigmas = family.sigmas(num_steps)
    x, rng = family.initial(noise, sigmas), torch.Generator().manual_seed(seed or 0)
    for j, (t, t_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        step = kernel(x, family.velocity(x, t, cond, uncond, guidance), t, t_next, level)
        random = level > 0 and (last_is_random or j < num_steps - 1)
        x = sample(step, torch.randn(x.shape, generator=rng)) if random else step.mean
    return family.decode(family.final(x, sigmas))


def theirs(pipeline, noise, guidance, num_steps, **options):
    images = pipeline(
        PROMPTS,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        latents=noise.clone(),
        output_type="pt",
        **options,
    ).images
    assert (images[0] - images[1]).abs().max() > 0.01  # not two blank images
    return images


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_they_conform(tiny_sd, tiny_sdxl, family):
    loaded = load(family, {"sd": tiny_sd, "sdxl": tiny_sdxl}[family])
    check_family(loaded)
    assert loaded.latent_shape == (4, 8, 8) and loaded.adapters == ()
    shape = loaded.shape(loaded.model)
    assert shape.parameters["denoiser"] == sum(p.numel() for p in loaded.network.parameters())
    encoders = [part for name, part in loaded._text.components.items() if name.startswith("text_encoder")]
    assert shape.parameters["text"] == sum(map(count_numbers, encoders))
    assert (shape.pixels, shape.latent) == (16, 4 * 8 * 8)
    assert shape.conditioning == sum(tensor[0].numel() for tensor in loaded.encode(["a"]).values())


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [
        ({}, 1.0),
        ({}, 4.5),
        ({"set_alpha_to_one": True}, 4.5),
        ({"timestep_spacing": "trailing"}, 4.5),
        ({"prediction_type": "v_prediction"}, 4.5),
        (ZERO_SNR, 4.5),
    ],
)
def test_the_ode_is_the_stock_pipelines_ddim(tmp_path, changes, guidance):
    """Leading steps end at timestep 0, where x is decoded and not z; zero terminal SNR begins at t = 1."""
    folder = make_tiny_sd(tmp_path / "sd", scheduler=sd_scheduler(**changes))
    family = load("sd", folder)
    noise = noise_of(family)
    images = draw(family, noise, guidance, 4)
    assert torch.allclose(images, theirs(stock("sd", folder), noise, guidance, 4), atol=1e-4)
    sigmas = family.sigmas(4)
    assert (sigmas[-1] > 0) == (not changes.get("set_alpha_to_one"))
    assert (sigmas[0] == 1) == (changes is ZERO_SNR)


def test_ddim_with_noise_is_the_stock_pipelines_eta(tiny_sd):
    family = load("sd", tiny_sd)
    noise = noise_of(family)
    images = draw(family, noise, 3.0, 4, level=0.7, seed=5)
    expected = theirs(stock("sd", tiny_sd), noise, 3.0, 4, eta=0.7, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(images, expected, atol=1e-4)
    assert not torch.allclose(images, draw(family, noise, 3.0, 4), atol=1e-2)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_turbo_is_the_stock_pipelines_euler_ancestral(tmp_path, spacing, guidance):
    folder = make_tiny_sdxl(tmp_path / "sdxl", scheduler=turbo_scheduler(timestep_spacing=spacing))
    family = load("sdxl", folder)
    noise = noise_of(family)
    images = draw(family, noise, guidance, 4, level=1.0, seed=5)
    expected = theirs(stock("sdxl", folder), noise, guidance, 4, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_noising_again_is_the_stock_pipelines_lcm(tmp_path, num_steps):
    folder = make_tiny_sdxl(tmp_path / "sdxl", scheduler=LCMScheduler(**BETAS))
    family = load("sdxl", folder)
    noise = noise_of(family)
    images = draw(family, noise, 1.0, num_steps, kernel=cps, level=1.0, seed=5, last_is_random=False)
    expected = theirs(stock("sdxl", folder), noise, 1.0, num_steps, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(images, expected, atol=1e-4)


def test_euler_without_noise_is_the_ode_too(tmp_path):
    """SDXL's own: EulerDiscreteScheduler, leading, with options left over from other schedulers."""
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    folder = make_tiny_sdxl(tmp_path / "sdxl", scheduler=scheduler, zeros=False)
    left_over = {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
    edit(folder / "scheduler" / "scheduler_config.json", **left_over)
    family = load("sdxl", folder)
    noise = noise_of(family)
    assert family.sigmas(4)[-1] == 0
    assert torch.allclose(draw(family, noise, 3.0, 4), theirs(stock("sdxl", folder), noise, 3.0, 4), atol=1e-4)


def test_the_empty_prompt_is_zeros_where_the_checkpoint_was_trained_so(tiny_sd, tiny_sdxl, tmp_path):
    assert all(not tensor.any() for tensor in load("sdxl", tiny_sdxl).empty().values())
    assert all(tensor.any() for tensor in load("sdxl", tiny_sdxl).encode([""]).values())
    assert all(tensor.any() for tensor in load("sd", tiny_sd).empty().values())
    trained = load("sdxl", make_tiny_sdxl(tmp_path / "sdxl", zeros=False))
    assert all(torch.equal(tensor, trained.encode([""])[name]) for name, tensor in trained.empty().items())


@pytest.mark.parametrize(("resolution", "pixels"), [(None, 16), (24, 24)])
def test_the_network_is_told_the_size(tiny_sdxl, resolution, pixels):
    family = load("sdxl", tiny_sdxl, resolution=resolution)
    assert family.latent_shape == (4, pixels // 2, pixels // 2)
    told = []
    hook = family.denoiser.register_forward_pre_hook(
        lambda _, __, given: told.append(given["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    x, cond = noise_of(family), family.encode(PROMPTS)
    plain = family.velocity(x, 0.5, cond, {}, 1)
    hook.remove()
    assert told[0].tolist() == [[pixels, pixels, 0, 0, pixels, pixels]] * 2
    family._factor *= 2
    assert not torch.allclose(family.velocity(x, 0.5, cond, {}, 1), plain, atol=1e-5), "and listens"


def test_velocity_is_the_networks_answer_in_other_coordinates(tiny_sd, tmp_path):
    """At timestep 499: eps, or v = a eps - b x0, of which eps - x0 = (a + b) v + (b - a) x."""
    abar = DDIMScheduler(**BETAS).alphas_cumprod.double()[499]
    a, b = abar.sqrt(), (1 - abar).sqrt()
    for folder in (tiny_sd, make_tiny_sd(tmp_path / "v", scheduler=sd_scheduler(prediction_type="v_prediction"))):
        family = load("sd", folder)
        t, cond = float(family.schedule.times[499]), family.encode(PROMPTS)
        z = noise_of(family)
        x = z * (a + b).float()
        with torch.no_grad():
            raw = family.network(x, 499, cond["encoder_hidden_states"]).sample
        eps, x0 = (raw, (x - b * raw) / a) if folder == tiny_sd else (a * raw + b * x, a * x - b * raw)
        assert torch.allclose(family.velocity(z, t, cond, {}, 1).double(), (eps - x0).double(), atol=1e-4)


def test_half_precision_is_close(tiny_sd, tiny_sdxl):
    for family, folder in (("sd", tiny_sd), ("sdxl", tiny_sdxl)):
        full = load(family, folder)
        half = load_family(config(family, folder), text=True, image=False, dtype=torch.bfloat16)
        x, cond = noise_of(full), full.encode(PROMPTS)
        ours, exact = half.velocity(x, 0.6, cond, {}, 1), full.velocity(x, 0.6, cond, {}, 1)
        assert ours.dtype == torch.float32
        assert 0 < float((ours - exact).norm() / exact.norm()) < 0.03


@pytest.fixture
def copy(tmp_path):
    """Copies a checkpoint, to break it."""

    def make(folder):
        return shutil.copytree(folder, tmp_path / "copy")

    return make


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 8}, r"also takes guidance, as a distilled LCM does"),
        ("unet/config.json", {"class_embed_type": "timestep"}, r"also takes a class \(class_embed_type\)"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels and the VAE's latents 4"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, r"addition_embed_type text_time; family 'sd' knows"),
        ("unet/config.json", {"sample_size": None}, r"sample_size None in its unet's config; give model.resolution"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, r"family 'sd' loads StableDiffusionPipe"),
    ],
)
def test_another_network_is_refused(tiny_sd, copy, file, change, expected):
    folder = copy(tiny_sd)
    edit(folder / file, **change)
    with pytest.raises(ModelError, match=expected):
        load("sd", folder)


def test_a_refiner_is_refused(tiny_sdxl, copy):
    folder = copy(tiny_sdxl)
    edit(folder / "model_index.json", text_encoder=[None, None])
    with pytest.raises(ModelError, match=r"one text encoder alone, as a refiner"):
        load("sdxl", folder)


def test_resolutions_that_do_not_halve_are_refused(tiny_sd):
    with pytest.raises(ModelError, match=r"model.resolution 18 does not fit .* a multiple of 4, for instance 16"):
        load("sd", tiny_sd, resolution=18)


def test_what_was_not_loaded_is_said(tiny_sdxl):
    family = load_family(config("sdxl", tiny_sdxl), text=False, image=False)
    with pytest.raises(ModelError, match=r"without its text encoders"):
        family.encode(["a"])
    with pytest.raises(ModelError, match=r"without its VAE"):
        family.decode(noise_of(family))


def test_the_fingerprint_tells_what_teachers_have_to_share(tiny_sd, tmp_path):
    """Betas, prediction, spacing and ends; not the solver's name."""

    def facts(**changes):
        make_tiny_sd(tmp_path / "other", scheduler=sd_scheduler(**changes))
        return load_family(config("sd", tmp_path / "other"), text=False, image=False).fingerprint(
            config("sd", tmp_path / "other")
        )

    ours = facts()
    assert ours["VAE scaling factor"] == 0.18215 and ours["prediction"] == "epsilon"
    for changes, names in (
        ({"prediction_type": "v_prediction"}, {"prediction"}),
        ({"timestep_spacing": "trailing"}, {"timestep spacing", "steps offset"}),
        ({"set_alpha_to_one": True}, {"last step"}),
        ({"beta_end": 0.013}, {"times"}),
    ):
        other = facts(**changes)
        assert {name for name in ours if ours[name] != other[name]} == names
    written = json.loads((tiny_sd / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler"
    edit(tmp_path / "other" / "scheduler" / "scheduler_config.json", **(written | {"_class_name": "PNDMScheduler"}))
    model = config("sd", tmp_path / "other")
    assert load_family(model, text=False, image=False).fingerprint(model) == ours
