import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.runtime.health import Event, Health, State

MOVES = {
    State.STARTING: {Event.READY: State.HEALTHY, Event.DRAIN: State.DRAINING},
    State.STALE: {Event.PROVEN: State.HEALTHY, Event.LATE: State.SUSPECT, Event.DRAIN: State.DRAINING},
    State.HEALTHY: {Event.UNPROVEN: State.STALE, Event.LATE: State.SUSPECT, Event.DRAIN: State.DRAINING},
    State.SUSPECT: {Event.ANSWERED: State.HEALTHY, Event.PROVEN: State.HEALTHY, Event.DRAIN: State.DRAINING},
    State.DRAINING: {},
    State.DEAD: {},
}
PATHS = {
    State.STARTING: (),
    State.HEALTHY: (Event.READY,),
    State.STALE: (Event.READY, Event.UNPROVEN),
    State.SUSPECT: (Event.READY, Event.LATE),
    State.DRAINING: (Event.READY, Event.DRAIN),
    State.DEAD: (Event.READY, Event.LOST),
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def reached(path) -> Health:
    health = Health(Clock())
    for event in path:
        health.apply(event)
    return health


@pytest.mark.parametrize(("state", "event"), [*itertools.product(State, Event)])
def test_every_transition(state, event) -> None:
    health = reached(PATHS[state])
    assert health.state is state
    health.apply(event)
    assert health.state is (State.DEAD if event is Event.LOST else MOVES[state].get(event, state))


@given(st.lists(st.sampled_from(Event)), st.lists(st.sampled_from(Event)))
def test_dead_is_for_ever(before, after) -> None:
    health = reached([*before, Event.LOST])
    for event in after:
        health.apply(event)
        assert health.state is State.DEAD


@given(st.lists(st.sampled_from(Event)))
def test_only_a_lost_worker_is_dead_and_a_draining_one_gets_no_more_work(events) -> None:
    health, seen = Health(Clock()), set()
    for event in events:
        health.apply(event)
        seen.add(event)
        assert (health.state is State.DEAD) == (Event.LOST in seen)
        assert not (Event.DRAIN in seen and health.state is State.HEALTHY)


def test_time_in_a_state_starts_again_with_it_and_only_then() -> None:
    clock = Clock()
    health = Health(clock)
    clock.now = 5.0
    assert health.seconds == 5
    health.apply(Event.PROVEN)  # means nothing to a starting one
    assert health.seconds == 5
    health.apply(Event.READY)
    assert health.seconds == 0
    clock.now = 7.0
    assert (health.seconds, health.since) == (2, 5)
