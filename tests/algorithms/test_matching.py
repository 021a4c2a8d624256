"""Distribution matching: both losses by hand, where each gradient goes, and that teacher and learner noise alike."""

import pytest
import torch

from opd_ray.algorithms import Facts, Forward
from opd_ray.algorithms.dmd import Dmd, Tdm, direction
from opd_ray.config import DmdConfig, EmaConfig, OptimizerConfig, TdmConfig
from opd_ray.errors import ConfigError
from opd_ray.learners import LearnerState
from opd_ray.types import Experience, TeacherAnswer, Trajectory
from tests.algorithms.parts import VERSION, fill, flat, item, learner, load, random_experience, stage

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def dmd(**changes):
    return Dmd(DmdConfig(name="dmd", **changes))


def tdm(**changes):
    return Tdm(TdmConfig(name="tdm", **changes))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixels(*rows):
    """Rows of so many channels of one pixel, float64."""
    return torch.tensor(rows, dtype=torch.float64)[:, :, None, None]


def of_student(x, noised, t, teacher, now=0.5):
    inputs = {"noised": noised, "t": t, "teacher": teacher}
    return Forward(x, now, 0.25, 1, {}, {}, inputs, beside={"fake": (noised, t)})


class TestLosses:
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    noised = pixels([0.5, 0.5], [1.0, 1.0])
    teacher = pixels([1.0, -1.0], [4.0, -4.0])  # x0 is (0, 1) and (0, 2)
    fake = pixels([0.0, 1.0], [0.0, 0.0])  # x0 is (0.5, 0) and (1, 1)
    p = pixels([1.0, 0.0], [2.0, 6.0])  # 1 and 1 away, and 2 and 4
    g = pixels([0.5, -1.0], [1.0 / 3, -1.0 / 3])  # (0.5 - 0, 0 - 1) / 1 and (1 - 0, 1 - 2) / 3

    def test_the_direction_by_hand(self):
        found = direction(self.p, self.noised, self.fake, self.teacher, self.t)
        torch.testing.assert_close(found, self.g, rtol=0, atol=1e-12)

    def test_the_students_loss_and_gradient_by_hand(self):
        """From x = 0 at t = 1/2 p is -v / 2, so the loss has the slope -g / 2 by v, over four numbers."""
        student = (-2 * self.p).requires_grad_()
        fake = self.fake.clone().requires_grad_()
        forward = of_student(torch.zeros_like(self.p), self.noised, self.t, self.teacher)
        found = dmd().loss(forward, {"student": student, "fake": fake})
        assert found.value.item() == pytest.approx(0.5 * (0.25 + 1 + 2 / 9) / 4, abs=1e-12)
        found.value.backward()
        torch.testing.assert_close(student.grad, -self.g / 8, rtol=0, atol=1e-12)
        assert fake.grad is None, "fake is a constant here"
        assert found.metrics["mismatch"].item() == pytest.approx((1 + 4 + 16 + 16) / 4)

    def test_where_fake_is_the_teacher_there_is_no_loss_and_no_gradient(self):
        student = normal(2, 2, 1, 1).requires_grad_()
        forward = of_student(normal(2, 2, 1, 1, seed=1), self.noised, self.t, self.teacher)
        found = tdm().loss(forward, {"student": student, "fake": self.teacher.clone()})
        found.value.backward()
        assert found.value.item() == 0 and not student.grad.any()

    def test_a_prediction_that_is_the_teachers_divides_by_no_zero(self):
        x0 = self.noised - self.t[:, None, None, None] * self.teacher
        assert direction(x0, self.noised, self.fake, self.teacher, self.t).isfinite().all()

    def test_the_loss_of_fake_by_hand(self):
        target = pixels([1.0, 2.0], [0.0, -1.0])
        fake = self.fake.clone().requires_grad_()
        forward = Forward(self.noised, self.t, 0.0, 1, {}, {}, {"target": target}, policy="fake")
        found = dmd().loss(forward, {"fake": fake})
        assert found.value.item() == pytest.approx((1 + 1 + 0 + 1) / 4, abs=1e-12)
        found.value.backward()
        torch.testing.assert_close(fake.grad, (self.fake - target) / 2, rtol=0, atol=1e-12)


def drawn(rows=2, steps=(0, 2), first_row=0):
    """A drawing of random states and velocities, and any marks."""
    work = item([f"p{row}" for row in range(rows)], steps=steps)
    latents, velocities = normal(rows, 4, 2, 3, 3).float(), normal(rows, 3, 2, 3, 3, seed=1).float()
    path = Trajectory(work, VERSION, SIGMAS, latents, {}, {}, velocities=velocities)
    return Experience(work, path, TeacherAnswer("t", steps, normal(rows, len(steps), 2, 3, 3, seed=2).float()))


class TestNoise:
    @pytest.mark.parametrize("made", [dmd, tdm])
    def test_teachers_are_asked_at_the_very_states_that_the_student_is_compared_at(self, made):
        """For each on its own worker, of the run's seed."""
        experience = drawn()
        asked = list(made().asked(experience.trajectory))
        compared = [one for one in made().forwards(experience, 0) if one.policy == "student"]
        assert len(asked) == len(compared) == 2
        for k, ((x, t), one) in enumerate(zip(asked, compared, strict=True)):
            assert torch.equal(one.inputs["noised"], x) and torch.equal(one.inputs["t"], t)
            assert all(torch.equal(*pair) for pair in zip(one.beside["fake"], (x, t), strict=True))
            assert torch.equal(one.inputs["teacher"], experience.answer.velocity[:, k])
            assert torch.equal(one.x, experience.trajectory.latents[:, one.step])
        other = made()
        other.facts = Facts(seed=1)
        assert not torch.equal(next(iter(other.asked(experience.trajectory)))[0], asked[0][0])

    @pytest.mark.parametrize("made", [dmd, tdm])
    def test_states_are_clean_predictions_and_noise_of_variance_one(self, made):
        """x = (1 - t) p + t eps with p = x_j - t_j v_j, and the target of fake is eps - p."""
        experience = drawn(rows=256)
        path = experience.trajectory
        seen = [one for one in made().forwards(experience, 0) if one.policy == "fake"]
        assert [one.step for one in seen] == [0, 2]
        for one in seen:
            p = path.latents[:, one.step] - SIGMAS[one.step] * path.velocities[:, one.step]
            t = one.t[:, None, None, None]
            eps = one.inputs["target"] + p
            torch.testing.assert_close(one.x, (1 - t) * p + t * eps, rtol=0, atol=1e-5)
            assert float(eps.mean()) == pytest.approx(0, abs=0.05) and float(eps.std()) == pytest.approx(1, abs=0.03)

    def test_times(self):
        """Of dmd uniform whatever the step, of tdm the step's own: above its end, up to its beginning."""
        experience = drawn(rows=512)
        for made, ranges in ((dmd, [(0.02, 0.98)] * 2), (tdm, [(0.75, 1.0), (0.25, 0.5)])):
            for (_, t), (low, high) in zip(made().asked(experience.trajectory), ranges, strict=True):
                assert low < float(t.min()) and float(t.max()) <= high
                assert float(t.mean()) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
        (_, t), _ = dmd(times=(0.5, 0.6)).asked(experience.trajectory)
        assert float(t.min()) > 0.5 and float(t.max()) <= 0.6

    def test_fake_sees_other_noise_in_each_update_and_never_that_of_the_student(self):
        algorithm, experience = dmd(fake_updates=3), drawn()
        updates = [list(algorithm.forwards(experience, update)) for update in range(3)]
        assert [[one.policy for one in forwards] for forwards in updates] == [["fake"] * 2] * 2 + [
            ["fake"] * 2 + ["student"] * 2
        ]
        states = [one.x for forwards in updates for one in forwards if one.policy == "fake"]
        states += [one.inputs["noised"] for one in updates[-1][2:]]
        assert all(not torch.equal(x, y) for n, x in enumerate(states) for y in states[:n])

    def test_a_rows_noise_is_its_own(self):
        few, many = (next(iter(dmd().asked(drawn(rows=rows).trajectory)))[1] for rows in (2, 3))
        assert torch.equal(few, many[:2])


@pytest.fixture(scope="module")
def family(tiny):
    return load(tiny)


class TestLearner:
    """On the tiny model: two adapters, each with its own loss, gradient and norm."""

    plain = OptimizerConfig(lr=1e-2, weight_decay=0, clip=1e9)

    def made(self, tiny, algorithm, saving=False, **changes):
        """With weights that are not zero, and not each other's."""
        chosen = self.plain.model_copy(update=changes)
        one = learner(tiny, algorithm, optimizer=chosen, gradient_checkpointing=saving)
        for seed, policy in enumerate(("student", "fake")):
            fill(one.family, policy, seed)
        return one

    def experience(self, family, seed=0):
        return random_experience(family, item(steps=(0, 2)), seed=seed, velocities=True)

    def grads(self, one, policy):
        """Of a policy's parameters, by the student's names; None where there is none."""
        prefix = "" if policy == "student" else f"{policy}/"
        return {name: one.engine.trained[prefix + name].grad for name in one.student}

    @pytest.mark.parametrize("made", [dmd, tdm])
    def test_each_loss_has_its_gradient_in_its_own_adapter_alone(self, tiny, family, made):
        """Against plain autograd on each adapter: means over two forwards each."""
        one, experience = self.made(tiny, made()), self.experience(family)
        forwards = list(one.algorithm.forwards(experience, 0))
        for policy in ("fake", "student"):
            one.family.use(policy)
            own = [forward for forward in forwards if forward.policy == policy]
            loss = sum(one.algorithm.loss(forward, one._velocities(forward)).value for forward in own) / 2
            parameters = one.family.adapter_parameters(policy)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            expected = dict(zip(parameters, gradients, strict=True))
            assert any(bool(gradient.any()) for gradient in gradients)
            stage(one, [experience])
            one.update(0)
            torch.testing.assert_close(flat(self.grads(one, policy)), flat(expected), rtol=1e-5, atol=1e-9)
            one = self.made(tiny, made())

    @pytest.mark.parametrize("made", [dmd, tdm])
    def test_a_student_whose_fake_is_the_teacher_stays_to_the_last_bit(self, tiny, family, made):
        one, experience = self.made(tiny, made()), self.experience(family)
        answers = []
        for x, t in one.algorithm.asked(experience.trajectory):
            with torch.no_grad(), one.family.adapter("fake"):
                answers.append(one.family.velocity(x, t, experience.trajectory.cond, {}, 1.0))
        answer = TeacherAnswer("t", experience.answer.steps, torch.stack(answers, dim=1))
        before = {policy: flat(one.family.adapter_parameters(policy)).clone() for policy in ("student", "fake")}
        stage(one, [Experience(experience.item, experience.trajectory, answer)])
        report = one.update(0)
        one.finish_round(0)
        assert not flat(self.grads(one, "student")).any() and report.grad_norm > 0
        assert torch.equal(flat(one.student), before["student"])
        assert not torch.equal(flat(one.family.adapter_parameters("fake")), before["fake"])

    def test_updates_of_fake_alone_leave_the_student_and_its_moments(self, tiny, family):
        one = self.made(tiny, dmd(fake_updates=2), weight_decay=0.1)
        stage(one, [self.experience(family)])
        start = flat(one.student).clone()
        one.update(0)
        assert torch.equal(flat(one.student), start) and not any("fake/" not in key for key, _ in one.engine.moments())
        one.update(1)
        assert not torch.equal(flat(one.student), start)
        one.finish_round(0)
        steps = {key: float(value) for key, value in one.engine.moments() if key.endswith(":step")}
        assert {value for key, value in steps.items() if key.startswith("fake/")} == {2}
        assert {value for key, value in steps.items() if not key.startswith("fake/")} == {1}

    def test_the_average_is_of_the_students_own_steps(self, tiny, family):
        """Three updates a round, of which the last one trains it: the decays of two steps are 2/11 and 3/12."""
        ema = EmaConfig(decay=0.9, every=1)

        def made():
            return learner(tiny, dmd(fake_updates=3), optimizer=self.plain, ema=ema)

        one, saved = made(), None
        expected = flat(one.student).clone()
        for number, decay in enumerate((2 / 11, 3 / 12)):
            if saved is not None:
                one = made()
                one.load_state(saved)
            stage(one, [self.experience(family, number)])
            for update in range(3):
                one.update(update)
            one.finish_round(number)
            expected = decay * expected + (1 - decay) * flat(one.student)
            torch.testing.assert_close(flat(one.ema), expected, rtol=1e-5, atol=1e-7)
            saved = one.state()
            assert (saved.values["updates"], saved.values["student_updates"]) == (3 * number + 3, number + 1)
        older = {name: value for name, value in saved.values.items() if name != "student_updates"}
        one = made()
        one.load_state(LearnerState(saved.tensors, older))
        assert one.student_updates == 2, "two rounds"

    def test_each_norm_is_clipped_by_itself(self, tiny, family):
        """The norm that is told is that of both."""
        norms = {}
        for clip in (1e9, 1e-3):
            one = self.made(tiny, dmd(), clip=clip)
            stage(one, [self.experience(family)])
            report = one.update(0)
            norms[clip] = [float(flat(self.grads(one, policy)).norm()) for policy in ("student", "fake")]
            assert report.grad_norm == pytest.approx(sum(norm**2 for norm in norms[1e9]) ** 0.5, rel=1e-5)
        assert min(norms[1e9]) > 1e-3
        assert norms[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-2)

    def test_gradient_checkpointing_changes_no_gradient(self, tiny, family):
        """Recomputed in the backward pass, which therefore needs the right adapter too."""
        found = []
        for saving in (False, True):
            one = self.made(tiny, dmd(), saving)
            stage(one, [self.experience(family)])
            one.update(0)
            found.append(torch.cat([flat(self.grads(one, policy)) for policy in ("student", "fake")]))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)

    def test_what_is_published_and_saved_for_users_is_the_student(self, tiny, family, tmp_path):
        one = self.made(tiny, dmd())
        for number in range(2):
            stage(one, [self.experience(family, seed=number)])
            one.update(0)
            one.finish_round(number)
        published, saved = dict(one.gather()), one.state().tensors
        assert torch.equal(flat(published), flat(one.student)) and published.keys() == one.student.keys()
        assert saved.keys() == {"student", "adapter.fake", "optimizer"}
        assert not torch.equal(flat(saved["adapter.fake"]), flat(saved["student"]))
        one.export(tmp_path)
        again = load(tiny)
        again.load_lora("exported", str(tmp_path))
        assert torch.equal(flat(again.adapter_parameters("exported")), flat(one.student))


class TestRefusals:
    def test_staleness(self):
        algorithm = tdm()
        algorithm.facts = Facts(max_staleness=1)
        with pytest.raises(ConfigError, match=r"algorithm tdm asks .* set cluster.max_staleness \(now 1\) to 0"):
            algorithm.check(SIGMAS)
        algorithm.facts = Facts()
        algorithm.check(SIGMAS)

    def test_noise_that_the_kernel_does_not_take(self):
        with pytest.raises(ConfigError, match=r"algorithm.noise_level with kernel ddim"):
            dmd(kernel="ddim", noise_level=2.0).check(SIGMAS)

    def test_times_out_of_order(self):
        with pytest.raises(ValueError, match=r"times \[0.9, 0.1\]: the first has to be the smaller one"):
            dmd(times=(0.9, 0.1))
        with pytest.raises(ValueError, match="times"):
            tdm(times=(0.1, 0.9))
