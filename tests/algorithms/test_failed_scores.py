"""A score that failed is infinity on its way to an algorithm, and teaches nothing there."""

import math

import pytest
import torch

from opd_ray.algorithms.advantages import PromptStatistics, combined, group_advantages, preferences
from opd_ray.types import Prompt, WorkItem

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


@pytest.mark.parametrize("per_prompt", [True, False])
def test_a_group_is_compared_without_it(per_prompt):
    prompts = [Prompt("p", "p", "a")] * 3
    rewards = torch.tensor([1.0, NAN, 3.0])
    advantages, ties = group_advantages(prompts, rewards, per_prompt=per_prompt, eps=0.0)
    assert advantages.tolist() == [-1, 0, 1] and ties.tolist() == [0, 0, 0]
