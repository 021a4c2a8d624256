"""The SDE draws the same images as the ODE: its marginals are those of the path it was trained on.

The target is Gaussian, x0 ~ N(MEAN, SPREAD^2), so x_t ~ N((1-t) MEAN, (1-t)^2 SPREAD^2 + t^2) and
the true velocity E[eps - x0 | x_t] is affine in x_t.
"""

import itertools

import pytest
import torch

from opd_ray.diffusion import KERNELS, sample

MEAN, SPREAD = 1.5, 0.5


def marginal(t: float, spread: float = SPREAD) -> tuple[float, float]:
    return (1 - t) * MEAN, (1 - t) ** 2 * spread**2 + t**2


def velocity(x: torch.Tensor, t: float, spread: float = SPREAD) -> torch.Tensor:
    mean, variance = marginal(t, spread)
    return (t - (1 - t) * spread**2) / variance * (x - mean) - MEAN


def transport(name: str, times: list[float], noise_level: float, spread: float = SPREAD) -> tuple[float, float]:
    """Mean and variance at the last time; an affine step: m -> Am + b, V -> A^2 V + std^2."""
    mean, variance = marginal(times[0], spread)
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    for t, t_next in itertools.pairwise(times):
        step = KERNELS[name](x, velocity(x, t, spread), t, t_next, noise_level)
        offset, end = step.mean.flatten().tolist()
        slope = end - offset
        mean, variance = slope * mean + offset, slope**2 * variance + step.std.item() ** 2
    return mean, variance


def grid(start: float, end: float, num_steps: int) -> list[float]:
    return [start + (end - start) * i / num_steps for i in range(num_steps + 1)]


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("name", ["flow", "dance", "ddim"])
def test_error_of_the_marginals_is_of_first_order(name: str, noise_level: float):
    # From t = 0.9: the replacement of sigma_t at t = 1 is not of first order (next test).
    _, exact = marginal(0.1)
    errors = [transport(name, grid(0.9, 0.1, n), noise_level)[1] - exact for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.25)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.25)
    assert abs(errors[2]) < 0.01
    assert transport(name, grid(0.9, 0.1, 200), noise_level)[0] == pytest.approx(0.9 * MEAN, abs=0.01)


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_first_flow_step_from_pure_noise_is_too_wide_by_a_constant(num_steps: int):
    # With sigma_t^2 = a^2 / (1 - t_1), pull = -a^2 / 2 and std = a whatever the step's length: the
    # variance becomes (1 - a^2 / 2)^2 + a^2 = 1 + a^4 / 4 for t_1 -> 1. Known, and the paper's.
    t_next = 1 - 1 / num_steps
    _, variance = transport("flow", [1.0, t_next], 0.7)
    assert variance - marginal(t_next)[1] == pytest.approx(0.7**4 / 4, abs=0.5 / num_steps)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["cps", "ddim"])
def test_on_a_single_image_the_noise_is_on_schedule_after_any_step(name: str, noise_level: float):
    for times in ([1.0, 0.4], [1.0, 0.7, 0.2], grid(1.0, 0.05, 13)):
        mean, variance = transport(name, times, noise_level, spread=0.0)
        assert mean == pytest.approx((1 - times[-1]) * MEAN, abs=1e-5)
        assert variance == pytest.approx(times[-1] ** 2, abs=1e-5)


def test_cps_narrows_a_spread_target_however_many_steps():
    # Its std is t' sin(a pi / 2) whatever the step's length: no discretised SDE, and known.
    errors = [transport("cps", grid(0.9, 0.1, n), 0.7)[1] - marginal(0.1)[1] for n in (50, 100, 200)]
    assert errors == pytest.approx([-0.06] * 3, abs=0.005)


def test_monte_carlo_samples_of_the_flow_sde_follow_the_path():
    generator = torch.Generator().manual_seed(0)
    times = grid(1.0, 0.0, 100)
    x = torch.randn(20_000, 1, 1, 1, generator=generator)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        step = KERNELS["flow"](x, velocity(x, t), t, t_next, 0.7)
        x = sample(step, torch.randn(x.shape, generator=generator))
        if i >= 20 and i % 10 == 9:
            mean, variance = marginal(t_next)
            assert x.mean().item() == pytest.approx(mean, abs=0.02), t_next
            assert x.var().item() == pytest.approx(variance, rel=0.08), t_next
