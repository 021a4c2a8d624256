"""The round's arithmetic: by hand, and against the real pools on a simulated clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.planning.rates import Rates
from opd_ray.planning.schedule import ROUNDS_PER_CYCLE, limits, round_seconds, throughput, warm_up
from opd_ray.planning.simulate import simulate

MANY_WORKERS = 10_000


def rates(**changes):
    given = {
        "item_size": 8,
        "items": {"text": 4},
        "seconds": {"rollout": 2.0, "teacher": 1.0},
        "learner": {"serial": 0.5, "shared": 2.0},
        "publish": 0.25,
    }
    return Rates.model_validate(given | changes)


def test_a_strict_round_fills_and_drains_a_pipeline() -> None:
    """4 draws one after the other, the last one's mark, its half second of the learner, the step and the publish."""
    workers = {"rollout": 1, "teacher": 1, "learner": 1}
    assert round_seconds(rates(), workers, 0) == pytest.approx(4 * 2 + 1 + 0.5 + 0.5 + 0.25)
    assert throughput(rates(), workers, 0) == pytest.approx(32 / 10.25)


def test_a_learner_that_needs_all_scores_begins_after_the_last_one() -> None:
    """4 draws of 2 s and the last one's score, then 4 items of half a second, the step and the publish."""
    scored = rates(seconds={"rollout": 2.0, "reward": 1.0}, streams=False)
    workers = {"rollout": 1, "reward": 1, "learner": 1}
    assert round_seconds(scored, workers, 0) == pytest.approx(4 * 2 + 1 + 4 * 0.5 + 0.5 + 0.25)
    assert round_seconds(scored, workers | {"learner": 2}, 0) == pytest.approx(4 * 2 + 1 + 2 * 0.5 + 0.5 + 0.25)
    assert round_seconds(scored, workers, 1) == pytest.approx(4 * 2), "with a round ahead drawing never waits"


def test_two_drawing_workers_draw_in_pairs() -> None:
    workers = {"rollout": 2, "teacher": 1, "learner": 1}
    assert round_seconds(rates(), workers, 0) == pytest.approx(2 * 2 + 2 * 1 + 0.5 + 0.5 + 0.25)


def test_with_rounds_ahead_the_slowest_role_is_what_a_round_takes() -> None:
    workers = {"rollout": 1, "teacher": 1, "learner": 1}
    assert round_seconds(rates(), workers, 1) == pytest.approx(4 * 2)
    assert round_seconds(rates(), {**workers, "rollout": 4}, 1) == pytest.approx(4 * 1)
    slow = rates(learner={"serial": 0.5, "shared": 8.0})
    assert round_seconds(slow, {**workers, "rollout": 4}, 1) == pytest.approx(8 + 0.5 + 0.25)
    assert limits(slow, workers)["learner"] == pytest.approx(32 / 8.75)


def test_ranks_take_whole_items_and_share_no_serial_part() -> None:
    assert limits(rates(), {"learner": 3})["learner"] == pytest.approx(32 / (2 * 0.5 + 0.5 + 0.25))


def test_a_teacher_of_its_own_sees_its_own_items_alone() -> None:
    two = rates(items={"text": 3, "look": 1}, seconds={"rollout": 0.1, "teacher.text": 1.0, "teacher.look": 4.0})
    workers = {"rollout": 4, "teacher.text": 1, "teacher.look": 1, "learner": 1}
    assert limits(two, workers)["teacher.text"] == pytest.approx(32 / 3)
    assert limits(two, workers)["teacher.look"] == pytest.approx(32 / 4)


seconds = st.floats(0.05, 3.0)
counts = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    items=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    times=st.tuples(seconds, seconds, seconds, st.none() | seconds),
    learner=st.tuples(st.floats(0, 1), st.floats(0.05, 1)),
    publish=st.floats(0, 0.5),
    workers=st.tuples(counts, counts, counts, counts, counts),
    shared=st.booleans(),
    staleness=st.integers(0, 2),
    streams=st.booleans(),
)
def test_the_arithmetic_is_what_the_real_pools_do(
    items, times, learner, publish, workers, shared, staleness, streams
) -> None:
    draw, text, look, score = times
    rollout, first, second, reward, ranks = workers
    marks = {"teacher": text} if shared else {"teacher.text": text, "teacher.look": look}
    each = rates(
        items={"text": items[0], "look": items[1]},
        seconds={"rollout": draw, **marks, **({"reward": score, "reward.ocr": text} if score is not None else {})},
        learner={"serial": learner[0], "shared": learner[1] * sum(items)},
        publish=publish,
        streams=streams,
    )
    if staleness:  # fewer than two items a drawing worker: see the module
        rollout = max(min(rollout, sum(items) // 2), 1)
    pools = {"rollout": rollout, **({"teacher": first} if shared else {"teacher.text": first, "teacher.look": second})}
    pools |= {"reward": reward, "reward.ocr": first} if score is not None else {}
    pools["learner"] = min(ranks, sum(items))
    skipped = warm_up(staleness)
    measured = simulate(each, pools, staleness, rounds=skipped + ROUNDS_PER_CYCLE).throughput(skipped)
    # Where roles are nearly in balance the order of the items decides, which no formula knows: seen up to 7 %.
    assert throughput(each, pools, staleness) == pytest.approx(measured, rel=0.1)


def test_ten_thousand_workers() -> None:
    drawing, marking = MANY_WORKERS * 2 // 3, MANY_WORKERS // 3
    each = rates(items={"text": MANY_WORKERS}, learner={"serial": 1.0, "shared": 100.0})
    pools = {"rollout": drawing, "teacher": marking, "learner": 1}
    measured = simulate(each, pools, 0, rounds=1).throughput(0)
    assert throughput(each, pools, 0) == pytest.approx(measured, rel=0.05)
