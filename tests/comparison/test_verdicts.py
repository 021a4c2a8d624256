"""Intervals over seeds and prompts, and what follows from them."""

import numpy as np
import pytest

from opd_ray.comparison.hypotheses import Hypothesis
from opd_ray.comparison.verdicts import Scores, Verdict, decide

PROMPTS = 400


def scores(**means: float) -> Scores:
    """Three seeds of each arm; scores of a prompt are 0 or 1, and arms share how hard prompts are."""
    rng = np.random.default_rng(0)
    hard = rng.random((3, PROMPTS))
    found = {
        arm: {seed: {"a": (hard[seed] < mean).astype(float).tolist(), "b": [mean] * PROMPTS} for seed in range(3)}
        for arm, mean in means.items()
    }
    return Scores(found, ("a", "b"))


def decided(scores: Scores, **test: object) -> Verdict:
    seeds = next(iter(scores.found.values()))
    return decide("H", Hypothesis.model_validate({"says": "so", "tests": [test]}), scores, [*seeds])


@pytest.mark.parametrize(("at_least", "verdict"), [(0.0, "holds"), (0.1, "undecided"), (0.3, "fails")])
def test_a_difference_is_judged_by_its_interval(at_least: float, verdict: str) -> None:
    found = decided(scores(x=0.6, y=0.5), kind="difference", of="x", to=["y"], at_least=at_least)
    (finding,) = found.findings
    assert found.verdict == verdict
    assert finding.value == pytest.approx(0.1, abs=0.02)
    assert finding.low is not None
    assert finding.high is not None
    assert finding.low < 0.1 < finding.high
    assert len(finding.by_seed) == 3


def test_the_interval_is_that_of_paired_prompts() -> None:
    """Arms whose prompts differ in nothing but a constant differ by just that: what they share cancels out."""
    base = np.random.default_rng(1).random((3, PROMPTS))
    both = {
        "x": {seed: {"a": (base[seed] + 0.25).tolist()} for seed in range(3)},
        "y": {seed: {"a": base[seed].tolist()} for seed in range(3)},
    }
    (finding,) = decided(Scores(both, ("a",)), kind="difference", of="x", to=["y"], at_least=0).findings
    assert (finding.value, finding.low, finding.high) == (
        pytest.approx(0.25),
        pytest.approx(0.25),
        pytest.approx(0.25),
    )


@pytest.mark.parametrize(
    ("seeds", "spread", "least", "most"), [(3, 0.1, 0.8, 0.88), (3, 0.02, 0.97, 1), (12, 0.1, 0.92, 0.98)]
)
def test_how_often_the_interval_covers_the_truth(seeds: int, spread: float, least: float, most: float) -> None:
    """Too seldom with three seeds that are far apart, and too often where they are not: as the page says."""
    hits, rng = 0, np.random.default_rng(2)
    for _ in range(400):
        own = spread * rng.standard_normal((seeds, 1)) + 0.4 * rng.standard_normal((seeds, 128))
        found = {
            "x": {seed: {"a": own[seed].tolist()} for seed in range(seeds)},
            "y": {seed: {"a": [0.0] * 128} for seed in range(seeds)},
        }
        (finding,) = decided(Scores(found, ("a",)), kind="difference", of="x", to=["y"], at_least=0).findings
        assert finding.low is not None
        assert finding.high is not None
        hits += finding.low <= 0 <= finding.high
    assert least <= hits / 400 <= most


def test_a_ratio_has_to_hold_for_every_task() -> None:
    known = scores(student=0.5, a_teacher=0.5, b_teacher=0.8)
    found = decided(known, kind="ratio", of="student", specialists={"a": "a_teacher", "b": "b_teacher"}, at_least=0.95)
    assert [finding.verdict for finding in found.findings] == ["holds", "fails"]
    assert found.findings[1].value == pytest.approx(0.5 / 0.8)
    assert found.verdict == "fails"


def test_uneven_is_the_easiest_share_less_the_others() -> None:
    """From base 0.2: student (0.5, 0.5), specialists 0.8 of a and 0.5 of b: shares 0.5 and 1."""
    known = scores(base=0.2, student=0.5, of_a=0.8, of_b=0.5)
    test = {"kind": "uneven", "of": "student", "base": "base", "specialists": {"a": "of_a", "b": "of_b"}}
    (finding,) = decided(known, **test, easiest="b", at_least=0.1).findings
    assert finding.value == pytest.approx(0.5, abs=0.1)
    assert finding.verdict == "holds"


def test_nothing_is_decided_before_all_seeds_are_in() -> None:
    known = scores(x=0.9, y=0.1)
    known.found = {"x": known.found["x"], "y": {seed: known.found["y"][seed] for seed in (0, 1)}}
    found = decided(known, kind="difference", of="x", to=["y"], at_least=0)
    assert (found.verdict, found.findings[0].verdict) == ("unfinished", "2 of 3 seeds")
    assert found.findings[0].value == pytest.approx(0.8, abs=0.05)
    assert decided(scores(x=0.5), kind="difference", of="x", to=["y"], at_least=0).verdict == "unfinished"


def test_a_share_of_no_gain_is_undecided() -> None:
    """The specialist of b gains in one seed of two, so half of all samples share nothing out."""
    known = scores(base=0.5, student=0.5, of_a=0.8, of_b=0.5)
    test = {"kind": "uneven", "of": "student", "base": "base", "specialists": {"a": "of_a", "b": "of_b"}}
    found = decided(known, **test, easiest="b", at_least=0.1)
    assert (found.verdict, found.findings[0].value) == ("undecided", None)


def test_one_failure_fails_the_hypothesis_and_one_doubt_leaves_it_open() -> None:
    known = scores(x=0.5, better=0.9, worse=0.1, equal=0.5)
    assert decided(known, kind="difference", of="x", to=["worse", "better"], at_least=0).verdict == "fails"
    assert decided(known, kind="difference", of="x", to=["worse", "equal"], at_least=0.02).verdict == "fails"
    assert decided(known, kind="difference", of="x", to=["worse"], at_least=0).verdict == "holds"
