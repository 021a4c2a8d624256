import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.diffusion import KERNELS, flow, flow_sigmas, gaussian_kl, half_squared_distance

SIGMAS = flow_sigmas(10, 3.0).tolist()
SHAPES = [(1, 1, 1, 1), (3, 2, 4, 5), (2, 3, 2, 4, 5)]


def velocity_weight(t: float, t_next: float, noise_level: float) -> float:
    """KL of the flow kernel per ||v_S - v_T||^2: sigma_t^2 (1 - t) / (2t) = a^2 / 2 whatever t."""
    if t == 1:
        dt, std = t_next - 1, noise_level
        return dt**2 / (2 * std**2)
    pull = (1 + noise_level**2 / 2) ** 2 / (2 * noise_level**2)
    return pull * (1 - t) / t * (t - t_next)


# x = 1, v_S = 0.5, v_T = 0.3, ten steps, a = 0.7: KL, KL without the (-dt), 1/2 ||.||^2 of the ODE.
GOLDEN = {
    0: (6.488e-5, 2.59e-6, 3.179e-5),
    5: (2.75268e-3, 2.8938e-4, 2.2104e-4),
    8: (4.42085e-2, 1.18974e-2, 1.44851e-3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("j", GOLDEN)
def test_golden_losses(j: int, shape: tuple[int, ...]):
    kl, without_dt, ode = GOLDEN[j]
    t, t_next = SIGMAS[j], SIGMAS[j + 1]
    x = torch.ones(shape)

    student, teacher = flow(x, 0.5 * x, t, t_next, 0.7), flow(x, 0.3 * x, t, t_next, 0.7)
    mean = gaussian_kl(student.mean, teacher.mean, student.std, reduction="mean")
    assert mean.shape == shape[:1]
    assert mean.tolist() == pytest.approx([kl] * shape[0], rel=2e-4)
    total = gaussian_kl(student.mean, teacher.mean, student.std, reduction="sum")
    assert total.tolist() == pytest.approx([kl * math.prod(shape[1:])] * shape[0], rel=2e-4)
    # The published code divides by sigma_t^2 alone: its loss is the KL times -dt.
    assert mean[0].item() * (t - t_next) == pytest.approx(without_dt, rel=2e-3)

    student, teacher = flow(x, 0.5 * x, t, t_next, 0.0), flow(x, 0.3 * x, t, t_next, 0.0)
    loss = half_squared_distance(student.mean, teacher.mean)
    assert loss.tolist() == pytest.approx([ode] * shape[0], rel=2e-4)
    total = half_squared_distance(student.mean, teacher.mean, reduction="sum")
    assert total.tolist() == pytest.approx([ode * math.prod(shape[1:])] * shape[0], rel=2e-4)


def test_weight_of_every_step_in_velocity_space():
    x, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    ode, sde = [], []
    for t, t_next in itertools.pairwise(SIGMAS):
        student, teacher = flow(x, x, t, t_next, 0.0), flow(x, zero, t, t_next, 0.0)
        ode.append(half_squared_distance(student.mean, teacher.mean).item())
        student, teacher = flow(x, x, t, t_next, 0.7), flow(x, zero, t, t_next, 0.7)
        sde.append(gaussian_kl(student.mean, teacher.mean, student.std, reduction="sum").item())
    assert ode == pytest.approx(
        [0.0008, 0.0011, 0.0016, 0.0023, 0.0035, 0.0055, 0.0094, 0.0175, 0.0362, 0.00004], rel=0.05
    )
    assert sde == pytest.approx([0.0016, 0.0031, 0.0084, 0.018, 0.035, 0.069, 0.144, 0.340, 1.105, 1.57], rel=0.03)
    # The ODE puts nearly half of its weight on one step, and nothing on the one that is left out.
    assert ode[8] / sum(ode) == pytest.approx(0.46, abs=0.01)
    assert max(range(10), key=sde.__getitem__) == 9


@given(
    t=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    ratio=st.floats(0.0, 0.9),
    noise_level=st.floats(0.05, 1.5),
)
def test_kl_is_a_weighted_velocity_distance(t: float, ratio: float, noise_level: float):
    generator = torch.Generator().manual_seed(0)
    x, v_s, v_t = torch.randn((3, 2, 3, 4, 5), generator=generator)
    student = flow(x, v_s, t, t * ratio, noise_level)
    teacher = flow(x, v_t, t, t * ratio, noise_level)
    kl = gaussian_kl(student.mean, teacher.mean, student.std, reduction="sum")
    expected = velocity_weight(t, t * ratio, noise_level) * (v_s - v_t).square().flatten(1).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-3, atol=0)


def test_kl_equals_torch_distributions():
    p, q = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    std = torch.tensor([0.2, 0.7, 3.0])
    normals = [torch.distributions.Normal(m, std.reshape(3, 1, 1, 1).double()) for m in (p, q)]
    expected = torch.distributions.kl_divergence(*normals).sum((1, 2, 3)).float()
    kl = gaussian_kl(p.float(), q.float(), std, reduction="sum")
    torch.testing.assert_close(kl, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_equal_teacher_and_student_give_zero_and_no_gradient(name: str):
    x, v = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    v_s = v.clone().requires_grad_()
    student, teacher = KERNELS[name](x, v_s, 0.7, 0.6, 0.7), KERNELS[name](x, v, 0.7, 0.6, 0.7)
    loss = gaussian_kl(student.mean, teacher.mean, student.std, reduction="mean")
    loss = loss + half_squared_distance(student.mean, teacher.mean)
    assert torch.equal(loss, torch.zeros(2))
    (gradient,) = torch.autograd.grad(loss.sum(), v_s)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradient_is_the_papers():
    # Eq. 15 in mu: (mu_S - mu_T) / std^2, averaged over the dimensions.
    mu_s = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    mu_t = torch.tensor([[[[0.5, 4.0]]]])
    (kl,) = torch.autograd.grad(gaussian_kl(mu_s, mu_t, 0.5, reduction="mean").sum(), mu_s)
    assert kl.flatten().tolist() == [0.5 / 0.25 / 2, -2.0 / 0.25 / 2]
    (ode,) = torch.autograd.grad(half_squared_distance(mu_s, mu_t).sum(), mu_s)
    assert ode.flatten().tolist() == [0.5 / 2, -2.0 / 2]


def test_no_kl_of_a_deterministic_step():
    # The published code clamps std^2 at 1e-8 and returns 5e7 ||.||^2, 1e8 times the ODE's loss.
    p, q = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    deterministic = [flow(p, q, 0.5, 0.4, 0.0).std, KERNELS["cps"](p, q, 0.5, 0.0, 0.7).std]
    for std in [*deterministic, 0.0, -0.1, math.nan, torch.tensor([0.1, 0.0])]:
        with pytest.raises(ValueError, match="deterministic step has no density and no KL"):
            gaussian_kl(p, q, std, reduction="mean")


def test_vanishing_noise_neither_overflows_nor_is_clamped():
    p, q = torch.full((1, 1, 1, 1), 3e-25), torch.zeros(1, 1, 1, 1)
    assert gaussian_kl(p, q, 1e-25, reduction="sum").item() == pytest.approx(4.5)


def test_half_precision_is_computed_in_fp32():
    p, q = torch.full((1, 1, 2, 2), 300.0).half(), torch.full((1, 1, 2, 2), -300.0).half()
    assert half_squared_distance(p, q).item() == 180_000.0  # beyond fp16
    assert gaussian_kl(p, q, 1.0, reduction="mean").item() == 180_000.0


def test_a_row_does_not_depend_on_its_neighbours():
    p, q = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 0.2, 0.3, 0.4])
    order = [2, 0, 3, 1]
    for reduction in ("sum", "mean"):
        straight = gaussian_kl(p, q, std, reduction=reduction)
        shuffled = gaussian_kl(p[order], q[order], std[order], reduction=reduction)
        assert torch.equal(straight[order], shuffled)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (2, 1, 2, 4, 4), (2, 2, 4, 1), (2, 2, 4)])
def test_padded_teachers_cannot_broadcast(shape: tuple[int, ...]):
    student, teachers = torch.ones(2, 2, 4, 4), torch.zeros(shape)
    with pytest.raises(ValueError, match="shapes must be equal"):
        half_squared_distance(student, teachers)
    with pytest.raises(ValueError, match="shapes must be equal"):
        gaussian_kl(student, teachers, 1.0, reduction="mean")


def test_unknown_reduction_is_refused():
    p = torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"'none' is unknown\. Known: 'sum', 'mean'"):
        half_squared_distance(p, p, reduction="none")  # type: ignore[arg-type]
