"""Autoscale follows a load, settles under a constant one, and does not ask in vain for what there is no room for."""

import itertools

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from opd_ray.config import Autoscale
from opd_ray.runtime.autoscale import BACKOFF_S, WINDOW_S, Autoscaler
from opd_ray.runtime.usage import Usage
from tests.runtime.simulated import Rounds, Simulation, Steady

HOUR = 3600.0
LIMITS = Autoscale(min=1, max=12)

steady = st.builds(Steady, rate=st.floats(0.7, 6), service_s=st.sampled_from([0.5, 1.0, 2.0, 3.5]))
rounds = st.builds(Rounds, items=st.integers(2, 30), service_s=st.floats(0.5, 8), gap_s=st.floats(0.5, 30))


# Without shrinking: an example takes a third of a second, and its sizes say enough.
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(load=st.one_of(steady, rounds), size=st.integers(1, 12), start_s=st.floats(1, 60))
def test_under_a_constant_load_the_size_settles(load, size, start_s):
    role = Simulation(LIMITS, size, load, start_s)
    role.run(3 * HOUR)
    assert all(later - earlier > HOUR for earlier, later in itertools.pairwise(role.turns)), role.sizes
    assert all(1 <= number <= 12 for _, number in role.sizes)


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(load=steady, target=st.floats(0.02, 0.5))
def test_a_steady_load_gets_the_workers_it_needs(load, target):
    role = Simulation(Autoscale(max=40, target=target), 1, load)
    role.run(2 * HOUR)
    needed = load.rate * load.service_s
    assert role.size >= needed - 0.5
    assert role.size <= needed / 0.8 + 2.5, role.sizes


def test_a_step_in_load_is_followed_within_a_few_windows():
    role = Simulation(LIMITS, 1, Steady(rate=1.0, service_s=0.5))
    role.run(600)
    assert role.size == 1 and role.sizes == []
    role.load.rate = 8.0  # 4 workers' work
    role.run(10 * WINDOW_S + 3 * role.start_s)
    assert role.size >= 4 and role.turns == []
    role.run(HOUR)
    high, changes = role.size, len(role.sizes)
    role.load.rate = 2.0  # 1 worker's work: 2 do it in 80 % of their time
    role.run(4 * WINDOW_S)
    assert role.size < high, "it begins at once"
    role.run((high - 2) * 3.5 * WINDOW_S)
    assert role.size == 2 and len(role.sizes) == changes + high - 2
    role.run(HOUR)
    assert role.size == 2


def test_a_queue_before_idle_workers_adds_one_at_a_time():
    """Bursts: work waits for much of the time, and yet the workers are idle for most of it."""
    role = Simulation(LIMITS, 4, Rounds(items=12, service_s=2.0, gap_s=6.0))
    role.run(4 * WINDOW_S)
    assert [size for _, size in role.sizes] == [5]


def test_a_queue_before_busy_workers_at_most_doubles():
    role = Simulation(LIMITS, 3, Steady(rate=20.0, service_s=1.0))
    role.run(20 * WINDOW_S)
    assert [size for _, size in role.sizes] == [6, 12]


def feed(scaler, size, used, *, seconds=30.0, answers=40, queued=0.0, busy=0.0):
    """One window; returns the decision and what has been counted by then."""
    used = Usage(
        seconds=used.seconds + seconds,
        workers=used.workers + size * seconds,
        busy=used.busy + busy,
        queued=used.queued + queued,
        answers=used.answers + answers,
    )
    return scaler.decide(size, used, settled=True), used


@pytest.mark.parametrize("short", [{"seconds": 29.0}, {"answers": 19}])
def test_too_little_says_nothing(short):
    scaler, used = Autoscaler(LIMITS), Usage()
    scaler.decide(1, used, settled=True)
    assert feed(scaler, 1, used, queued=29.0, **short)[0] == 1
    assert feed(scaler, 1, used, queued=29.0)[0] == 2


def test_many_workers_need_more_answers():
    scaler, used = Autoscaler(LIMITS), Usage()
    scaler.decide(10, used, settled=True)
    assert feed(scaler, 10, used, queued=29.0, answers=29)[0] == 10
    assert feed(scaler, 10, used, queued=29.0, answers=30)[0] == 11


def test_nothing_is_judged_while_workers_start():
    scaler = Autoscaler(LIMITS)
    scaler.decide(1, Usage(), settled=True)
    late = Usage(seconds=100, workers=100, queued=100, answers=100)
    assert scaler.decide(1, late, settled=False) == 1
    assert feed(scaler, 1, late, seconds=20, queued=20)[0] == 1, "the window began again"


@pytest.mark.parametrize(("size", "queued", "busy"), [(1, 0.0, 0.0), (12, 30.0, 360.0), (3, 0.0, 55.0), (3, 1.0, 5.0)])
def test_it_stays_where_it_is(size, queued, busy):
    """At a limit; where the others could not do the work; and between the two thresholds."""
    scaler, used = Autoscaler(LIMITS), Usage()
    scaler.decide(size, used, settled=True)
    for _ in range(10):
        wanted, used = feed(scaler, size, used, queued=queued, busy=busy)
        assert wanted == size


def test_after_a_change_two_windows_pass():
    scaler, used = Autoscaler(LIMITS), Usage()
    scaler.decide(1, used, settled=True)
    sizes, size = [], 1
    for _ in range(7):
        size, used = feed(scaler, size, used, queued=30.0)
        sizes.append(size)
    assert sizes == [2, 2, 2, 3, 3, 3, 4]


def test_growth_without_room_is_asked_for_ever_less_often():
    role = Simulation(LIMITS, 2, Steady(rate=20.0, service_s=1.0), room=2)
    role.run(4 * HOUR)
    asked = [time for time, size in role.sizes if size > 2]
    waits = [after - before for before, after in itertools.pairwise(asked)]
    assert BACKOFF_S <= waits[0] < BACKOFF_S + 5 * WINDOW_S
    assert all(1.5 * first < second for first, second in itertools.pairwise(waits[:4])), waits
    assert max(waits) < HOUR + 5 * WINDOW_S and len(asked) < 12
    assert role.size == 2
    role.room = 12
    role.run(1.5 * HOUR)
    assert role.size == 12, "room was found at last, and then growth is quick again"


def test_what_a_person_sets_is_no_lack_of_room():
    scaler, used = Autoscaler(LIMITS), Usage()
    scaler.decide(4, used, settled=True)
    scaler.aim(1, used)
    for _ in range(2):
        wanted, used = feed(scaler, 1, used, queued=30.0)
        assert wanted == 1
    assert feed(scaler, 1, used, queued=30.0)[0] == 2
