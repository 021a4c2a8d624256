"""DiffusionNFT, Flow-GRPO and GRPO-Guard against arithmetic by hand."""

import math
from collections import Counter

import pytest
import torch

from opd_ray.algorithms import Facts, Forward
from opd_ray.algorithms.advantages import Groups, combined, group_advantages, preferences
from opd_ray.algorithms.base import part_of
from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.algorithms.grpo_guard import GrpoGuard
from opd_ray.algorithms.nft import DiffusionNft, branch_errors
from opd_ray.config import FlowGrpoConfig, GrpoGuardConfig, NftConfig
from opd_ray.diffusion import KERNELS, clipped_surrogate, gaussian_kl, log_ratio, normalised_log_ratio
from opd_ray.errors import RewardError
from opd_ray.types import Experience, Prompt, Trajectory, WorkItem
from tests.algorithms.parts import VERSION


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixel(*values):
    """One row of so many channels of one pixel."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def work(*names, task="a", index=0, position=0, steps=(0, 1)):
    prompts = tuple(Prompt(name, name, task) for name in names)
    return WorkItem(0, task, index, position, prompts, tuple(range(len(names))), steps)


class TestGroups:
    prompts = tuple(Prompt(name, name, "a") for name in "ppqq")

    def test_by_hand(self):
        """Rewards 1, 3 and 6, 6: means 2 and 6; the deviation of all four is sqrt(4.5), that of p's own 1."""
        rewards = torch.tensor([1.0, 3.0, 6.0, 6.0])
        advantages, ties = group_advantages(self.prompts, rewards, per_prompt=False, eps=0.5)
        step = 1 / (math.sqrt(4.5) + 0.5)
        assert advantages.tolist() == pytest.approx([-step, step, 0, 0]) and ties.tolist() == [0, 0, 1, 1]
        own, _ = group_advantages(self.prompts, rewards, per_prompt=True, eps=0.5)
        assert own.tolist() == pytest.approx([-1 / 1.5, 1 / 1.5, 0, 0])

    def test_tasks_have_deviations_of_their_own(self):
        """Rewards of 0 and 2 in one task, of 0 and 200 in the other: the same advantages."""
        prompts = [Prompt(name, name, task) for task in "ab" for name in "pp"]
        advantages, _ = group_advantages(prompts, torch.tensor([0.0, 2.0, 0.0, 200.0]), per_prompt=False, eps=0.0)
        assert advantages.tolist() == [-1, 1, -1, 1]

    @pytest.mark.parametrize("reward", [22.3, 0.1, 1 / 3])
    @pytest.mark.parametrize("per_prompt", [True, False])
    def test_equal_rewards_are_exactly_no_advantage(self, reward, per_prompt):
        """In float32 their mean may be off by the last bit, and the deviation is as small."""
        prompts = [Prompt("p", "p", "a")] * 23
        advantages, ties = group_advantages(prompts, torch.full((23,), reward), per_prompt=per_prompt)
        assert advantages.abs().max() == 0 and ties.min() == 1

    def test_a_prompt_in_two_items_is_one_group_and_weights_are_kept(self):
        """Means of x and three y: 2 and 8 in one item, 5 in another; of weight 0 nothing counts."""
        items = [work("p", "p"), work("p", position=1)]
        x, y = torch.tensor([5.0, 5.0]), torch.tensor([1.0, 9.0])
        settings = FlowGrpoConfig(name="flow_grpo", advantage_clip=1.0)
        groups = Groups(settings, {"y": 3.0, "z": 0.0})
        groups.observe(
            [
                (items[0], {"x": x, "y": y, "z": 100 * y}),
                (items[1], {"x": x[:1], "y": x[:1], "z": x[:1]}),
            ]
        )
        assert combined(items[0], {"x": x, "y": y}, {"y": 3.0}).tolist() == [2, 8]
        assert groups.known(items[0])[0].tolist() == [-1, 1], "clipped: 3 / sqrt(6) is more"
        assert groups.known(items[1])[0].tolist() == [0]

    def test_a_reward_that_does_not_count_decides_no_preference(self):
        scores = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([1.0, 0.0])}
        assert preferences(work("p", "p"), scores, {"y": 0.0}, 2, pareto=True).tolist() == [[1, 0, 1]]
        with pytest.raises(RewardError, match="no reward of x, y scores prompt 'p'"):
            combined(work("p", "p"), scores, {"x": 0.0, "y": 0.0})

    def test_parts_have_items_of_every_task(self):
        """Five items of each task in two parts: indices 0 to 2 and 3, 4, as i * 2 // 5 has it."""
        items = [work("p", task=task, index=n, position=5 * (task == "b") + n) for task in "ab" for n in range(5)]
        found = [[(one.task, one.index) for one in part_of(items, number, 2)] for number in (0, 1)]
        assert found[0] == [(task, n) for task in "ab" for n in (0, 1, 2)]
        assert found[1] == [(task, n) for task in "ab" for n in (3, 4)]


class TestRatioNorm:
    def test_by_hand(self):
        """x' = (1, 2), means (0.5, 2) and (0, 1), std 0.5: eps = (2, 2), and mean((0.5, 1) (2, 2)) = 1.5."""
        found = normalised_log_ratio(pixel(1, 2), pixel(0.5, 2), pixel(0, 1), torch.tensor(0.5))
        assert found.item() == pytest.approx(1.5, abs=1e-10)

    def test_it_is_the_ratio_without_its_bias(self):
        x, mean, other = (normal(3, 4, 2, 2, seed=seed) for seed in range(3))
        std = torch.tensor(0.25, dtype=torch.float64)
        bias = (mean - other).square().flatten(1).mean(1) / (2 * std**2)
        expected = std * (log_ratio(x, mean, other, std) + bias)
        assert torch.allclose(normalised_log_ratio(x, mean, other, std), expected, atol=1e-10)

    def test_equal_means_are_exactly_as_likely(self):
        mean = normal(2, 3, 4, 4).float()
        assert (
            normalised_log_ratio(normal(2, 3, 4, 4, seed=1).float(), mean, mean.clone(), torch.tensor(0.01)).any() == 0
        )

    def test_rounding_leaves_a_millionth_of_the_published_clip_range(self):
        """Means that are 1e-5 apart, float32 against float64: a clip range is 2e-6."""
        x, mean = normal(4, 16, 8, 8), normal(4, 16, 8, 8, seed=1)
        other, std = mean + 1e-5 * normal(4, 16, 8, 8, seed=2), torch.tensor(0.3, dtype=torch.float64)
        single = [one.float() for one in (x, mean, other, std)]
        assert (normalised_log_ratio(*single) - normalised_log_ratio(x, mean, other, std)).abs().max() < 2e-8

    def test_a_deterministic_step_has_none(self):
        with pytest.raises(ValueError, match="no density"):
            normalised_log_ratio(normal(1, 1, 1, 1), normal(1, 1, 1, 1), normal(1, 1, 1, 1), torch.tensor(0.0))


def test_gradients_are_finite_differences():
    x, mean, other, start = (normal(2, 1, 2, 2, seed=seed) for seed in range(4))
    std, advantage = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64)
    good, times = torch.tensor([0.8, 0.1], dtype=torch.float64), torch.tensor([0.9, 0.3]).double().reshape(2, 1, 1, 1)

    def grpo(mean):
        surrogate = clipped_surrogate(0.01 * log_ratio(x, mean, other, std), advantage, 0.5)
        return surrogate + 0.04 * gaussian_kl(mean, start, std, reduction="mean")

    def guard(mean):
        return clipped_surrogate(0.01 * normalised_log_ratio(x, mean, other, std), advantage, 0.5) / 0.1

    def plain(student):
        positive, negative = branch_errors(student, other, x, 0.3)
        return good * positive + (1 - good) * negative

    def size(student, sign):
        gap = times * (other + sign * 0.3 * (student - other) - x)
        return gap.detach().abs().flatten(1).mean(1)

    fixed = [size(mean.detach(), sign) for sign in (1, -1)]

    def adaptive(student):
        """With the weights as they are at the point: those are constants."""
        errors = branch_errors(student, other, x, 0.3, times)
        held = [error * size(student, sign) / own for error, sign, own in zip(errors, (1, -1), fixed, strict=True)]
        return good * held[0] + (1 - good) * held[1]

    for loss in (grpo, guard, plain, adaptive):
        assert torch.autograd.gradcheck(loss, (mean.requires_grad_(),), atol=1e-6), loss.__name__


class TestNegativeAwareness:
    def test_by_hand(self):
        """v_old (0, 1), student (1, 1), v (2, 0), beta 0.5: v+ (0.5, 1), v- (-0.5, 1).

        Errors of velocities (2.25 + 1) / 2 and (6.25 + 1) / 2. At t = 0.5 those of x0 are a quarter, over mean absolute
        errors 0.5 (1.5 + 1) / 2 and 0.5 (2.5 + 1) / 2.
        """
        student, old, target = pixel(1, 1), pixel(0, 1), pixel(2, 0)
        plain = branch_errors(student, old, target, 0.5)
        assert [one.item() for one in plain] == pytest.approx([1.625, 3.625], abs=1e-10)
        adaptive = branch_errors(student, old, target, 0.5, torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))
        expected = [1.625 / 4 / 0.625, 3.625 / 4 / 0.875]
        assert [one.item() for one in adaptive] == pytest.approx(expected, abs=1e-10)

    @pytest.mark.parametrize("beta", [1.0, 0.1])
    def test_at_the_policy_that_drew_the_gradient_is_two_beta_times_two_r_less_one(self, beta):
        """Of r e(v+) + (1 - r) e(v-), summed over dimensions: 2 beta (2 r - 1) (v_old - v)."""
        old, target = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
        student, good = old.clone().requires_grad_(), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
        positive, negative = branch_errors(student, old, target, beta)
        assert torch.equal(positive, negative)
        value = (good * positive + (1 - good) * negative) * student[0].numel()
        (slope,) = torch.autograd.grad(value.sum(), student)
        expected = 2 * beta * (2 * good - 1).reshape(3, 1, 1, 1) * (old - target)
        assert torch.allclose(slope, expected, atol=1e-10)

    def test_a_whole_loss_by_hand(self):
        """One image, good with 0.75, the numbers above: 5 / 0.5 (0.75 * 1.625 + 0.25 * 3.625) + 0.1 mean((1, 1)^2)."""
        algorithm = DiffusionNft(NftConfig(name="diffusion_nft", beta=0.5, kl=0.1, weighting="plain"))
        inputs = {
            "target": pixel(2, 0),
            "good": torch.tensor([0.75]).double(),
            "tied": torch.zeros(1),
            "scored": torch.ones(1),
        }
        forward = Forward(pixel(0, 0), torch.tensor([0.5]), torch.tensor([0.0]), 0, {}, {}, inputs)
        found = algorithm.loss(forward, {"student": pixel(1, 1), "old": pixel(0, 1), "reference": pixel(0, 0)})
        assert found.value.item() == pytest.approx(10 * (0.75 * 1.625 + 0.25 * 3.625) + 0.1, abs=1e-10)
        assert {name: value.item() for name, value in found.metrics.items()} == pytest.approx(
            {"error_good": 1.625, "error_bad": 3.625, "drift": 1.0, "ties": 0.0}
        )

    def test_an_error_of_nothing_divides_by_nothing(self):
        student = pixel(1, 1).requires_grad_()
        errors = branch_errors(student, pixel(1, 1), pixel(1, 1), 1.0, torch.ones(1, 1, 1, 1))
        (slope,) = torch.autograd.grad(sum(errors).sum(), student)
        assert [one.item() for one in errors] == [0, 0] and slope.isfinite().all()

    @pytest.mark.parametrize(
        ("decay", "expected"),
        [
            ("copy", {0: 0.0, 999: 0.0}),
            ("linear_to_0_5", {0: 0.001, 99: 0.1, 499: 0.5, 999: 0.5}),
            ("delayed_to_0_999", {0: 0.0, 74: 0.0, 75: 0.0075, 84: 0.075, 999: 0.999}),
        ],
    )
    def test_how_fast_the_policy_that_draws_follows(self, decay, expected):
        """By optimizer steps that were made: round n is step n + 1, or 2 n + 2 with two a round."""
        algorithm = DiffusionNft(NftConfig(name="diffusion_nft", decay=decay))
        assert {n: pytest.approx(algorithm.follow("old", n)) for n in expected} == expected
        twice = DiffusionNft(NftConfig(name="diffusion_nft", decay=decay, item_parts=2))
        assert twice.follow("old", 49) == pytest.approx(algorithm.follow("old", 99))

    def test_images_are_noised_to_times_of_their_own_and_are_as_good_as_their_rewards(self):
        """Advantages of -1 and 1 of at most 2: good with 1/4 and 3/4."""
        sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        one = work("p", "p", "q", "q", steps=(0, 1, 2, 3))
        latents = torch.randn(4, 5, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        algorithm = DiffusionNft(NftConfig(name="diffusion_nft", advantage_clip=2.0))
        algorithm.facts = Facts(seed=3, num_steps=4, images_per_prompt=2)
        algorithm.observe([(one, {"x": torch.tensor([0.0, 2.0, 1.0, 1.0])})])
        experience = Experience(one, Trajectory(one, VERSION, sigmas, latents, {}, {}))
        forwards = list(algorithm.forwards(experience, 0))
        assert len(forwards) == 3, "int(0.99 * 4)"
        times = torch.stack([forward.t for forward in forwards], dim=1)
        assert all(len(set(row)) == 3 and set(row) <= set(sigmas.tolist()) for row in times.tolist())
        assert len({tuple(row) for row in times.tolist()}) > 1
        for forward in forwards:
            t = forward.t.reshape(4, 1, 1, 1)
            assert torch.allclose(forward.x - t * forward.inputs["target"], latents[:, -1], atol=1e-6)  # x_t - t v = x0
            spread = math.sqrt(0.5)  # of 0, 2, 1, 1
            expected = [0.5 - 1 / spread / 4, 0.5 + 1 / spread / 4, 0.5, 0.5]
            assert forward.inputs["good"].tolist() == pytest.approx(expected, abs=1e-3)
            assert forward.inputs["tied"].tolist() == [0, 0, 1, 1]
        again = list(algorithm.forwards(experience, 0))
        assert all(torch.equal(a.x, b.x) for a, b in zip(forwards, again, strict=True))


class TestPolicyGradients:
    sigmas = (0.5, 0.25)

    def forward(self, **inputs):
        """One image at x = (0, 0), t from 0.5 to 0.25, drawn with velocity 0."""
        of_group = {"advantage": torch.tensor([2.0]), "tied": torch.tensor([0.0]), "scored": torch.tensor([1.0])}
        t, t_next = (torch.tensor([one]).double() for one in self.sigmas)
        return Forward(pixel(0, 0), t, t_next, 0, {}, {}, {"drawn": pixel(0, 0)} | of_group | inputs)

    @pytest.mark.parametrize(("kind", "name"), [(FlowGrpo, "flow_grpo"), (GrpoGuard, "grpo_guard")])
    def test_a_whole_loss_by_hand(self, kind, name):
        """Flow-SDE at t = 1/2 with a = 0.7: sigma^2 = 0.49, so the mean moves by (1 + a^2 / 2) dt v, std by 0.7 / 2.

        dt = -1/4 and v = (0.08, 0): D = mean - drawn = (-0.0249, 0); x' = drawn + std (1, -1).
        """
        config = (FlowGrpoConfig if kind is FlowGrpo else GrpoGuardConfig)(name=name, clip_range=0.5, kl=0.1)
        algorithm = kind(config)
        d, std = -0.25 * (1 + 0.49 / 2) * 0.08, 0.35
        velocity = {"student": pixel(0.08, 0), "reference": pixel(0, 0.16)}
        found = algorithm.loss(self.forward(x_next=pixel(std, -std)), velocity)
        log = d / std / 2 - d**2 / 2 / (2 * std**2) if kind is FlowGrpo else d / 2
        kl = (d**2 + (2 * d) ** 2) / 2 / (2 * std**2)
        policy = -2 * math.exp(log) / (1 if kind is FlowGrpo else 0.25)
        assert found.value.item() == pytest.approx(policy + 0.1 * 0.25 * kl, abs=1e-10)
        assert found.metrics["ratio"].item() == pytest.approx(abs(log), abs=1e-10)
        assert found.metrics["kl"].item() == pytest.approx(kl, abs=1e-10)

    @pytest.mark.parametrize(("kernel", "weight"), [("flow", 0.25), ("dance", 0.25), ("cps", 1.0), ("ddim", 1.0)])
    def test_the_kl_leaves_out_of_the_variance_what_the_published_code_does(self, kernel, weight):
        """It divides by its std_dev_t^2: of an SDE without |dt| = 1/4, of CPS t' sin(a pi / 2), which is all of it."""
        algorithm = FlowGrpo(FlowGrpoConfig(name="flow_grpo", kernel=kernel, noise_level=0.5, clip_range=0.5, kl=0.1))
        student, start = pixel(0.08, 0), pixel(0, 0.16)
        made, other = (KERNELS[kernel](pixel(0, 0), v, *self.sigmas, 0.5) for v in (student, start))
        forward = self.forward(x_next=made.mean, drawn=student, advantage=torch.zeros(1))
        found = algorithm.loss(forward, {"student": student, "reference": start})
        std_dev_t = {"flow": 0.5, "dance": 0.5, "cps": 0.25 * math.sin(math.pi / 4)}.get(kernel, float(made.std))
        kl = float((made.mean - other.mean).square().mean()) / (2 * std_dev_t**2)
        assert found.value.item() == pytest.approx(0.1 * kl, abs=1e-10)
        assert found.metrics["kl"].item() * weight == pytest.approx(kl, abs=1e-10)

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_a_round_goes_through_every_step_of_every_image_once(self, shuffle):
        """Three items in two parts, three trained steps, two at a time: four updates."""
        config = FlowGrpoConfig(name="flow_grpo", steps_per_update=2, shuffle_steps=shuffle)
        algorithm, sigmas = FlowGrpo(config), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        algorithm.facts = Facts(num_steps=4, images_per_prompt=2)
        items = [work("p", "p", index=n, position=n, steps=(0, 1, 2)) for n in range(3)]
        latents = torch.arange(30.0).reshape(3, 2, 5, 1, 1, 1)
        paths = [
            Trajectory(one, VERSION, sigmas, x, {}, {}, velocities=x[:, 1:])
            for one, x in zip(items, latents, strict=True)
        ]
        algorithm.observe([(one, {"x": torch.tensor([0.0, 1.0])}) for one in items])
        seen = Counter[float]()
        for update in range(algorithm.updates_per_round):
            for one in algorithm.select(items, update):
                for forward in algorithm.forwards(Experience(one, paths[one.position]), update):
                    seen.update(forward.x.flatten().tolist())
                    assert ("first" in forward.inputs) == (update == 0)
                    assert torch.equal(forward.inputs["x_next"], forward.x + 1)
                    assert torch.equal(forward.inputs["drawn"], forward.x + 1)
                    assert forward.inputs["advantage"].tolist() == pytest.approx([-1, 1], abs=1e-3)
        assert algorithm.updates_per_round == 4
        assert seen == dict.fromkeys(latents[:, :, :3].flatten().tolist(), 1)

    def test_without_a_kl_nothing_is_asked_of_the_frozen_start(self):
        algorithm = FlowGrpo(FlowGrpoConfig(name="flow_grpo", kl=0.0, clip_range=0.5))
        assert algorithm.velocities == ()
        found = algorithm.loss(self.forward(x_next=pixel(0.1, 0)), {"student": pixel(0, 0)})
        assert found.value.item() == -2 and "kl" not in found.metrics

    def test_the_variance_of_the_ppo_form(self):
        """Of r K, by the means, where K is the closed-form KL and r the ratio of the drawn step.

        Its mean is K's own gradient, (mu - mu_T) / std^2, and its variance K^2 d / std^2, that gradient's none: what a
        closed form saves (arXiv 2605.15055 Eq. 21, 23). In sums over the d dimensions, r = exp(d log_ratio).
        """
        d, rows, std = 16, 40_000, torch.tensor(0.5, dtype=torch.float64)
        mean = 0.3 * normal(1, d, 1, 1)
        teacher = mean + 0.2 * normal(1, d, 1, 1, seed=1)
        drawn = mean + std * normal(rows, d, 1, 1, seed=2)
        student = mean.expand(rows, -1, -1, -1).clone().requires_grad_()
        kl = gaussian_kl(student, teacher.expand(rows, -1, -1, -1), std, reduction="sum")
        ratio = d * log_ratio(drawn, student, mean.expand(rows, -1, -1, -1), std)
        # PPO's loss of advantage -K, and K's own gradient, which a detached advantage would lose.
        value = clipped_surrogate(ratio, -kl.detach(), 0.5) + kl
        (slopes,) = torch.autograd.grad(value.sum(), student)
        slopes, size = slopes.reshape(rows, d), float(kl[0].detach())
        exact = ((mean - teacher) / std**2).flatten()
        assert torch.allclose(slopes.mean(0), exact, atol=5 * size / float(std) / math.sqrt(rows))
        variance = float(slopes.var(0).sum())
        assert variance == pytest.approx(size**2 * d / float(std) ** 2, rel=0.05)
