"""A score that failed is infinity on its way to an algorithm, and teaches nothing there."""

import math

import pytest
import torch

from opd_ray.algorithms import Facts
from opd_ray.algorithms.advantages import PromptStatistics, combined, group_advantages, preferences
from opd_ray.algorithms.ddpo import Ddpo
from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.algorithms.grpo_guard import GrpoGuard
from opd_ray.algorithms.nft import DiffusionNft
from opd_ray.algorithms.sdpo import Sdpo
from opd_ray.config import DdpoConfig, FlowGrpoConfig, GrpoGuardConfig, NftConfig, SdpoConfig
from opd_ray.types import Experience, Prompt, Trajectory, WorkItem
from tests.algorithms.parts import VERSION

NAN, FAILED = math.nan, math.inf
PROMPTS = tuple(Prompt(name, name, "a") for name in "ppqq")
ITEM = WorkItem(0, "a", 0, 0, PROMPTS, (0, 1, 0, 1), (0,))


def test_a_row_on_which_one_reward_failed_has_no_reward_at_all():
    """The mean of the others would be another reward; one that does not apply is no failure."""
    scores = {"x": torch.tensor([1.0, 1.0, NAN, 1.0]), "y": torch.tensor([3.0, FAILED, 5.0, 7.0])}
    assert combined(ITEM, scores, {}).tolist()[0::2] == [2.0, 5.0]
    assert combined(ITEM, scores, {}).isnan().tolist() == [False, True, False, False]


def test_what_does_not_count_may_fail():
    scores = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0]), "y": torch.full((4,), FAILED)}
    assert combined(ITEM, scores, {"y": 0.0}).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_the_best_and_the_worst_are_of_those_that_have_a_reward():
    of_three = WorkItem(0, "a", 0, 0, (PROMPTS[0],) * 6, tuple(range(6)), (0,))
    scores = {"x": torch.tensor([1.0, FAILED, 5.0, FAILED, 2.0, FAILED])}
    assert preferences(of_three, scores, {}, 3, pareto=True).tolist() == [[2, 0, 1], [3, 4, 0]]


def test_it_is_neither_remembered_nor_an_advantage():
    """Of 1 and 3 mean and deviation are 2 and 1; a third row without a reward changes nothing of it."""
    prompts = [Prompt("p", "p", "a")] * 3
    statistics = PromptStatistics(8, 2, eps=0.0)
    assert statistics.advantages(prompts, torch.tensor([[1.0], [NAN], [3.0]])).flatten().tolist() == [-1, 0, 1]
    assert statistics.state_dict() == {"p": [[1.0], [3.0]]}
    assert PromptStatistics(8, 2).advantages(prompts, torch.full((3, 1), NAN)).abs().max() == 0


def test_a_group_with_one_score_is_no_tie():
    """Nothing was compared; nor is a failed image part of the share of those that tie."""
    prompts = [Prompt(name, name, "a") for name in "ppqqq"]
    _, ties = group_advantages(prompts, torch.tensor([1.0, NAN, 2.0, 2.0, NAN]), per_prompt=False)
    assert ties.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("per_prompt", [True, False])
def test_a_group_is_compared_without_it(per_prompt):
    prompts = [Prompt("p", "p", "a")] * 3
    rewards = torch.tensor([1.0, NAN, 3.0])
    advantages, ties = group_advantages(prompts, rewards, per_prompt=per_prompt, eps=0.0)
    assert advantages.tolist() == [-1, 0, 1] and ties.tolist() == [0, 0, 0]


SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def slopes(algorithm, velocity, rows, rewards, group):
    """A loss of an item with these rows of what is at hand, and its gradient by the student's velocity.

    Of a second update, in which the student is not what drew. Steps and noise are by place: leave out the last rows.
    """
    one = WorkItem(0, "a", 0, 0, (PROMPTS[0],) * len(rows), tuple(rows), (0, 1, 2))
    algorithm.facts = Facts(seed=3, num_steps=4, images_per_prompt=group)
    rng = torch.Generator().manual_seed(0)
    latents, drawn = (torch.randn(4, 5, 2, 2, 2, generator=rng)[list(rows)] for _ in range(2))
    path = Trajectory(one, VERSION, SIGMAS, latents, {}, {}, velocities=0.01 * drawn[:, :4])
    scores = torch.tensor(rewards)
    told = {name: torch.tensor(part).reshape(len(rows), -1) for name, part in algorithm.remarks(path).items()}
    algorithm.observe([(one, {"x": scores[:, None].expand(-1, 3) if algorithm.pictures == 3 else scores, **told})])
    forward = next(iter(algorithm.forwards(Experience(one, path), 1)))
    known = {name: part[list(rows)] for name, part in velocity.items()}
    student = known.pop("student").requires_grad_()
    found = algorithm.loss(forward, {**known, "student": student})
    return found, torch.autograd.grad(found.value, student)[0]


def near(*names):
    """Small velocities of four images, so that ratios are within every clip."""
    rng = torch.Generator().manual_seed(1)
    return {name: 0.01 * torch.randn(4, 2, 2, 2, generator=rng) for name in names}


def require_as_if_it_were_not_there(algorithm):
    """Of three images one has no score: the gradient is that of the two others alone, and nothing of it."""
    velocity = near("student", "old", "reference")
    found, slope = slopes(algorithm, velocity, [0, 1, 2], [0.0, 2.0, FAILED], 3)
    alone, expected = slopes(algorithm, velocity, [0, 1], [0.0, 2.0], 2)
    assert torch.equal(slope[2], torch.zeros(2, 2, 2)) and float(expected.abs().min()) > 0
    torch.testing.assert_close(slope[:2], expected)
    torch.testing.assert_close(found.value, alone.value)
    tied, _ = slopes(algorithm, velocity, [0, 1, 2], [2.0, 2.0, FAILED], 3)
    assert found.metrics["ties"] == 0 and tied.metrics["ties"] == 1, "a share of those with a score"


@pytest.mark.parametrize("weighting", ["adaptive", "plain"])
def test_diffusion_nft_learns_as_if_the_image_were_not_there(weighting):
    """Also where the student is no longer `old`, to which an advantage of 0 would draw it."""
    config = NftConfig(name="diffusion_nft", weighting=weighting, kl=0.1)
    require_as_if_it_were_not_there(DiffusionNft(config))


@pytest.mark.parametrize(("kind", "name"), [(FlowGrpo, "flow_grpo"), (GrpoGuard, "grpo_guard")])
def test_grpo_learns_as_if_the_image_were_not_there(kind, name):
    """Its KL with the frozen start, too."""
    config = (FlowGrpoConfig if kind is FlowGrpo else GrpoGuardConfig)(name=name, kl=0.1, clip_range=0.99)
    require_as_if_it_were_not_there(kind(config))


@pytest.mark.parametrize("left", [2, 3], ids=["of_both", "of_one"])
@pytest.mark.parametrize(("kind", "config"), [(Ddpo, DdpoConfig), (Sdpo, SdpoConfig)])
def test_whitened_rewards_teach_as_if_the_image_were_not_there(kind, config, left):
    """Of two pairs the second has one score or none: without a score DDPO has three images, SDPO one pair in any case.

    An advantage of 0 would draw SDPO's student to what drew, as a regression on differences of 0.
    """
    name = "ddpo" if kind is Ddpo else "sdpo_stepwise"
    algorithm, velocity = kind(config(name=name, clip_range=0.99)), near("student")
    rewards = [0.0, 2.0, 1.0, 1.0]
    kept = left if kind is Ddpo else 2
    found, slope = slopes(algorithm, velocity, range(4), rewards[:left] + [FAILED] * (4 - left), 2)
    algorithm = kind(config(name=name, clip_range=0.99))  # which remembers nothing
    alone, expected = slopes(algorithm, velocity, range(kept), rewards[:kept], 2)
    assert not slope[kept:].any() and float(expected[:2].abs().min()) > 0
    torch.testing.assert_close(slope[:kept], expected)
    torch.testing.assert_close(found.value, alone.value)


@pytest.mark.parametrize(
    "algorithm",
    [DiffusionNft(NftConfig(name="diffusion_nft", kl=0.1)), FlowGrpo(FlowGrpoConfig(name="flow_grpo", kl=0.1))],
)
def test_an_item_of_failures_alone_teaches_nothing(algorithm):
    velocity = {
        name: torch.full((4, 2, 2, 2), float(number)) for number, name in enumerate(("student", "old", "reference"))
    }
    found, slope = slopes(algorithm, velocity, [0, 1], [FAILED, FAILED], 2)
    assert found.value.item() == 0 and not slope.any() and "ties" not in found.metrics
