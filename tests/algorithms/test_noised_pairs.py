"""Diffusion-DPO, Flow-DPO, IPO, SFT and offline PSO against arithmetic by hand."""

import math

import pytest
import torch

from opd_ray.algorithms.base import Facts
from opd_ray.algorithms.dpo import DiffusionDpo, preference_loss
from opd_ray.algorithms.noised_pairs import errors
from opd_ray.algorithms.pso_offline import PsoOffline, hinge
from opd_ray.config import DpoConfig, PsoOfflineConfig
from opd_ray.diffusion import add_noise
from opd_ray.errors import ConfigError
from opd_ray.seeds import noise
from opd_ray.types import Experience, Prompt, Trajectory, WorkItem
from tests.algorithms.parts import VERSION, item


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


def dpo(**changes):
    return DiffusionDpo(DpoConfig(name="diffusion_dpo", **changes))


def recorded(rows=2):
    """Pairs of latents [rows, 1, 2, 2], and prompts of one number."""
    better, worse = noise(range(rows), (1, 2, 2)), noise(range(rows, 2 * rows), (1, 2, 2))
    cond = {"cond.prompt": torch.arange(rows).float()[:, None] + 1, "empty.prompt": torch.zeros(1, 1)}
    return Experience(item(), recorded={"winner": better, "loser": worse, **cond})


def predicted(forward, seed):
    return noise(range(seed, seed + len(forward.x)), forward.x.shape[1:])


class TestErrors:
    def test_by_hand(self):
        """Velocities of one number: student 1 and 3, reference 2 and 0, target 0; weights 1 and 0.5."""
        student, reference, target = (real(*pair).view(2, 1, 1, 1) for pair in ((1, 3), (2, 0), (0, 0)))
        found = errors(student, reference, target, real(1, 0.5).view(2, 1, 1, 1))
        assert (found.better, found.worse) == (1.0, 0.5 * 9)
        assert (found.reference_better, found.reference_worse) == (4.0, 0.0)
        assert (found.gain_better, found.gain_worse) == (1.0 - 4.0, 4.5 - 0.0)

    def test_the_gain_keeps_what_a_difference_of_errors_loses(self):
        student, target = torch.randn(2, 16, 8, 8).double(), 30 * torch.randn(2, 16, 8, 8).double()
        reference, one = student + 1e-5 * torch.randn_like(student), torch.ones(2, 1, 1, 1).double()
        exact = errors(student, reference, target, one).gain_better
        single = errors(*(tensor.float() for tensor in (student, reference, target, one)))
        apart = (single.gain_better - exact).abs(), (single.better - single.reference_better - exact).abs()
        assert apart[0] < 0.1 * apart[1]


class TestLosses:
    def test_by_hand(self):
        """h = 0.02 and -0.01, beta 100: margins 2 and -1."""
        h = real(0.02, -0.01)
        expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]
        assert preference_loss(h, 100.0).tolist() == pytest.approx(expected, abs=1e-10)
        assert preference_loss(h, 100.0, ipo=True).tolist() == pytest.approx([1.5**2, 1.5**2], abs=1e-10)
        assert hinge(real(0.2, 3.0), real(0.5, 40.0), 5.0, 0.1, 0.5).tolist() == pytest.approx(
            [1 + 5 * (0.2 - 0.05) + 0.5 * 0.5, 0 + 0.5 * 40.0], abs=1e-10
        )

    def test_gradients_are_finite_differences(self):
        reference, target = (torch.randn(4, 1, 2, 2, dtype=torch.float64) for _ in range(2))
        weight = real(1, 0.5, 0.3, 2).view(4, 1, 1, 1)

        def of(loss):
            def value(student):
                found = errors(student, reference, target, weight)
                return loss(-0.5 * (found.gain_better - found.gain_worse))

            return value

        student = torch.randn(4, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        for loss in (lambda h: preference_loss(h, 3.0), lambda h: preference_loss(h, 3.0, ipo=True)):
            assert torch.autograd.gradcheck(of(loss), (student,), atol=1e-6)

    def test_at_the_reference_it_is_log_two_with_opposite_slopes(self):
        algorithm = dpo(beta=100.0)
        (forward,) = algorithm.forwards(recorded(), 0)
        both = predicted(forward, 10)
        student = both.clone().requires_grad_()
        loss = algorithm.loss(forward, {"student": student, "reference": both})
        assert float(loss.value.detach()) == pytest.approx(math.log(2), abs=1e-7)
        (slope,) = torch.autograd.grad(loss.value, student)
        # Of -log sigmoid(beta h) at 0: beta / 4 of the error's slope 2 (v - target) / numbers; a mean over two pairs.
        expected = 100 / 4 * 2 * (both - forward.inputs["target"]) / 4 / 2
        assert torch.allclose(slope, torch.cat([expected[:2], -expected[2:]]), rtol=1e-4)

    @pytest.mark.parametrize(("space", "power"), [("velocity", 0), ("eps", 2), ("x0", -2)])
    def test_the_space_weighs_times_as_its_conversion_does(self, space, power):
        """eps - eps' = (1 - t)(v - v') and x0 - x0' = t (v' - v) at one state."""
        algorithm = dpo(space=space, times="uniform")
        (forward,) = algorithm.forwards(recorded(), 0)
        student, reference = predicted(forward, 10), predicted(forward, 20)
        t = forward.t.view(-1, 1, 1, 1)
        factor = {0: torch.ones_like(t), 2: 1 - t, -2: t}[power]
        target = forward.inputs["target"]
        plain = [((factor * (v - target)) ** 2).flatten(1).mean(1) for v in (student, reference)]
        found = algorithm.errors(forward, {"student": student, "reference": reference})
        assert torch.allclose(found.better, plain[0][:2]) and torch.allclose(found.reference_worse, plain[1][2:])

    def test_sft_sees_the_better_images_alone(self):
        algorithm = dpo(loss="sft")
        (forward,) = algorithm.forwards(recorded(), 0)
        assert len(forward.x) == 2 and not algorithm.velocities
        student = predicted(forward, 10)
        loss = algorithm.loss(forward, {"student": student})
        assert float(loss.value) == pytest.approx(float((student - forward.inputs["target"]).square().mean()))

    def test_the_offline_loss_by_hand(self):
        """Errors of the noise, of student and reference: -log sigmoid(beta [(r_w - s_w) - gamma (r_l - s_l)])."""
        algorithm = PsoOffline(PsoOfflineConfig(name="pso_offline", beta=2.0, gamma=0.25))
        algorithm.facts = Facts(sigmas=(1.0, 0.75, 0.5, 0.0))
        (forward,) = algorithm.forwards(recorded(), 0)
        velocity = {"student": predicted(forward, 10), "reference": predicted(forward, 20)}
        factor = (1 - forward.t.view(-1, 1, 1, 1)) ** 2
        of = {n: (factor * (v - forward.inputs["target"]) ** 2).flatten(1).mean(1) for n, v in velocity.items()}
        gain = of["reference"] - of["student"]
        margin = 2.0 * (gain[:2] - 0.25 * gain[2:])
        loss = algorithm.loss(forward, velocity)
        assert float(loss.value) == pytest.approx(float(torch.log1p(torch.exp(-margin)).mean()), rel=1e-5)


class TestDraws:
    def test_both_images_of_a_pair_get_the_same_noise_time_and_prompt(self):
        experience = recorded(3)
        forwards = list(dpo(draws=2).forwards(experience, 0))
        assert len(forwards) == 2 and not torch.equal(forwards[0].t, forwards[1].t)
        for forward in forwards:
            x0 = torch.cat([experience.recorded["winner"], experience.recorded["loser"]])
            eps = forward.inputs["target"] + x0
            assert torch.allclose(eps[:3], eps[3:], atol=1e-6) and torch.equal(forward.t[:3], forward.t[3:])
            assert torch.allclose(forward.x, add_noise(x0, eps, forward.t), atol=1e-6)
            assert forward.cond["prompt"].flatten().tolist() == [1, 2, 3, 1, 2, 3]
            assert len(set(forward.t[:3].tolist())) == 3

    def test_few_step_models_are_trained_at_their_steps_alone(self):
        algorithm = dpo(times="steps", draws=40)
        algorithm.facts = Facts(sigmas=(0.9, 0.75, 0.5, 0.0))
        times = {round(t, 4) for forward in algorithm.forwards(recorded(), 0) for t in forward.t.tolist()}
        assert times == {0.9, 0.75, 0.5}

    def test_captions_are_dropped_in_pairs_and_about_as_often_as_asked(self):
        forwards = list(dpo(caption_dropout=0.3, draws=200).forwards(recorded(), 0))
        dropped = torch.stack([forward.cond["prompt"].flatten() == 0 for forward in forwards])
        assert torch.equal(dropped[:, :2], dropped[:, 2:])
        assert 0.23 < dropped.float().mean() < 0.37

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pairs": "online"}, "images_per_prompt is 1"),
            ({"pairs": "online", "caption_dropout": 0.1}, "caption_dropout"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, changes, message):
        algorithm = dpo(**changes)
        algorithm.facts = Facts(images_per_prompt=2 if "dropout" in message else 1)
        with pytest.raises(ConfigError, match=message):
            algorithm.check(torch.tensor([1.0, 0.0]))

    def test_errors_of_the_noise_are_refused_where_a_step_is_all_noise(self):
        """There (1 - t)^2 is 0, and nothing would be learned."""
        algorithm = PsoOffline(PsoOfflineConfig(name="pso_offline"))
        algorithm.check(torch.tensor([0.94, 0.5, 0.0]))
        with pytest.raises(ConfigError, match=r"set algorithm\.space: velocity"):
            algorithm.check(torch.tensor([1.0, 0.5, 0.0]))

    def test_space_and_beta_are_the_networks_own_unless_given(self):
        flow, table = dpo(), dpo()
        table.facts = Facts(times=(0.1, 0.5, 0.9))
        assert (flow.space, flow.beta, table.space, table.beta) == ("velocity", 100.0, "eps", 5000.0)
        assert (dpo(beta=7.0).beta, dpo(space="x0").beta) == (7.0, 100.0)


class TestDrawn:
    """Two prompts, two images each: of the first prompt the second is better, those of the other one tie."""

    def forward(self, sigmas, **changes):
        prompts = tuple(Prompt(name, name, "a") for name in "ppqq")
        work = WorkItem(0, "a", 0, 0, prompts, (0, 1, 0, 1), (0,))
        path = Trajectory(
            work, VERSION, sigmas, noise(range(4), (2, 1, 2, 2)), {"prompt": torch.arange(4.0)[:, None]}, {}
        )
        experience = Experience(work, path, scores={"x": torch.tensor([0.1, 0.9, 0.5, 0.5])})
        algorithm = dpo(pairs="online", **changes)
        algorithm.facts = Facts(images_per_prompt=2)
        (forward,) = algorithm.forwards(experience, 0)
        return algorithm, forward, path

    @pytest.mark.parametrize("end", [0.0, 0.2])
    def test_images_are_at_the_size_of_whole_ones_where_the_path_ends_above_zero(self, end):
        """A last state (1 - t) x0 + t eps of a model that keeps the variance: x = state / |(1 - t, t)|."""
        _, forward, path = self.forward(torch.tensor([1.0, end]), loss="sft")
        t = forward.t.view(-1, 1, 1, 1)
        x0 = path.latents[[1, 2], 1] / math.sqrt((1 - end) ** 2 + end**2)
        assert torch.allclose(forward.x, (1 - t) * x0 + t * (forward.inputs["target"] + x0), atol=1e-6)
        assert forward.cond["prompt"].flatten().tolist() == [1, 2]

    @pytest.mark.parametrize("loss", ["dpo", "ipo", "sft"])
    def test_a_tie_weighs_nothing_and_is_counted(self, loss):
        algorithm, forward, _ = self.forward(torch.tensor([1.0, 0.0]), loss=loss, beta=0.1)
        student = predicted(forward, 10).requires_grad_()
        found = algorithm.loss(forward, {"student": student, "reference": predicted(forward, 20)})
        (slope,) = torch.autograd.grad(found.value, student)
        assert slope[1::2].abs().max() == 0 < slope[::2].abs().min()
        assert found.metrics["ties"] == 0.5
        assert float(found.metrics.get("implicit_accuracy", torch.tensor(0.0))) in (0.0, 1.0), "of the decided one"
