"""PPO in place of the closed form: each cost by hand, what its gradient is on average, and how far it scatters."""

import math
from collections.abc import Mapping

import pytest
import torch

from opd_ray.algorithms import Facts, Forward
from opd_ray.algorithms.opd import Opd
from opd_ray.algorithms.opd_ppo import OpdPpo
from opd_ray.config import OpdConfig, OpdPpoConfig
from opd_ray.errors import ConfigError
from opd_ray.types import Experience, TeacherAnswer, Trajectory
from tests.algorithms.parts import VERSION, item

FORMS = ("differentiable_kl", "per_step", "return_to_go", "sampled")
BOTH = ("mean", "sum")
A = 0.7
STD = 0.35  # of the flow kernel from t = 1/2 to 1/4: A sqrt(t / (1 - t)) sqrt(1/4)
SCALE = -0.25 * (1 + A**2 / 2)  # by which a velocity moves the mean there


def made(form, likelihood="mean", clip=0.5, **changes):
    return OpdPpo(OpdPpoConfig(name="opd_ppo", form=form, likelihood=likelihood, clip_range=clip, **changes))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixel(*values):
    """One row of so many channels of one pixel."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def forward(drawn, teacher, x_next, cost=None, x=None):
    """From t = 1/2 to 1/4, at the origin where no state is given."""
    t, t_next = (torch.full((len(drawn),), value, dtype=torch.float64) for value in (0.5, 0.25))
    inputs = {"drawn": drawn, "teacher": teacher, "x_next": x_next} | ({} if cost is None else {"cost": cost})
    return Forward(torch.zeros_like(drawn) if x is None else x, t, t_next, 0, {}, {}, inputs)


@pytest.mark.parametrize("likelihood", BOTH)
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_loss_by_hand(form, likelihood):
    """Velocities (0, 0) drawn, (0.08, 0) of the student, (0, 0.16) of the teacher: means 0, (d, 0) and (0, 2 d).

    x' = std (1, -1), so log p_student / p_drawn is (2 d std - d^2) / (2 std^2), and log p_drawn / p_teacher is
    (4 d^2 + 4 d std) / (2 std^2), in sums over two numbers.
    """
    d = SCALE * 0.08
    drawn, student, teacher = pixel(0, 0), pixel(0.08, 0), pixel(0, 0.16)
    log = (2 * d * STD - d**2) / (2 * STD**2)
    ratio = math.exp(log if likelihood == "sum" else log / 2)
    sampled = (4 * d**2 + 4 * d * STD) / (2 * STD**2)
    kl = (d**2 + 4 * d**2) / (2 * STD**2)
    cost = {
        "differentiable_kl": kl / 2,
        "per_step": 0.3,  # whatever ``inputs`` found
        "return_to_go": 0.7,
        "sampled": sampled / 2 if likelihood == "sum" else sampled,
    }[form]
    given = torch.tensor([cost], dtype=torch.float64)
    found = made(form, likelihood).loss(
        forward(drawn, teacher, STD * pixel(1, -1), given), {"student": student.requires_grad_()}
    )
    assert found.value.item() == pytest.approx(cost * ratio, abs=1e-10)
    told = {name: value.item() for name, value in found.metrics.items()}
    assert told == pytest.approx({"gap": 0.016, "kl": kl, "ratio": abs(math.log(ratio)), "clipped": 0})


@pytest.mark.parametrize(("cost", "clipped"), [(2.0, False), (-2.0, True)])
def test_a_step_that_grew_likelier_is_held_where_that_pays(cost, clipped):
    """r = exp(0.05): of a cost it goes on counting, of what pays it counts as 1.01."""
    algorithm, given = made("per_step", clip=0.01), torch.tensor([cost], dtype=torch.float64)
    velocity = pixel(-0.1, 0).requires_grad_()
    d = SCALE * -0.1
    x_next = pixel((0.05 * 2 * 2 * STD**2 + d**2) / (2 * d), 0)  # (2 d x' - d^2) / (2 std^2) / 2 = 0.05
    found = algorithm.loss(forward(pixel(0, 0), pixel(1, 1), x_next, given), {"student": velocity})
    assert found.value.item() == pytest.approx(cost * (1.01 if clipped else math.exp(0.05)), abs=1e-10)
    assert found.metrics["clipped"].item() == 1
    (slope,) = torch.autograd.grad(found.value, velocity)
    assert bool(slope.any()) is not clipped


@pytest.mark.parametrize("likelihood", BOTH)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form, likelihood):
    drawn, teacher, eps, x = (normal(2, 1, 2, 2, seed=seed) for seed in range(4))
    one = forward(drawn, teacher, x + STD * eps, normal(2, seed=4), x)
    algorithm = made(form, likelihood, clip=0.9)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return algorithm.loss(one, {"student": student}).value

    student = (drawn + 0.01 * normal(2, 1, 2, 2, seed=5)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student,), atol=1e-6)


SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
TIMES = (0.75, 0.5)


def kl_by_hand(step, gap):
    """(1 + a^2/2)^2 / (2 a^2) (1 - t) / t |dt| gap^2; at t = 1 the std is a, and the mean moves by dt."""
    if step == 0:
        return 0.25**2 * gap**2 / (2 * A**2)
    t = TIMES[step - 1]
    return (1 + A**2 / 2) ** 2 / (2 * A**2) * (1 - t) / t * 0.25 * gap**2


def experience(latents, drawn, teacher):
    """Of tensors [B, S or T, C, H, W]."""
    steps = tuple(range(teacher.shape[1]))
    work = item([f"p{row}" for row in range(len(latents))], steps=steps)
    path = Trajectory(work, VERSION, SIGMAS, latents, {}, {}, velocities=drawn)
    return Experience(work, path, TeacherAnswer("t", steps, teacher))


def test_costs_of_a_whole_drawing_by_hand():
    """Three trained steps of four: two rows, whose gaps of velocities are 1, 2, 3 and 2, 0, 1 in one of two numbers."""
    gaps = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    drawn = normal(2, 3, 2, 1, 1)
    teacher = drawn.clone()
    teacher[:, :, 1, 0, 0] += gaps
    whole = experience(normal(2, 4, 2, 1, 1, seed=1), drawn, teacher)
    expected = torch.tensor([[kl_by_hand(step, gap) / 2 for step, gap in enumerate(row)] for row in gaps.tolist()])
    onward = torch.stack([expected[:, step:].sum(1) for step in range(3)], dim=1)
    for form, costs in (("per_step", expected), ("return_to_go", onward)):
        algorithm = made(form)
        algorithm.facts = Facts(num_steps=4)
        assert algorithm.updates_per_round == 1
        forwards = list(algorithm.forwards(whole, 0))
        assert [one.step for one in forwards] == [0, 1, 2] and all("first" in one.inputs for one in forwards)
        for step, one in enumerate(forwards):
            assert torch.equal(one.x, whole.trajectory.latents[:, step])
            assert torch.equal(one.inputs["x_next"], whole.trajectory.latents[:, step + 1])
            assert torch.equal(one.inputs["drawn"], drawn[:, step])
            assert torch.equal(one.inputs["teacher"], teacher[:, step])
            torch.testing.assert_close(one.inputs["cost"], costs[:, step].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", BOTH)
@pytest.mark.parametrize("form", FORMS)
def test_a_teacher_that_is_the_student_teaches_exactly_nothing(form, likelihood):
    velocities = normal(2, 3, 2, 2, 2).float()
    algorithm = made(form, likelihood)
    algorithm.facts = Facts(num_steps=4)
    for one in algorithm.forwards(experience(normal(2, 4, 2, 2, 2, seed=1).float(), velocities, velocities), 0):
        student = one.inputs["drawn"].clone().requires_grad_()
        found = algorithm.loss(one, {"student": student})
        (slope,) = torch.autograd.grad(found.value, student)
        assert found.value.item() == 0 and not slope.any()


ROWS, D = 40_000, 16


def slopes(form, likelihood):
    """Gradients [ROWS, D] by the step's mean of many drawings of one state, by the policy that drew, and its KL."""
    drawn, eps = 0.3 * normal(1, D, 1, 1), normal(ROWS, D, 1, 1, seed=2)
    teacher = drawn + 1.2 * normal(1, D, 1, 1, seed=1)
    shift = SCALE * (drawn - teacher)
    kl = float(shift.square().sum()) / (2 * STD**2)
    student, theirs = (one.expand(ROWS, -1, -1, -1).clone() for one in (drawn, teacher))
    one = forward(student, theirs, SCALE * student + STD * eps, torch.full((ROWS,), kl / D, dtype=torch.float64))
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(made(form, likelihood).loss(one, {"student": student}).value, student)
    return ROWS * found.reshape(ROWS, D) / SCALE, (shift / (D * STD**2)).flatten(), kl


@pytest.mark.parametrize("likelihood", BOTH)
@pytest.mark.parametrize("form", ["differentiable_kl", "per_step", "sampled"])
def test_what_is_learned_on_average_and_how_far_it_scatters(form, likelihood):
    """At the policy that drew, with K the KL in nats, d dimensions, and all KLs per dimension.

    A cost that does not know eps adds K / d eps / std, or a d-th of that where the ratio is a mean: its mean is 0 and
    its variance (K / d)^2 d / std^2 (arXiv 2605.15055 Eq. 23). The sampled cost is K - D eps / std with D the teacher's
    mean less the student's, |D|^2 = 2 K std^2. Of it times eps / std the mean is -D / std^2, and E |.|^2 =
    (|D|^2 (d + 2) / std^2 + K^2 d) / std^2: the variance is (2 K (d + 1) + K^2 d) / std^2, all over d^2.
    """
    found, exact, kl = slopes(form, likelihood)
    expected = torch.zeros_like(exact) if form == "per_step" else exact
    assert float((found.mean(0) - expected).norm() / exact.norm()) < 0.05
    plain = kl**2 / D / STD**2 / (1 if likelihood == "sum" else D**2)
    variance = (2 * kl * (D + 1) + kl**2 * D) / (D * STD) ** 2 if form == "sampled" else plain
    assert float(found.var(0).sum()) == pytest.approx(variance, rel=0.05)


def test_at_the_policy_that_drew_the_differentiable_form_is_the_closed_form_and_noise():
    """Gradients by the student's velocity: those of objective `kl`, and K eps / std a step."""
    drawn, teacher, eps, x = (normal(3, 2, 2, 2, seed=seed) for seed in range(4))
    mean_of_x = (1 - 0.25 * A**2 / (2 * 0.5)) * x  # at velocity 0: sigma^2 / (2 t) dt with sigma = a
    one = forward(drawn, teacher, mean_of_x + SCALE * drawn + STD * eps, x=x)
    closed = Opd(OpdConfig(objective="kl", noise_level=A))
    student = drawn.clone().requires_grad_()
    exact = closed.loss(one, {"student": student}).value
    (expected,) = torch.autograd.grad(exact, student)
    for likelihood, each in (("mean", 1 / 8), ("sum", 1)):
        found = made("differentiable_kl", likelihood).loss(one, {"student": student})
        assert found.value.item() == pytest.approx(exact.item(), abs=1e-10)
        (slope,) = torch.autograd.grad(found.value, student)
        kl = (SCALE * (drawn - teacher)).square().flatten(1).mean(1) / (2 * STD**2)
        noise = kl.reshape(3, 1, 1, 1) * eps / STD * each * SCALE / 3
        torch.testing.assert_close(slope, expected + noise, rtol=0, atol=1e-10)


def test_the_return_to_go_learns_what_a_step_does_to_later_ones():
    """One number, two trained steps from t = 3/4 on: the teacher's velocity at 1/2 is 2 x', the policy's 0.

    The cost of the second step is w (2 x')^2, so by the first one's mean m its mean has the gradient 8 w m; its own
    cost, whatever it is, counts for nothing.
    """
    t = 0.75
    std = A * math.sqrt(t / (1 - t)) * 0.5
    moved = -0.25 * (1 + A**2 / 2)
    drawn = torch.zeros(ROWS, 3, 1, 1, 1, dtype=torch.float64)
    drawn[:, 1] = -1.0
    latents = torch.zeros(ROWS, 4, 1, 1, 1, dtype=torch.float64)
    mean = -moved
    latents[:, 2] = mean + std * normal(ROWS, 1, 1, 1)
    teacher = drawn.clone()
    teacher[:, 1] += 0.5
    teacher[:, 2] = 2 * latents[:, 2]
    algorithm = made("return_to_go")
    algorithm.facts = Facts(num_steps=4)
    one = list(algorithm.forwards(experience(latents, drawn, teacher), 0))[1]
    student = one.inputs["drawn"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(algorithm.loss(one, {"student": student}).value, student)
    assert float(slope.sum()) / moved == pytest.approx(8 * kl_by_hand(2, 1) * mean, rel=0.05)


def test_a_rollout_that_computes_otherwise_is_told():
    inputs: Mapping[str, torch.Tensor] = forward(pixel(0, 0), pixel(1, 0), pixel(0.1, 0)).inputs
    one = forward(pixel(0, 0), pixel(1, 0), pixel(0.1, 0))
    first = Forward(one.x, one.t, one.t_next, 0, {}, {}, {**inputs, "first": torch.ones(1)})
    found = made("sampled", clip=1e-4).loss(first, {"student": pixel(0.01, 0)})
    assert "rollout and learner compute differently" in str(found.refused)


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_there_is_no_density(form):
    with pytest.raises(ValueError, match=r"noise_level 0 leaves steps without a density.*or use algorithm opd with ob"):
        made(form, noise_level=0.0)
    with pytest.raises(ConfigError, match=r"no noise at step 3; lower .*, or use algorithm opd with objective: mean"):
        made(form, kernel="cps", timestep_fraction=1.0).check(SIGMAS)
    made(form).check(SIGMAS)
