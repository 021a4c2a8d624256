import math

import numpy as np
import pytest

from opd_ray.evaluation import gap_closed, mean

NAN = math.nan


def test_a_mean_of_equal_scores_has_no_width():
    assert mean([0.25] * 8) == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 8}


def test_the_interval_of_a_coin_is_that_of_the_binomial():
    scores = [0.0, 1.0] * 200
    found = mean(scores)
    # The bootstrap's standard error is sqrt(p (1 - p) / n) = .5 / 20 = .025; 95 % are 1.96 of it.
    assert found["value"] == 0.5
    assert found["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert found["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [mean(rng.normal(3.0, 1.0, 50))["low"] < 3.0 < mean(rng.normal(3.0, 1.0, 50))["high"] for _ in range(60)]
    assert 50 <= sum(inside) <= 60  # two one-sided bounds, 97.5 % each


def test_scores_that_do_not_apply_are_left_out():
    assert mean([1.0, NAN, 3.0, NAN])["value"] == 2.0
    assert mean([1.0, NAN, 3.0, NAN])["n"] == 2
    assert mean([NAN]) == mean([]) == {"value": None, "low": None, "high": None, "n": 0}


def test_the_same_scores_give_the_same_interval():
    scores = list(np.random.default_rng(1).random(30))
    assert mean(scores) == mean(scores) != mean(scores, seed=1)


def test_gap_closed_by_hand():
    base, teacher, student = [0.0, 0.2], [1.0, 0.8], [0.6, 0.7]
    # Means 0.1, 0.9 and 0.65: 0.55 / 0.8.
    assert gap_closed(base, teacher, student)["value"] == pytest.approx(0.6875)


def test_gap_closed_resamples_the_three_together():
    """Prompts differ by far more than models do: only pairing sees that the gap is closed to exactly a half."""
    base = [float(n) for n in range(20)]
    found = gap_closed(base, [b + 1 for b in base], [b + 0.5 for b in base])
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


def test_gap_closed_leaves_out_what_any_of_them_lacks():
    found = gap_closed([0.0, 0.0, 9.0, NAN], [1.0, 1.0, NAN, 1.0], [0.5, 0.5, 9.0, 9.0])
    assert found == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


@pytest.mark.parametrize(
    ("base", "teacher"),
    [([0.5, 0.5], [0.5, 0.5]), ([0.5, 0.6], [0.1, 0.2]), ([0.0, 1.0], [0.9, 0.0]), ([NAN, 1.0], [1.0, NAN]), ([], [])],
)
def test_without_a_gap_there_is_nothing_to_close(base, teacher):
    assert gap_closed(base, teacher, base) is None


def test_beyond_the_teacher_is_more_than_one_and_below_the_base_less_than_none():
    assert gap_closed([0.0] * 4, [0.5] * 4, [0.75] * 4)["value"] == 1.5
    assert gap_closed([0.5] * 4, [1.0] * 4, [0.25] * 4)["value"] == -0.5
