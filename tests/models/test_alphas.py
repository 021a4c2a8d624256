"""The time of variance-preserving models: against diffusers' schedulers, on the flow path, and what is refused."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models import sigmas_of
from opd_ray.models.alphas import read_alpha_schedule
from opd_ray.models.unet import SD
from tests.models.tiny_unet import BETAS, sd_scheduler

KINDS = [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]


@pytest.fixture
def written(tmp_path):
    """Writes a scheduler's file and gives the model's ModelConfig."""

    def write(scheduler, spacing=None, **changes):
        scheduler.save_pretrained(tmp_path / "scheduler")
        file = tmp_path / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return ModelConfig(family="sd", path=str(tmp_path), spacing=spacing)

    return write


def stock(kind, **changes):
    never = {"clip_sample": False} if kind in (DDIMScheduler, DDPMScheduler) else {}
    return kind(**{**BETAS, **never, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 3, 4, 50])
def test_timesteps_and_noise_levels_are_the_schedulers(written, kind, spacing, num_steps):
    scheduler = stock(kind, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    ours = read_alpha_schedule(written(scheduler))
    assert torch.allclose(ours.timesteps(num_steps), scheduler.timesteps.double(), atol=1e-4)
    sigmas = ours.sigmas(num_steps)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (num_steps + 1,)
    if hasattr(scheduler, "sigmas"):
        expected = scheduler.sigmas.double()
    else:
        abar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
        expected = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1)])
    assert torch.allclose(sigmas.double(), expected / (1 + expected), atol=1e-5)
    assert torch.allclose(ours.clock(sigmas[:-1]).double(), scheduler.timesteps.double(), atol=1e-2)
    if spacing != "linspace" or kind in (DDIMScheduler, DDPMScheduler):
        assert torch.equal(ours.clock(sigmas[:-1]), scheduler.timesteps.float()), "whole numbers to the last bit"


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 50])
def test_lcm_takes_its_own_grid(written, num_steps):
    scheduler = LCMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(num_steps)
    ours = read_alpha_schedule(written(scheduler))
    assert ours.timesteps(num_steps).tolist() == scheduler.timesteps.tolist()
    assert ours.sigmas(num_steps)[-1] == 0


def test_one_step_that_leads_and_one_that_trails_differ(written):
    leading, trailing = (read_alpha_schedule(written(sd_scheduler(), way)) for way in ("leading", "trailing"))
    assert leading.timesteps(1).tolist() == [1] and trailing.timesteps(1).tolist() == [999]
    assert leading.sigmas(1)[0] < 0.04 < 0.9 < trailing.sigmas(1)[0]
    assert [round(float(sigma), 3) for sigma in trailing.sigmas(4)] == [0.936, 0.803, 0.617, 0.409, 0.028]


def test_dmd2_is_its_base_with_spacing_trailing(written):
    """999, 749, 499, 249, as its authors draw it, and of eight 999, 874 to 124."""
    base = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    ours = read_alpha_schedule(written(base, "trailing"))
    assert ours.timesteps(4).tolist() == [999, 749, 499, 249]
    assert ours.timesteps(8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


@pytest.mark.parametrize(("alpha_one", "end"), [(True, 0.0), (False, 0.028341)])
def test_the_last_step_goes_where_the_file_says(written, alpha_one, end):
    ours = read_alpha_schedule(written(sd_scheduler(set_alpha_to_one=alpha_one)))
    sigmas = ours.sigmas(10)
    assert float(sigmas[-1]) == pytest.approx(end, abs=1e-6)
    z = torch.ones(1, 1, 1, 1)
    # sqrt((1 - t)^2 + t^2) at t = .028341 is sqrt(.944121 + .000803) = .972072, and x = z / .972072
    assert float(ours.final(z, sigmas)) == pytest.approx(1.0 if alpha_one else 1 / 0.972072, abs=1e-5)


def test_sigma_min_ends_at_the_first_timestep(written):
    scheduler = EulerDiscreteScheduler(**BETAS, final_sigmas_type="sigma_min", timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    last = float(scheduler.sigmas[-1])
    assert float(read_alpha_schedule(written(scheduler)).sigmas(4)[-1]) == pytest.approx(last / (1 + last), abs=1e-6)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_first_state_is_the_schedulers(written, kind, spacing):
    scheduler = stock(kind, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(10)
    ours = read_alpha_schedule(written(scheduler))
    sigmas, noise = ours.sigmas(10), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = noise * scheduler.init_noise_sigma
    t = scheduler.timesteps[0]
    x = scheduler.scale_model_input(theirs, t)
    assert torch.allclose(ours.network_input(ours.initial(noise, sigmas), sigmas[:1].expand(2)), x, atol=1e-5)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_begins_at_one(written, kind):
    scheduler = stock(
        kind, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )
    ours = read_alpha_schedule(written(scheduler))
    abar = scheduler.alphas_cumprod.double()
    b = (1 - abar).sqrt()
    assert torch.allclose(ours.times.double(), b / (b + abar.sqrt()), atol=1e-5)
    assert float(ours.times[-1]) == pytest.approx(1.0 if kind is DDIMScheduler else 4096 / 4097, abs=1e-6)
    z, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind is DDIMScheduler:  # a = 0 and b = 1: the state is the noise and v is -x0
        assert torch.equal(ours.velocity(v, z, torch.ones(1)), z + v)


def test_velocities_of_both_predictions_agree(written):
    """Where x0 and eps are known: v = a eps - b x0, and both give eps - x0."""
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "v_prediction"):
        ours = read_alpha_schedule(written(sd_scheduler(prediction_type=prediction)))
        t = ours.times[[10, 500, 990]]
        column = t.view(-1, 1, 1, 1)
        norm = ((1 - column) ** 2 + column**2).sqrt()
        z = (1 - column) * x0 + column * eps
        answer = eps if prediction == "epsilon" else ((1 - column) * eps - column * x0) / norm
        assert torch.allclose(ours.velocity(answer, z, t), eps - x0, atol=2e-5)


def test_the_clock_goes_on_between_and_stops_at_the_ends(written):
    ours = read_alpha_schedule(written(sd_scheduler()))
    assert torch.equal(ours.clock(ours.times), torch.arange(1000.0))
    middle = (ours.times[400] + ours.times[401]) / 2
    assert float(ours.clock(middle)) == pytest.approx(400.5, abs=1e-3)
    assert ours.clock(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_an_sd_15_file_is_read(written):
    """As published: PNDM with options of other schedulers."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    ours = read_alpha_schedule(written(scheduler, clip_sample=False))
    ddim = read_alpha_schedule(written(sd_scheduler()))
    assert ours.facts() == ddim.facts() and torch.equal(ours.sigmas(50), ddim.sigmas(50))


@pytest.mark.parametrize(
    ("scheduler", "changes", "expected"),
    [
        (sd_scheduler(), {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler is not known; known: DD"),
        (sd_scheduler(), {"zigzag": 3}, "has option 'zigzag' = 3, which is not known here"),
        (sd_scheduler(), {"clip_sample": True}, "has clip_sample True, which is not followed; known: False"),
        (sd_scheduler(), {"thresholding": True}, "has thresholding True"),
        (sd_scheduler(), {"prediction_type": "sample"}, "has prediction_type 'sample'; known: epsilon, v_prediction"),
        (sd_scheduler(), {"beta_schedule": "squaredcos_cap_v2"}, "has beta_schedule 'squaredcos_cap_v2'; known: lin"),
        (sd_scheduler(), {"timestep_spacing": "karras"}, "has timestep_spacing 'karras'; known: leading, trailing"),
        (sd_scheduler(), {"rescale_betas_zero_snr": True}, "epsilon and abar 0 at its last timestep"),
        (sd_scheduler(), {"trained_betas": [0.1, 0.0, 0.1]}, "has betas under which noise does not rise"),
        (EulerDiscreteScheduler(**BETAS), {"use_karras_sigmas": True}, "has use_karras_sigmas True"),
        (EulerDiscreteScheduler(**BETAS), {"timestep_type": "continuous"}, "has timestep_type 'continuous'"),
        (EulerDiscreteScheduler(**BETAS), {"rescale_betas_zero_snr": True}, "epsilon and abar 0 at its last timestep"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(written, scheduler, changes, expected):
    with pytest.raises(ModelError) as caught:
        read_alpha_schedule(written(scheduler, **changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "num_steps"),
    [
        (sd_scheduler(), 0),
        (sd_scheduler(), 1000),  # the offset leads past the last timestep
        (sd_scheduler(), 1001),
        (sd_scheduler(timestep_spacing="linspace"), 4),  # it ends at timestep 0, and so does the schedule
        (LCMScheduler(), 51),
    ],
)
def test_numbers_of_steps_that_a_spacing_has_not(written, scheduler, num_steps):
    ours = read_alpha_schedule(written(scheduler))
    with pytest.raises(ModelError, match=rf"cannot go {num_steps} steps with timestep spacing"):
        ours.sigmas(num_steps)


def test_a_flow_model_has_no_spacing(tiny):
    model = ModelConfig(path=str(tiny), spacing="trailing")
    with pytest.raises(ModelError, match=r"model.spacing trailing is of the families sd and sdxl; .* Leave it out"):
        sigmas_of(model, 4)


def test_an_offset_that_the_stock_pipeline_overrides_is_refused(written):
    with pytest.raises(ModelError, match=r"steps_offset 0 .* which StableDiffusionPipeline takes for 1; write 1"):
        SD.read_schedule(written(sd_scheduler(steps_offset=0)))
    assert SD.read_schedule(written(sd_scheduler(steps_offset=0), "trailing")).spacing == "trailing"
