import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.diffusion import (
    add_noise,
    eps_from_velocity,
    guide,
    over_samples,
    velocity_from_eps,
    velocity_from_x0,
    x0_from_velocity,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scalars_by_hand():
    # x0 = 2, eps = -1, t = 1/4: x = 0.75 * 2 - 0.25 = 1.25 and v = -3.
    x0, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    x, v = add_noise(x0, eps, 0.25), torch.full((1, 1, 1, 1), -3.0)
    assert x.item() == 1.25
    assert x0_from_velocity(x, v, 0.25).item() == 2.0
    assert eps_from_velocity(x, v, 0.25).item() == -1.0
    assert velocity_from_x0(x, x0, 0.25).item() == -3.0
    assert velocity_from_eps(x, eps, 0.25).item() == -3.0


@given(t=st.floats(0.02, 0.98), video=st.booleans())
def test_round_trips(t: float, video: bool):
    shape = (3, 2, 3, 4, 5) if video else (3, 2, 4, 5)
    x0, eps = randn(*shape), randn(*shape, seed=1)
    times = torch.tensor([t, 0.5, 1 - t])
    x, v = add_noise(x0, eps, times), eps - x0
    torch.testing.assert_close(x0_from_velocity(x, v, times), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eps_from_velocity(x, v, times), eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity_from_x0(x, x0, times), v, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(velocity_from_eps(x, eps, times), v, atol=1e-4, rtol=1e-4)


def test_the_ends():
    x0, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, 1.0), eps)
    torch.testing.assert_close(velocity_from_x0(eps, x0, 1.0), eps - x0)
    torch.testing.assert_close(velocity_from_eps(x0, eps, 0.0), eps - x0)


@pytest.mark.parametrize("t", [0.0, 1e-8, torch.tensor(0.0), torch.tensor([0.5, 0.0])])
def test_no_velocity_from_x0_without_noise(t: float | torch.Tensor):
    with pytest.raises(ValueError, match="needs t > 0"):
        velocity_from_x0(randn(2, 1, 2, 2), randn(2, 1, 2, 2), t)


@pytest.mark.parametrize("t", [1.0, 1 - 1e-7, torch.tensor(1.0), torch.tensor([1.0, 0.5])])
def test_no_velocity_from_eps_without_signal(t: float | torch.Tensor):
    with pytest.raises(ValueError, match="needs t < 1"):
        velocity_from_eps(randn(2, 1, 2, 2), randn(2, 1, 2, 2), t)


def test_guidance():
    uncond, cond = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 3.0)
    assert guide(uncond, cond, 4.5).item() == 1.0 + 4.5 * 2.0
    uncond, cond = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(guide(uncond, cond, 0.0), uncond)
    # A branch that is not needed changes no bit, also where the two differ by orders of magnitude.
    assert torch.equal(guide(1e6 * uncond, cond, 1.0), cond)


def test_guidance_gradient_flows_through_both_branches():
    uncond, cond = randn(1, 1, 2, 2).requires_grad_(), randn(1, 1, 2, 2, seed=1).requires_grad_()
    guide(uncond, cond, 4.5).sum().backward()
    assert uncond.grad is not None and cond.grad is not None
    assert torch.equal(cond.grad, torch.full_like(cond, 4.5))
    assert torch.equal(uncond.grad, torch.full_like(cond, -3.5))


def test_half_precision_is_computed_in_fp32():
    x, v = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1).bfloat16()
    for function in (
        x0_from_velocity,
        eps_from_velocity,
        velocity_from_x0,
        velocity_from_eps,
        add_noise,
    ):
        assert torch.equal(function(x, v, 0.3), function(x.float(), v.float(), 0.3))
    assert torch.equal(guide(x, v, 4.5), guide(x.float(), v.float(), 4.5))


def test_times_go_over_samples_whatever_the_other_sizes():
    # All dimensions are 3: by broadcasting alone [3] would land on the last one.
    for ndim in (2, 3, 4, 5):
        x = randn(*[3] * ndim)
        t = torch.tensor([0.1, 0.2, 0.3])
        together = over_samples(t, x) * x
        assert torch.equal(together, torch.stack([float(a) * row for a, row in zip(t, x, strict=True)]))
        assert torch.equal(together, over_samples(t.reshape(3, *[1] * (ndim - 1)), x) * x)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1), (3, 1, 1, 1), (3, 3), (1,), (2,), (4,), (3, 1, 1, 1, 2)])
def test_a_time_on_the_channels_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="cannot go over the samples"):
        over_samples(torch.rand(shape), randn(3, 3, 3, 3, 3))


def test_shapes_are_never_broadcast():
    x, other = randn(3, 3, 3, 3), randn(1, 3, 3, 3)
    for function in (
        x0_from_velocity,
        eps_from_velocity,
        velocity_from_x0,
        velocity_from_eps,
        add_noise,
    ):
        with pytest.raises(ValueError, match="shapes must be equal"):
            function(x, other, 0.5)
    with pytest.raises(ValueError, match=r"uncond \[1, 3, 3, 3\], cond \[3, 3, 3, 3\]"):
        guide(other, x, 4.5)
