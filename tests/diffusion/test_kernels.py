import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opd_ray.diffusion as diffusion
from opd_ray.diffusion import KERNELS, Kernel, Step, flow, flow_sigmas, log_prob, sample

SIGMAS = flow_sigmas(10, 3.0).tolist()
SHAPES = [(1, 1, 1, 1), (3, 2, 4, 5), (2, 3, 2, 4, 5)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def states(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


# References: float64, term by term as published.


def flow_reference(x, v, t, t_next, a):
    dt = t_next - t
    sigma = a * math.sqrt(t / (1 - (t_next if t == 1 else t)))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma * math.sqrt(-dt)


def dance_reference(x, v, t, t_next, a):
    dt = t_next - t
    x0 = x - t * v
    score = -(x - (1 - t) * x0) / t**2
    return x + v * dt - 0.5 * a**2 * score * dt, a * math.sqrt(-dt)


def cps_reference(x, v, t, t_next, a):
    x0, eps = x - t * v, x + (1 - t) * v
    std = t_next * math.sin(a * math.pi / 2)
    return (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * eps, std


def ddim_reference(x, v, t, t_next, a):
    x0, eps = x - t * v, x + (1 - t) * v
    std = a * t_next * math.sqrt(1 - t_next**2 * (1 - t) ** 2 / (t**2 * (1 - t_next) ** 2))
    return (1 - t_next) * x0 + math.sqrt(max(t_next**2 - std**2, 0.0)) * eps, std


REFERENCES = {
    "flow": flow_reference,
    "dance": dance_reference,
    "cps": cps_reference,
    "ddim": ddim_reference,
}


# x = 1, v_S = 0.5, v_T = 0.3, ten steps of shift 3, a = 0.7.
GOLDEN = {
    0: (1.0, -0.039871, 3.505671, 0.7, 0.735065, 0.743039),
    5: (0.707278, -0.105128, 1.088093, 0.352797, 0.846569, 0.872745),
    8: (0.278049, -0.26912, 0.434415, 0.22536, 0.741145, 0.808155),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("j", GOLDEN)
def test_golden_flow_steps(j: int, shape: tuple[int, ...]):
    t, dt, sigma, std, mean_s, mean_t = GOLDEN[j]
    assert SIGMAS[j] == pytest.approx(t, abs=1e-6)
    assert SIGMAS[j + 1] - SIGMAS[j] == pytest.approx(dt, abs=1e-6)
    x = torch.ones(shape)
    for v, mean in ((0.5, mean_s), (0.3, mean_t)):
        step = flow(x, v * x, SIGMAS[j], SIGMAS[j + 1], 0.7)
        torch.testing.assert_close(step.mean, torch.full(shape, mean), atol=1e-6, rtol=0)
        assert step.std.item() == pytest.approx(std, abs=1e-6)
        # The std is the whole transition's. The published code returns sigma_t here.
        assert step.std.item() == pytest.approx(sigma * math.sqrt(-dt), rel=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@given(
    t=st.one_of(st.just(1.0), st.floats(0.02, 0.99)),
    ratio=st.one_of(st.just(0.0), st.floats(0.0, 0.98)),
    noise_level=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0)),
)
def test_kernels_equal_their_published_forms(
    name: str, shape: tuple[int, ...], t: float, ratio: float, noise_level: float
):
    x, v = states(*shape)
    mean, std = REFERENCES[name](x.double(), v.double(), t, t * ratio, noise_level)
    step = KERNELS[name](x, v, t, t * ratio, noise_level)
    # The pull reaches a^2 / (2 (1 - t)) = 50, and 1 - t at 0.99 has 3e-6 of relative error.
    torch.testing.assert_close(step.mean, mean.float(), atol=2e-5, rtol=2e-5)
    assert step.std.item() == pytest.approx(std, abs=1e-5, rel=2e-5)


@every_kernel
@given(t=st.one_of(st.just(1.0), st.floats(0.01, 1.0)), ratio=st.floats(0.0, 0.98))
def test_without_noise_every_kernel_is_the_euler_step_bit_for_bit(kernel: Kernel, t: float, ratio: float):
    x, v = states(2, 3, 4, 5)
    step = kernel(x, v, t, t * ratio, 0.0)
    now, then = torch.tensor(t), torch.tensor(t * ratio)
    assert torch.equal(step.mean, x + (then - now) * v)
    assert step.std.item() == 0
    assert torch.equal(sample(step), step.mean)


def test_flow_at_pure_noise_uses_the_second_time_inside_the_root_only():
    x, v = states(2, 3, 4, 5)
    t_next, a = 0.96, 0.7
    step = flow(x, v, 1.0, t_next, a)
    # sigma_t^2 dt / 2 = -a^2 / 2 multiplies x; v has no factor, because its 1 - t stays 0.
    torch.testing.assert_close(step.mean, (1 - a**2 / 2) * x + (t_next - 1) * v)
    assert step.std.item() == pytest.approx(a)
    # One rounding error below 1 is 1, too: sigma_t would be 4096 a.
    almost = flow(x, v, math.nextafter(1.0, 0.0) - 6e-8, t_next, a)
    torch.testing.assert_close(almost.mean, step.mean)
    assert almost.std.item() == pytest.approx(a, rel=1e-5)


@given(t=st.floats(0.05, 0.95), fraction=st.floats(1e-4, 1e-3))
def test_ddim_keeps_its_digits_on_short_steps(t: float, fraction: float):
    # As published, 1 - r^2 of an r = 0.9999 has lost four of fp32's seven digits.
    now = torch.tensor(t)
    then = now * (1 - fraction)
    x, v = states(1, 1, 2, 2)
    _, std = ddim_reference(x.double(), v.double(), now.item(), then.item(), 0.7)
    assert KERNELS["ddim"](x, v, now, then, 0.7).std.item() == pytest.approx(std, rel=1e-6)


def test_one_step_from_noise_to_image():
    x, v = states(2, 3, 4, 5)
    for name, kernel in KERNELS.items():
        step = kernel(x, v, 1.0, 0.0, 0.7)
        assert torch.isfinite(step.mean).all(), name
        if name in ("cps", "ddim"):
            torch.testing.assert_close(step.mean, x - v)
            assert step.std.item() == 0


@every_kernel
@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (3, 3, 3, 3, 3), (3, 2, 4, 5)])
def test_times_per_sample_equal_a_loop_over_samples(kernel: Kernel, shape: tuple[int, ...]):
    # Sizes are equal on purpose: a time that lands on the channels raises nothing there.
    x, v = states(*shape)
    now, then = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.1, 0.0])
    step = kernel(x, v, now, then, 0.7)
    assert step.std.shape == (3,) + (1,) * (len(shape) - 1)
    for i in range(3):
        row = slice(i, i + 1)
        alone = kernel(x[row], v[row], now[i].item(), then[i].item(), 0.7)
        assert torch.equal(step.mean[row], alone.mean)
        assert torch.equal(step.std[i].squeeze(), alone.std)
        scalars = kernel(x[row], v[row], now[i], then[i], 0.7)
        assert torch.equal(scalars.mean, alone.mean)
    mixed = kernel(x, v, now, 0.0, 0.7)
    assert torch.equal(mixed.mean[1:2], kernel(x[1:2], v[1:2], now[1].item(), 0.0, 0.7).mean)


@every_kernel
def test_a_time_per_frame_is_refused(kernel: Kernel):
    # [1, S, 1, 1, 1] right-aligns S on the channels of a video; with C = S nothing would complain.
    x, v = states(2, 3, 3, 4, 4)
    with pytest.raises(ValueError, match="cannot go over the samples"):
        kernel(x, v, torch.full((1, 3, 1, 1, 1), 0.5), 0.4, 0.7)
    with pytest.raises(ValueError, match="cannot go over the samples"):
        kernel(x, v, 0.5, torch.full((3,), 0.4), 0.7)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(kernel: Kernel, dtype: torch.dtype):
    x, v = (tensor.to(dtype) for tensor in states(2, 3, 4, 5))
    step = kernel(x, v, 0.3, 0.25, 0.7)
    assert step.mean.dtype == torch.float32
    assert step.std.dtype == torch.float32
    assert torch.equal(step.mean, kernel(x.float(), v.float(), 0.3, 0.25, 0.7).mean)
    assert not torch.equal(step.mean, step.mean.to(dtype).float())
    noise = torch.randn(2, 3, 4, 5).to(dtype)
    drawn = sample(step, noise)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, sample(step, noise.float()))
    times = torch.tensor([0.3, 0.6], dtype=torch.float64)
    assert kernel(x, v, times, 0.25, 0.7).mean.dtype == torch.float32


@every_kernel
def test_gradient_flows_to_the_velocity(kernel: Kernel):
    x, v = states(2, 3, 4, 5)
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, v, 0.5, 0.4, 0.0).mean.sum(), v)
    torch.testing.assert_close(gradient, torch.full_like(v, -0.1))


@every_kernel
@pytest.mark.parametrize(
    ("t", "t_next"),
    [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1), (0.0, 0.0), (math.nan, 0.1)],
)
def test_times_must_fall_within_the_unit_interval(kernel: Kernel, t: float, t_next: float):
    x, v = states(2, 3, 4, 5)
    with pytest.raises(ValueError, match="1 >= t > t_next >= 0"):
        kernel(x, v, t, t_next, 0.7)
    with pytest.raises(ValueError, match="1 >= t > t_next >= 0"):
        kernel(x, v, torch.tensor([0.9, t]), torch.tensor([0.8, t_next]), 0.7)


@every_kernel
@pytest.mark.parametrize("noise_level", [-0.1, math.inf, math.nan])
def test_noise_level_must_be_a_size(kernel: Kernel, noise_level: float):
    with pytest.raises(ValueError, match="noise level"):
        kernel(*states(1, 1, 2, 2), 0.5, 0.4, noise_level)


def test_noise_level_beyond_one_has_no_meaning_for_two_kernels():
    x, v = states(1, 1, 2, 2)
    for name in ("cps", "ddim"):
        with pytest.raises(ValueError, match=r"in \[0, 1.0\]"):
            KERNELS[name](x, v, 0.5, 0.4, 1.2)
    for name in ("flow", "dance"):
        assert KERNELS[name](x, v, 0.5, 0.4, 1.2).std > 0


@every_kernel
def test_a_velocity_of_another_shape_is_refused(kernel: Kernel):
    x, v = states(3, 3, 3, 3)
    with pytest.raises(ValueError, match="shapes must be equal"):
        kernel(x, v[:1], 0.5, 0.4, 0.7)


@every_kernel
def test_the_noise_level_alone_decides_whether_a_step_is_random(kernel: Kernel):
    # A switch "deterministic" beside it is how the published code divides by 0 at noise 0.7.
    expected = ["x", "v", "t", "t_next", "noise_level"]
    assert list(inspect.signature(kernel).parameters) == expected


def test_sample_adds_the_std_once():
    step = Step(mean=torch.full((2, 1, 1, 1), 5.0), std=torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1))
    assert sample(step, torch.full((2, 1, 1, 1), -1.0)).flatten().tolist() == [4.5, 3.0]


def test_a_random_step_needs_noise_of_its_own_shape():
    step = flow(*states(2, 3, 4, 5), 0.5, 0.4, 0.7)
    with pytest.raises(ValueError, match="give it noise"):
        sample(step)
    with pytest.raises(ValueError, match="shapes must be equal"):
        sample(step, torch.zeros(1, 3, 4, 5))  # would be shared by the batch


def test_log_prob_by_hand():
    # Deviations 0.5 and -1 at std 0.5: z^2 / 2 = 0.5 and 2.
    step = Step(mean=torch.zeros(1, 1, 1, 2), std=torch.tensor(0.5))
    x_next = torch.tensor([0.5, -1.0]).reshape(1, 1, 1, 2)
    constant = -math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert log_prob(x_next, step).item() == pytest.approx(-1.25 + constant)
    assert log_prob(x_next, step, reduction="sum").item() == pytest.approx(-2.5 + 2 * constant)


@every_kernel
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_log_prob_equals_torch_distributions(kernel: Kernel, shape: tuple[int, ...]):
    x, v = states(*shape)
    times = torch.linspace(0.9, 0.5, shape[0])
    step = kernel(x, v, times, times / 2, 0.7)
    x_next = sample(step, torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    elementwise = torch.distributions.Normal(step.mean, step.std).log_prob(x_next).flatten(1)
    torch.testing.assert_close(log_prob(x_next, step), elementwise.mean(1))
    torch.testing.assert_close(log_prob(x_next, step, reduction="sum"), elementwise.sum(1))


def test_log_prob_of_a_drawn_state_keeps_its_gradient():
    # d log p / d mean = (x_next - mean) / std^2 = noise / std, also if x_next still has its graph.
    mean = torch.zeros(1, 1, 1, 1, requires_grad=True)
    step = Step(mean=mean, std=torch.tensor(0.5))
    x_next = sample(step, torch.ones(1, 1, 1, 1))
    (gradient,) = torch.autograd.grad(log_prob(x_next, step).sum(), mean)
    assert gradient.item() == 1 / 0.5


@every_kernel
def test_a_deterministic_step_has_no_log_prob(kernel: Kernel):
    x, v = states(2, 3, 4, 5)
    with pytest.raises(ValueError, match="deterministic step has no density"):
        log_prob(x, kernel(x, v, 0.5, 0.4, 0.0))
    last = kernel(x, v, 0.1, 0.0, 0.7)
    if last.std == 0:  # cps and ddim end on the image itself, whatever the noise level
        with pytest.raises(ValueError, match="deterministic step has no density"):
            log_prob(x, last)


def test_log_prob_refuses_broadcasting_and_unknown_reductions():
    x, v = states(2, 3, 4, 5)
    step = flow(x, v, 0.5, 0.4, 0.7)
    with pytest.raises(ValueError, match="shapes must be equal"):
        log_prob(x[:1], step)
    with pytest.raises(ValueError, match="Known: 'sum', 'mean'"):
        log_prob(x, step, reduction="max")  # type: ignore[arg-type]


def test_std_by_hand_lands_on_the_samples():
    step = Step(mean=torch.zeros(3, 3, 3, 3), std=torch.tensor([1.0, 2.0, 3.0]))
    drawn = sample(step, torch.ones(3, 3, 3, 3))
    assert drawn.flatten(1).mean(1).tolist() == [1.0, 2.0, 3.0]
    assert log_prob(drawn, step).tolist() == pytest.approx(
        [-0.5 - math.log(s) - 0.5 * math.log(2 * math.pi) for s in (1, 2, 3)]
    )


def test_everything_public_is_exported():
    assert diffusion.__all__ == sorted(set(diffusion.__all__))
    for name in diffusion.__all__:
        assert getattr(diffusion, name) is not None
    functions = {
        name for name, member in vars(diffusion).items() if inspect.isfunction(member) and not name.startswith("_")
    }
    assert functions <= set(diffusion.__all__)
