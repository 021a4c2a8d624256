"""The loss of on-policy distillation against numbers that a reader can redo."""

import pytest
import torch

from opd_ray.algorithms.base import Forward
from opd_ray.algorithms.opd import Opd
from opd_ray.config import OpdConfig
from opd_ray.diffusion import flow_sigmas
from opd_ray.errors import ConfigError
from tests.algorithms.parts import item

SIGMAS = flow_sigmas(10, 3.0)  # 1, .960129, .913349, .857692, .790368, .707278, .602151, .464876, .278049, .008929, 0
SHAPE = (2, 3, 2, 2)  # two samples of 12 dimensions


def loss_at(step, *, student=0.5, teacher=0.3, x=1.0, **options):
    """The loss where every element of x, v_S and v_T is the given number, unless it is a tensor."""
    algorithm = Opd(OpdConfig(**options))
    x, student, teacher = (torch.as_tensor(value, dtype=torch.float32).expand(SHAPE) for value in (x, student, teacher))
    forward = Forward(x, float(SIGMAS[step]), float(SIGMAS[step + 1]), step, {}, {}, {"teacher": teacher})
    return algorithm.loss(forward, {"student": student})


# mu = x + v dt at noise 0, so 1/2 (dt 0.2)^2: .02 dt^2 with dt = -.039871, -.105128 and -.269120.
@pytest.mark.parametrize(("step", "expected"), [(0, 3.179e-5), (5, 2.2104e-4), (8, 1.44851e-3)])
def test_objective_mean_on_the_ode(step, expected):
    assert float(loss_at(step).value) == pytest.approx(expected, rel=1e-3)


# At noise 0.7 both means move: mu_S - mu_T = .735065 - .743039 and so on; std is the whole transition's.
@pytest.mark.parametrize(
    ("step", "mu_student", "mu_teacher", "std"),
    [(0, 0.735065, 0.743039, 0.7), (5, 0.846569, 0.872745, 0.352797), (8, 0.741145, 0.808155, 0.22536)],
)
def test_both_objectives_with_noise(step, mu_student, mu_teacher, std):
    half_square = 0.5 * (mu_student - mu_teacher) ** 2
    assert float(loss_at(step, noise_level=0.7).value) == pytest.approx(half_square, rel=1e-3)
    kl = loss_at(step, noise_level=0.7, objective="kl")
    assert float(kl.value) == pytest.approx(half_square / std**2, rel=1e-3)


# The paper's own column. The reference divides by sigma_t^2 without (-dt): 2.59e-6, 2.89e-4, 1.19e-2.
@pytest.mark.parametrize(("step", "expected"), [(0, 6.488e-5), (5, 2.75268e-3), (8, 4.42085e-2)])
def test_kl_is_that_of_the_whole_transition_and_its_metric_is_the_sum(step, expected):
    kl = loss_at(step, noise_level=0.7, objective="kl")
    assert float(kl.value) == pytest.approx(expected, rel=1e-3)
    assert float(kl.metrics["kl"]) == pytest.approx(12 * expected, rel=1e-3)


def test_the_loss_is_a_mean_over_samples_and_dimensions():
    gap = torch.zeros(SHAPE)
    gap[0, 0, 0, 0], gap[1, 2, 1, 1] = 3.0, 4.0  # 9 + 16 over 24 numbers
    loss = loss_at(0, student=gap, teacher=0.0, x=0.0, loss_target="v")
    assert float(loss.value) == pytest.approx(0.5 * 25 / 24)
    assert float(loss.metrics["gap"]) == pytest.approx(25 / 24)


@pytest.mark.parametrize("step", [0, 5, 8])
def test_targets_are_one_distance_in_three_spaces(step):
    rng = torch.Generator().manual_seed(step)
    x, student, teacher = (torch.randn(SHAPE, generator=rng) for _ in range(3))
    values = {
        target: float(loss_at(step, x=x, student=student, teacher=teacher, loss_target=target).value)
        for target in ("xt", "v", "x0")
    }
    dt = float(SIGMAS[step + 1] - SIGMAS[step])
    assert values["v"] == pytest.approx(0.5 * float((student - teacher).square().mean()))
    assert values["xt"] == pytest.approx(dt**2 * values["v"], rel=1e-4)
    assert values["x0"] == pytest.approx(float(SIGMAS[step]) ** 2 * values["v"], rel=1e-4)


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.full(SHAPE, value, requires_grad=True) for value in (0.5, 0.3))
    loss_at(8, student=student, teacher=teacher).value.backward()
    assert teacher.grad is None
    dt = float(SIGMAS[9] - SIGMAS[8])
    torch.testing.assert_close(student.grad, torch.full(SHAPE, dt**2 * 0.2 / 24), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "answer", [torch.zeros(2, 3, 2, 1), torch.zeros(1, 3, 2, 2), torch.zeros(2, 1, 3, 2, 2)], ids=str
)
def test_a_teacher_of_another_shape_is_no_target(answer):
    """Padded teacher slots and broadcasting would add |mu_S|^2 without a word."""
    forward = Forward(torch.zeros(SHAPE), 1.0, 0.9, 0, {}, {}, {"teacher": answer})
    with pytest.raises(ValueError, match="shapes must be equal"):
        Opd(OpdConfig(loss_target="v")).loss(forward, {"student": torch.zeros(SHAPE)})


def test_trained_are_the_first_int_of_099_n_steps():
    assert Opd(OpdConfig()).trained_steps(10) == tuple(range(9))
    assert Opd(OpdConfig(timestep_fraction=1)).trained_steps(10) == tuple(range(10))
    assert Opd(OpdConfig(timestep_fraction=0.5)).trained_steps(7) == (0, 1, 2)
    assert Opd(OpdConfig()).steps(10, 0, 0, "a", 0) == tuple(range(9))


def test_steps_per_item_is_a_seeded_draw_over_all_trained_steps():
    algorithm = Opd(OpdConfig(steps_per_item=3))
    drawn = [algorithm.steps(10, 0, number, "a", 0) for number in range(300)]
    assert all(len(set(steps)) == 3 and list(steps) == sorted(steps) for steps in drawn)
    counts = [sum(step in steps for steps in drawn) for step in range(9)]
    assert all(70 < count < 130 for count in counts), counts  # 100 each, standard deviation 8
    assert not any(9 in steps for steps in drawn)
    assert drawn == [algorithm.steps(10, 0, number, "a", 0) for number in range(300)]
    for other in [(1, 0, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]:  # seed, round, task, index
        assert [algorithm.steps(10, other[0], n + other[1], *other[2:]) for n in range(300)] != drawn
    assert Opd(OpdConfig(steps_per_item=20)).steps(10, 0, 0, "a", 0) == tuple(range(9))


def test_kl_is_refused_where_a_trained_step_is_deterministic():
    last = OpdConfig(objective="kl", kernel="cps", noise_level=0.5, timestep_fraction=1)
    with pytest.raises(ConfigError, match=r"kernel cps, which is 0 at trained step 9; lower algorithm.timestep_frac"):
        Opd(last).check(SIGMAS)
    Opd(last.model_copy(update={"timestep_fraction": 0.99})).check(SIGMAS)
    with pytest.raises(ConfigError, match=r"kernel flow, which is 0 at trained step 0; .* or use objective: mean"):
        Opd(OpdConfig(objective="kl")).check(SIGMAS)
    Opd(OpdConfig(objective="kl", noise_level=0.7, timestep_fraction=1)).check(SIGMAS)
    Opd(OpdConfig(timestep_fraction=1)).check(SIGMAS)


def test_a_noise_level_that_the_kernel_does_not_take_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.noise_level with kernel ddim: noise level 1.5 must be .* \[0, 1"):
        Opd(OpdConfig(kernel="ddim", noise_level=1.5)).check(SIGMAS)


def test_items_weigh_as_a_weighted_mean_over_tasks_of_means_over_items():
    algorithm = Opd(OpdConfig(task_weights={"a": 3.0}))
    items = [item(task="a", index=0), item(task="a", index=1), item(task="b", index=0)]
    weights = [algorithm.item_weight(one, items) for one in items]
    assert weights == pytest.approx([3 / 4 / 2, 3 / 4 / 2, 1 / 4])
