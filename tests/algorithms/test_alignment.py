"""DDPO, SDPO and PSO against arithmetic by hand."""

import math
from array import array

import pytest
import torch

from opd_ray.algorithms.advantages import PromptStatistics, combined, preferences
from opd_ray.algorithms.pso import pairwise_loss
from opd_ray.algorithms.sdpo import Sdpo, anchor, discounted, interpolation, reward_difference
from opd_ray.config import SdpoConfig
from opd_ray.diffusion import Step, clipped_surrogate, log_prob, log_ratio
from opd_ray.errors import RewardError
from opd_ray.seeds import noise
from opd_ray.types import Prompt, Trajectory, WorkItem
from tests.algorithms.parts import VERSION, item


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestRatios:
    def test_by_hand(self):
        """Two numbers: x' = (1, 2), means (0.5, 2) and (0, 1), std 0.5; log-densities differ by -(x' - mu)^2 / 0.5."""
        x, mean, other = (
            torch.tensor([[[pair]]], dtype=torch.float64) for pair in ([1.0, 2.0], [0.5, 2.0], [0.0, 1.0])
        )
        expected = ((-0.25 + 1.0) / 0.5 + (0.0 + 1.0) / 0.5) / 2
        assert log_ratio(x, mean, other, torch.tensor(0.5)).item() == pytest.approx(expected, abs=1e-10)

    def test_it_is_the_difference_of_densities_and_keeps_what_that_loses(self):
        x, mean = normal(4, 16, 8, 8), normal(4, 16, 8, 8, seed=1)
        other, std = mean + 1e-5 * normal(4, 16, 8, 8, seed=2), torch.tensor(0.3, dtype=torch.float64)
        exact = log_ratio(x, mean, other, std)
        single = [one.float() for one in (x, mean, other)]
        ours = log_ratio(*single, std.float()).double()
        theirs = log_prob(single[0], Step(single[1], std.float())) - log_prob(single[0], Step(single[2], std.float()))
        assert (ours - exact).abs().max() < 1e-7
        assert (ours - exact).abs().max() < 0.3 * (theirs.double() - exact).abs().max()

    def test_equal_means_are_exactly_as_likely(self):
        mean = normal(2, 3, 4, 4).float()
        assert log_ratio(normal(2, 3, 4, 4, seed=1).float(), mean, mean.clone(), torch.tensor(0.01)).tolist() == [0, 0]

    def test_a_deterministic_step_has_none(self):
        with pytest.raises(ValueError, match="no density"):
            log_ratio(normal(1, 1, 1, 1), normal(1, 1, 1, 1), normal(1, 1, 1, 1), torch.tensor(0.0))

    def test_gradients_are_finite_differences(self):
        x, mean, other = (normal(2, 1, 2, 2, seed=seed) for seed in range(3))
        std, advantage = torch.tensor(0.7, dtype=torch.float64), torch.tensor([1.5, -0.5], dtype=torch.float64)

        def surrogate(mean):
            return clipped_surrogate(0.01 * log_ratio(x, mean, other, std), advantage, 0.5)

        def regression(mean):
            return reward_difference(log_ratio(x, mean, other, std), advantage, advantage[:1], 10.0)

        def preference(mean):
            return pairwise_loss(0.01 * log_ratio(x, mean, other, std), 50.0, 0.9)[0]

        for loss in (surrogate, regression, preference):
            assert torch.autograd.gradcheck(loss, (mean.requires_grad_(),), atol=1e-6)


class TestSurrogate:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "expected"),
        [(1.0, 2.0, -2.0), (1.3, 2.0, -2.4), (1.3, -2.0, 2.6), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6)],
    )
    def test_by_hand_with_a_clip_of_a_fifth(self, ratio, advantage, expected):
        found = clipped_surrogate(real(math.log(ratio)), real(advantage), 0.2)
        assert found.item() == pytest.approx(expected, abs=1e-10)


class TestDenseRewards:
    x0 = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 2.0]]]).reshape(1, 4, 1, 1, 2)
    """One drawing of four steps, whose clean predictions turn from one axis to the other."""

    def test_the_anchor_is_least_like_both_ends(self):
        """Sums of cosines: 1 + 0, 0.6 + 0.8, 0 + 1, 0 + 1: the first of the least."""
        assert anchor(self.x0).tolist() == [0]

    def test_shares_by_hand(self):
        """The second: cosines 0.6 (first), 0.6 (anchor, the first too) and 0.8 (last), of a sum of 2."""
        shares = interpolation(self.x0)
        assert torch.allclose(shares[0, 1], torch.tensor([0.3, 0.3, 0.4]))
        assert shares[0, 0].tolist() == [1, 0, 0] and shares[0, 3].tolist() == [0, 0, 1]
        assert torch.allclose(shares.sum(-1), torch.ones(1, 4))

    def test_opposite_predictions_divide_by_nothing(self):
        x0 = torch.stack([torch.ones(4), -torch.ones(4), torch.ones(4)]).reshape(1, 3, 1, 2, 2)
        shares = interpolation(x0)
        assert shares.isfinite().all() and shares.min() >= 0 and shares[0, 1].tolist() == [0, 1, 0]

    def test_returns_by_hand(self):
        assert discounted(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]]
        assert discounted(torch.tensor([[1.0, 2.0]]), 0.0).tolist() == [[1, 2]]

    def test_reward_differences_by_hand(self):
        """Against dA = 1 - (-0.5) with weight 2: (2 (0.3 - 0.1) - 1.5)^2, clipped to 0.2 (2 (0.2 - 0.1) - 1.5)^2."""
        ratio, advantage = real(0.3, 0.1), real(1.0, -0.5)
        weight = real(2.0)
        assert reward_difference(ratio, advantage, weight, 0.0).item() == pytest.approx(1.21, abs=1e-10)
        assert reward_difference(ratio, advantage, weight, 0.2).item() == pytest.approx(1.69, abs=1e-10)

    def test_the_first_update_is_not_clipped(self):
        ratio = torch.zeros(4, requires_grad=True)
        advantage = torch.tensor([1.0, -1.0, 0.5, 0.0])
        both = [reward_difference(ratio, advantage, torch.ones(2), clip) for clip in (0.0, 1e-4)]
        slopes = [torch.autograd.grad(one.sum(), ratio)[0] for one in both]
        assert torch.equal(both[0], both[1]) and torch.equal(slopes[0], slopes[1])
        assert slopes[0].tolist() == [-4.0, 4.0, -1.0, 1.0]  # -2 dA for the first of each pair

    def test_three_pictures_of_each_image_and_their_shares(self):
        """x0 = x - t v at the states: first, anchor and last are what is decoded."""
        work = item(steps=(0, 1))
        sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
        latents, velocities = noise(range(2), (4, 2, 2, 2)), noise(range(2, 4), (3, 2, 2, 2))
        path = Trajectory(work, VERSION, sigmas, latents, {}, {}, velocities=velocities)
        x0 = torch.stack([latents[:, i] - sigmas[i] * velocities[:, i] for i in range(3)], 1)
        algorithm = Sdpo(SdpoConfig(name="sdpo_stepwise"))
        seen, told = algorithm.pictured(path), algorithm.remarks(path)["shares"]
        assert seen.shape == (2, 3, 2, 2, 2) and torch.equal(seen[:, 0], x0[:, 0]) and torch.equal(seen[:, 2], x0[:, 2])
        assert isinstance(told, array) and torch.equal(torch.tensor(told), interpolation(x0).flatten())


class TestPairs:
    def test_by_hand(self):
        """Ratios 1.05 and 0.98, and 2 and 0.5, which a clip of a tenth holds at 1.1 and 0.9; beta 10."""
        better, worse = real(1.05, 2.0).log(), real(0.98, 0.5).log()
        loss, margin = pairwise_loss(torch.cat([better, worse]), 10.0, 0.1)
        expected = [10 * math.log(1.05 / 0.98), 10 * math.log(1.1 / 0.9)]
        assert margin.tolist() == pytest.approx(expected, abs=1e-10)
        assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-one)) for one in expected], abs=1e-10)

    def test_at_the_reference_it_is_log_two_with_opposite_slopes(self):
        ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        loss, _ = pairwise_loss(ratio, 50.0, 0.1)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
        assert torch.autograd.grad(loss.sum(), ratio)[0].tolist() == [-25.0, 25.0]

    def test_best_against_worst_ties_and_pareto(self):
        work = WorkItem(
            0, "a", 0, 0, tuple(Prompt(f"p{n // 3}", f"p{n // 3}", "a") for n in range(6)), (0, 1, 2) * 2, (0,)
        )
        one = {"x": torch.tensor([0.1, 0.9, 0.5, 1.0, 1.0, 1.0])}
        assert preferences(work, one, {}, 3, pareto=False).tolist() == [[1, 0, 1], [3, 3, 0]]
        two = one | {"y": torch.tensor([0.3, 0.2, 0.0, 0.0, 1.0, 0.5])}
        assert preferences(work, two, {"x": 10.0}, 3, pareto=False).tolist() == [[1, 0, 1], [4, 3, 1]]
        assert preferences(work, two, {"x": 10.0}, 3, pareto=True).tolist() == [[1, 0, 0], [4, 3, 1]]

    def test_rewards_that_do_not_apply_are_left_out_and_a_prompt_without_any_is_named(self):
        scores = {"x": torch.tensor([1.0, math.nan]), "y": torch.tensor([3.0, 5.0])}
        assert combined(item(), scores, {"y": 3.0}).tolist() == [(1 + 3 * 3) / 4, 5.0]
        with pytest.raises(RewardError, match=r"no reward of x scores prompt .* of task a"):
            combined(item(), {"x": scores["x"]}, {})


def named(*names, task="a"):
    return [Prompt(name, name, task) for name in names]


class TestStatistics:
    def test_by_hand(self):
        """Two rewards of a prompt, 1 and 3: mean 2, deviation 1. One of another: the round's mean 2."""
        found = PromptStatistics(4, 2, eps=0.0).advantages(named("p", "q", "p"), torch.tensor([[1.0], [2.0], [3.0]]))
        assert found.flatten().tolist() == pytest.approx([-1, 0, 1])

    def test_they_remember_across_rounds_and_checkpoints_and_forget_the_oldest(self):
        one = PromptStatistics(2, 2)
        one.advantages(named("p"), torch.tensor([[100.0, 1.0]]))
        one.advantages(named("p"), torch.tensor([[1.0, 1.0]]))
        other = PromptStatistics(2, 2)
        other.load_state_dict(one.state_dict())
        found = [each.advantages(named("p"), torch.tensor([[3.0, 1.0]])) for each in (one, other)]
        assert torch.equal(*found)
        assert found[0].tolist() == [pytest.approx([1.0, 0.0], abs=1e-5)]  # of 1 and 3, and of 1 and 1

    def test_a_prompt_that_is_not_known_is_compared_within_its_task(self):
        """Two tasks whose rewards have nothing in common: 20 and 22, and 0.4 and 0.6."""
        prompts = [*named("p", "q"), *named("r", "s", task="b")]
        found = PromptStatistics(4, 2, eps=0.0).advantages(prompts, torch.tensor([[20.0], [22.0], [0.4], [0.6]]))
        assert found.flatten().tolist() == pytest.approx([-1, 1, -1, 1])

    @pytest.mark.parametrize("reward", [22.3, 0.1, 1.0])
    def test_equal_rewards_are_no_advantage(self, reward):
        """In float32 the mean of equal numbers may be off by the last bit, and the deviation is as small."""
        prompts = named(*(f"p{n}" for n in range(23)))
        assert PromptStatistics(4, 2).advantages(prompts, torch.full((23, 3), reward)).abs().max() == 0
        algorithm = Sdpo(SdpoConfig(name="sdpo_stepwise"))
        shares = interpolation(noise(range(4), (9, 2, 2, 2)))
        work = WorkItem(0, "a", 0, 0, tuple(named("p", "p", "q", "q")), (0, 1, 0, 1), (0,))
        algorithm.observe([(work, {"look": torch.full((4, 3), reward), "shares": shares.flatten(1)})])
        assert algorithm.known(work)["advantage"].abs().max() < 1e-6

    def test_values_of_a_run_with_other_steps_are_forgotten(self):
        one = PromptStatistics(4, 1)
        one.load_state_dict({"p": [[1.0, 2.0, 3.0]]})
        assert one.advantages(named("p"), torch.tensor([[1.0, 2.0]])).shape == (1, 2)
