"""Fidelity and diversity: by hand, and on samples whose distance is known."""

import pytest
import torch

from opd_ray.evaluation.gauges import diversity, kernel_distance


def normal(count, mean=0.0, seed=0, size=4):
    return mean + torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_a_distance_by_hand() -> None:
    """One number each, 0 and 1 against 1 and 1: k(x, y) = (x y + 1)^3.

    Within: k(0, 1) = 1 and k(1, 1) = 8; across: the mean of 1, 1, 8, 8.
    """
    found = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]]))
    assert found.value == pytest.approx(1 + 8 - 2 * 4.5)


def test_two_samples_of_one_distribution_are_nothing_apart_and_others_are() -> None:
    same = [kernel_distance(normal(200, seed=n), normal(300, seed=100 + n)).value for n in range(20)]
    assert abs(sum(same) / 20) < 0.02 and min(same) < 0 < max(same), "unbiased"
    near, far = (kernel_distance(normal(200, mean), normal(300, seed=1)) for mean in (0.3, 0.8))
    assert 0 < near.value < far.value and near.low < near.value < near.high < far.low


def test_its_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    true = normal(500, seed=1000)
    found = [kernel_distance(normal(60, 0.5, seed=n), true, seed=n) for n in range(100)]
    truth = sum(one.value for one in found) / 100  # it is unbiased
    assert 0.85 <= sum(one.low <= truth <= one.high for one in found) / 100 <= 0.99


def test_diversity_by_hand_and_of_nothing() -> None:
    """Distances 5 and 13, of two numbers each."""
    pairs = [torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [5.0, 12.0]])]
    assert diversity(pairs).value == pytest.approx((5 + 13) / 2 / 2**0.5)
    assert diversity([torch.ones(8, 16, 4, 4)]).value == 0


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two pictures of each, got 1 and 3"):
        kernel_distance(normal(1), normal(3))
    with pytest.raises(ValueError, match="at least two pictures of each prompt"):
        diversity([normal(1)])
