"""The best split, against trying all of them; what it says of the bottleneck."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.errors import PlacementError
from opd_ray.planning.advice import advice
from opd_ray.planning.rates import Rates
from opd_ray.planning.schedule import throughput
from opd_ray.planning.split import Demand, best_split, bottleneck, curve, gains

seconds = st.floats(0.1, 3.0)


def rates(items, times, serial=0.2, shared=1.0, **changes):
    return Rates(item_size=4, items=items, seconds=times, learner={"serial": serial, "shared": shared}, **changes)


def every_split(demand, most, total):
    counts = (range(1, min(2 * total, most[role]) + 1) for role in demand.each)
    for chosen in itertools.product(*counts):
        workers = dict(zip(demand.each, chosen, strict=True))
        if demand.units(workers) <= total:
            yield workers


@settings(max_examples=25, deadline=None)
@given(
    items=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    times=st.tuples(seconds, seconds, seconds),
    learner=st.tuples(st.floats(0, 1), st.floats(0.1, 8)),
    parts=st.tuples(*[st.sampled_from([1.0, 0.5])] * 4),
    total=st.integers(4, 8),
    staleness=st.integers(0, 1),
)
def test_nothing_is_much_better_than_the_best_split(items, times, learner, parts, total, staleness) -> None:
    draw, text, look = times
    each = rates(
        {"text": items[0], "look": items[1]},
        {"rollout": draw, "teacher.text": text, "teacher.look": look},
        *learner,
    )
    demand = Demand("GPU", dict(zip(each.roles(shared=False), parts, strict=True)))
    most = dict.fromkeys(demand.each, sum(items) * (staleness + 1)) | {"learner": sum(items)}
    best = max(throughput(each, workers, staleness) for workers in every_split(demand, most, total))
    found = best_split(each, demand, total, staleness)
    assert found.samples_per_s >= 0.95 * best
    assert demand.units(found.workers) == found.units <= total


def test_work_decides_how_many_workers_a_role_gets() -> None:
    each = rates({"text": 48}, {"rollout": 6.0, "teacher": 3.0}, serial=0.0, shared=48.0 * 3)
    split = best_split(each, Demand("GPU", dict.fromkeys(each.roles(shared=True), 1.0)), 16, 1)
    assert dict(split.workers) == {"rollout": 8, "teacher": 4, "learner": 4}
    assert split.samples_per_s == pytest.approx(48 * 4 / 36)


def test_parts_of_cards_are_on_one_card() -> None:
    demand = Demand("GPU", {"rollout": 1.0, "teacher": 0.6, "reward": 0.4, "learner": 2.0})
    assert demand.units({"rollout": 3}) == 3
    assert demand.units({"teacher": 2}) == 2, "1.2 cards, and yet no two of them fit on one"
    assert demand.units({"teacher": 2, "reward": 2}) == 2
    assert demand.units({"teacher": 2, "reward": 5}) == 4
    assert demand.units({"learner": 2}) == 4


def test_a_role_without_a_card_gets_what_is_of_use() -> None:
    each = rates({"text": 8}, {"rollout": 1.0, "teacher": 1.0, "reward": 3.0}, shared=8.0)
    demand = Demand("GPU", {"rollout": 1.0, "teacher": 1.0, "reward": 0.0, "learner": 1.0})
    split = best_split(each, demand, 6, 1)
    assert split.units == 6 and 5 <= split.workers["reward"] <= 9


def test_too_small_a_cluster_is_refused_in_numbers() -> None:
    each = rates({"text": 8}, {"rollout": 1.0, "teacher": 1.0})
    demand = Demand("GPU", dict.fromkeys(each.roles(shared=True), 1.0))
    with pytest.raises(PlacementError, match=r"one worker of each role takes 3 GPUs .* at least 3"):
        best_split(each, demand, 2, 0)
    assert [size for size, _ in curve(each, demand, [1, 2, 4, 8], 0)] == [4, 8]


def test_more_cards_are_never_worse_and_hundreds_are_searched_quickly() -> None:
    each = rates({"a": 16, "b": 16, "c": 16}, {"rollout": 20.0, "teacher": 12.0}, serial=2.0, shared=48 * 40.0)
    demand = Demand("GPU", dict.fromkeys(each.roles(shared=True), 1.0))
    found = curve(each, demand, [2**n for n in range(2, 10)], 0)
    values = [split.samples_per_s for _, split in found]
    assert values == sorted(values)
    assert found[-1][1].units < 512, "no role has a use for more workers than items"


def test_the_bottleneck_is_where_speed_gains() -> None:
    each = rates({"text": 8}, {"rollout": 1.0, "teacher": 4.0}, shared=1.0)
    workers = {"rollout": 2, "teacher": 1, "learner": 1}
    assert bottleneck(each, workers, 1) == "teacher"
    assert gains(each, workers, 1)["teacher"] == pytest.approx(2.0)
    assert gains(each, workers, 1)["rollout"] == pytest.approx(1.0)
    slow = each.model_copy(update={"publish": 100.0})
    assert bottleneck(slow, workers, 1) == "publish"


def test_advice_names_the_role_and_a_number() -> None:
    each = rates({"text": 12, "look": 4}, {"rollout": 0.5, "teacher.text": 3.0, "teacher.look": 0.5}, shared=4.0)
    workers = {"rollout": 2, "teacher.text": 1, "teacher.look": 1, "learner": 1}
    said = advice(each, workers, 0.41, 1)
    assert said.startswith("teacher-bound: the learner waited 41 % of the time; ")
    assert "more `text` workers would give about" in said
    heavy = rates({"text": 16}, {"rollout": 0.5, "teacher": 0.5}, shared=48.0)
    assert "more learner ranks would give about" in advice(heavy, {"rollout": 2, "teacher": 2, "learner": 1}, 0.0, 1)
    serial = rates({"text": 16}, {"rollout": 0.1, "teacher": 0.1}, serial=20.0, shared=1.0)
    assert "the same on every rank" in advice(serial, {"rollout": 2, "teacher": 2, "learner": 1}, 0.0, 1)
    paused = each.model_copy(update={"publish": 400.0})
    assert advice(paused, workers, 0.1, 1).startswith("publish-bound")
