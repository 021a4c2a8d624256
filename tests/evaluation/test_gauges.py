"""Fidelity and diversity: by hand, and on samples whose distance is known."""

import pytest
import torch

from opd_ray.evaluation.gauges import Gauge, diversity, kernel_distance, mean_of, over_seeds


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
    """Both the pictures and the true ones are a sample."""
    found = [kernel_distance(normal(60, 0.5, seed=n), normal(60, seed=1000 + n), seed=n) for n in range(100)]
    truth = sum(one.value for one in found) / 100  # it is unbiased
    assert 0.85 <= sum(one.low <= truth <= one.high for one in found) / 100 <= 0.99


def test_what_pairs_share_is_no_doubt_about_their_distance() -> None:
    """Pictures that are the true ones but for a shift: which prompts were drawn says little."""
    true = normal(60, seed=3)
    apart, paired = (kernel_distance(true + 0.5, true, paired=pairs) for pairs in (False, True))
    assert paired.value == apart.value
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="as many pictures as true ones, got 60 and 59"):
        kernel_distance(true, true[1:], paired=True)


def test_seeds_that_differ_widen_the_interval_over_them() -> None:
    """Values 1 and 3, each known exactly: samples are 1, 2 and 3, a quarter, a half and a quarter of the time."""
    found = over_seeds([Gauge(1.0, (1.0,) * 500), Gauge(3.0, (3.0,) * 500)])
    assert (found.value, found.low, found.high) == (2.0, 1.0, 3.0)
    assert sum(one == 2 for one in found.drawn) / 500 == pytest.approx(0.5, abs=0.08)
    together = mean_of([Gauge(1.0, (0.0, 2.0)), Gauge(3.0, (3.0, 3.0))])
    assert (together.value, together.drawn) == (2.0, (1.5, 2.5)), "tasks are averaged sample by sample"


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
