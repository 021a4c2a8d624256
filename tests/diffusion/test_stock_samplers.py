"""The kernels are the samplers of variance-preserving models: one step each against diffusers' own schedulers.

With x = z / n, n = sqrt((1 - t)^2 + t^2), and k-diffusion's y = z / (1 - t). In float32 the schedulers run as they are;
in float64 with their own table of abar widened, since they look it up in float32.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from opd_ray.diffusion import cps, ddim

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PAIRS = [(999, 749), (749, 499), (499, 249)]


@pytest.fixture
def drawn():
    """A state in the model's own coordinates, a predicted noise, and noise."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((2, 4, 8, 8), generator=generator) for _ in range(3)]


def times(alphas, now, then):
    """The flow times of two timesteps; a then below 0 is the clean picture."""
    abar = [float(alphas[now]), float(alphas[then]) if then >= 0 else 1.0]
    return [math.sqrt(1 - one) / (math.sqrt(one) + math.sqrt(1 - one)) for one in abar]


def norm(t):
    return math.hypot(1 - t, t)


def flow_state(x, eps, t):
    """The state on the flow path and its velocity."""
    z = x * norm(t)
    return z, (eps - z) / (1 - t)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("now", "then"), [*PAIRS, (249, -1)])
def test_ddim_is_ddim(drawn, eta, now, then):
    x, eps, noise = drawn
    stock = DDIMScheduler(**BETAS, clip_sample=False)
    stock.set_timesteps(4)
    theirs = stock.step(eps, now, x, eta=eta, variance_noise=noise).prev_sample
    t, t_next = times(stock.alphas_cumprod, now, then)
    step = ddim(*flow_state(x, eps, t), t, t_next, eta)
    assert torch.allclose((step.mean + step.std * noise) / norm(t_next), theirs, atol=2e-5)


@pytest.mark.parametrize(("now", "then"), [*PAIRS, (249, -1)])
def test_ddim_at_level_one_is_euler_ancestral(drawn, now, then, monkeypatch):
    x, eps, noise = drawn
    stock = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    stock.set_timesteps(4)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *args, **options: noise
    )
    t, t_next = times(stock.alphas_cumprod, now, then)
    y = x * norm(t) / (1 - t)
    assert torch.allclose(stock.scale_model_input(y, torch.tensor(float(now))), x, atol=1e-5)
    theirs = stock.step(eps, torch.tensor(float(now)), y).prev_sample
    step = ddim(*flow_state(x, eps, t), t, t_next, 1.0)
    assert torch.allclose((step.mean + step.std * noise) / (1 - t_next), theirs, atol=1e-4)


@pytest.mark.parametrize(("now", "then"), [(999, 759), (759, 499), (499, 259), (259, -1)])
def test_cps_at_level_one_noises_the_prediction_again(drawn, now, then, monkeypatch):
    x, eps, noise = drawn
    stock = LCMScheduler(**BETAS)
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == [999, 759, 499, 259]
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *args, **options: noise)
    theirs = stock.step(eps, torch.tensor(now), x).prev_sample
    t, t_next = times(stock.alphas_cumprod, now, then)
    z, velocity = flow_state(x, eps, t)
    step = cps(z, velocity, t, t_next, 1.0)
    assert torch.allclose(step.mean, (1 - t_next) * (z - t * velocity), atol=1e-5)
    assert float(step.std) == pytest.approx(t_next, abs=1e-7)
    assert torch.allclose((step.mean + step.std * noise) / norm(t_next), theirs, atol=2e-5)


# In float64, where nothing but the formula is left to differ.

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def exact(drawn):
    return [tensor.double() for tensor in drawn]


def widened(stock):
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    return stock


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("now", "then"), [*PAIRS, (249, -1)])
def test_ddim_is_ddim_in_float64(exact, eta, now, then):
    x, eps, noise = exact
    stock = widened(DDIMScheduler(**BETAS, clip_sample=False))
    stock.set_timesteps(4)
    theirs = stock.step(eps, now, x, eta=eta, variance_noise=noise).prev_sample
    t, t_next = times(stock.alphas_cumprod, now, then)
    step = ddim(*flow_state(x, eps, t), t, t_next, eta)
    assert theirs.dtype == step.mean.dtype == torch.float64
    torch.testing.assert_close((step.mean + step.std * noise) / norm(t_next), theirs, **EXACT)


@pytest.mark.parametrize(("now", "then"), [*PAIRS, (249, -1)])
def test_ddim_at_level_one_is_euler_ancestral_in_float64(exact, now, then, monkeypatch):
    """Its step casts the state to ``torch.float32``, by that name: while it runs, the name stands for float64."""
    x, eps, noise = exact
    stock = widened(EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"))
    stock.set_timesteps(4)
    abar = stock.alphas_cumprod[[999, 749, 499, 249]]
    stock.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    t, t_next = times(stock.alphas_cumprod, now, then)
    z, velocity = flow_state(x, eps, t)
    stock.is_scale_input_called = True  # tested above
    with monkeypatch.context() as patch:
        module = "diffusers.schedulers.scheduling_euler_ancestral_discrete"
        patch.setattr(f"{module}.randn_tensor", lambda *args, **options: noise)
        patch.setattr(torch, "float32", torch.float64)
        theirs = stock.step(eps, torch.tensor(float(now)), z / (1 - t)).prev_sample
    step = ddim(z, velocity, t, t_next, 1.0)
    assert theirs.dtype == step.mean.dtype == torch.float64
    torch.testing.assert_close((step.mean + step.std * noise) / (1 - t_next), theirs, **EXACT)


@pytest.mark.parametrize(("now", "then"), [(999, 759), (759, 499), (499, 259), (259, -1)])
def test_cps_at_level_one_is_lcm_in_float64(exact, now, then, monkeypatch):
    """Its boundary scalings, which are left out here, are off by 1e-5 at most as published; in the limit not at all."""
    x, eps, noise = exact
    stock = widened(LCMScheduler(**BETAS, timestep_scaling=1e9))
    stock.set_timesteps(4)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *args, **options: noise)
    theirs = stock.step(eps, torch.tensor(now), x).prev_sample
    t, t_next = times(stock.alphas_cumprod, now, then)
    step = cps(*flow_state(x, eps, t), t, t_next, 1.0)
    assert theirs.dtype == step.mean.dtype == torch.float64
    torch.testing.assert_close((step.mean + step.std * noise) / norm(t_next), theirs, **EXACT)
