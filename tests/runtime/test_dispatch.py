"""Pools and the dispatcher over a backend in memory: no process, no Ray, no time."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.actors import Ack
from opd_ray.errors import LearnerLostError, PlacementError, RuntimeFault, Stopped
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Done, WorkerSpec
from opd_ray.runtime.health import State
from opd_ray.runtime.jobs import MAX_KILLED, MAX_RUNS, Job, Output
from opd_ray.runtime.pool import MAX_STRIKES, Pool
from opd_ray.runtime.watch import BEATS
from tests.runtime.fake import Critic, FakeBackend, Painter, weights


class Studio:
    """Painters, critics and a dispatcher over a fake backend."""

    def __init__(self, painters=1, critics=1, painter=Painter, critic=Critic, logs=None) -> None:
        self.backend = FakeBackend()
        self.dispatcher = Dispatcher(self.backend, call_timeout_s=60, clock=self.backend.clock)
        self.painters = self.pool("rollout", painter, painters, logs)
        self.critics = self.pool("teacher.text", critic, critics, logs)
        self.weights = weights(self.backend, 0)
        self.notes = []
        self.dispatcher.note = self.notes.append

    def pool(self, role, factory, size, logs):
        clock = self.backend.clock
        spec = WorkerSpec(role, factory, 1, {"cpu": 1}, logs)
        pool = Pool(self.backend, spec, size, clock=clock, start_timeout_s=30, call_timeout_s=60)
        self.dispatcher.pools.append(pool)
        return pool

    def open(self):
        self.dispatcher.wait_ready()
        return self

    def draw(self, number, by=None):
        by = by or self.weights
        args = (number, by.version, by.sha256)
        return self.dispatcher.submit(Job(self.painters, "draw", args, 1, f"drawing {number}", weights=by))

    def mark(self, draw, number=0):
        def args():
            return draw.result.value, Output(draw, 0)

        return self.dispatcher.submit(Job(self.critics, "score", args, 1, f"marking {number}", after=(draw,)))

    def done_by(self, method):
        return [name for name, what, _ in self.backend.begun if what == method]

    def value(self, job):
        return self.backend.store[job.call.bulk[0]]


@pytest.fixture
def studio():
    return Studio().open()


def test_a_drawing_is_marked_and_counted(studio) -> None:
    draw = studio.draw(7)
    mark = studio.mark(draw)
    studio.dispatcher.wait([mark])
    assert studio.value(mark) == "mark of picture 7 by sha-0"
    assert studio.dispatcher.forwards == {"rollout": 3, "teacher": 1}
    assert studio.dispatcher.seconds == {"rollout": 2.0, "teacher": 1.0}
    assert studio.critics.workers[0].facts == {"critic": "facts"}


def test_no_worker_holds_more_than_two_requests() -> None:
    studio = Studio(painters=2).open()
    studio.backend.seconds["draw"] = 1.0
    studio.dispatcher.wait([studio.draw(n) for n in range(20)])
    assert {name: handle.most for name, handle in studio.backend.handles.items()} == {
        "rollout-0": 2,
        "rollout-1": 2,
        "teacher.text-0": 0,
    }


def test_the_least_loaded_worker_is_first() -> None:
    studio = Studio(critics=3).open()
    draw = studio.draw(0)
    studio.dispatcher.wait([draw])
    for n in range(4):
        studio.mark(draw, n)
    studio.critics.assign()
    assert [len(worker.flying) for worker in studio.critics.workers] == [2, 1, 1]


def test_a_job_waits_for_its_inputs_and_does_not_block_others(studio) -> None:
    studio.backend.seconds["draw"] = 5.0
    first, second = studio.draw(0), studio.draw(1)
    late, early = studio.mark(second, 1), studio.mark(first, 0)
    studio.dispatcher.wait([early])
    assert early.done and not late.done


def test_weights_are_bound_and_proven_before_a_draw(studio) -> None:
    studio.dispatcher.wait([studio.draw(0), studio.draw(1)])
    assert [what for _, what, _ in studio.backend.begun if what in {"bind", "draw"}] == ["bind", "draw", "draw"]
    assert studio.painters.workers[0].bound == studio.weights.identity
    assert studio.painters.workers[0].health.state is State.HEALTHY


def test_a_worker_that_binds_is_stale_and_gets_no_work(studio) -> None:
    studio.draw(0)
    studio.painters.assign()
    studio.painters.assign()
    worker = studio.painters.workers[0]
    assert worker.health.state is State.STALE and list(worker.flying.values()) == [None]
    assert len(studio.painters.queue) == 1


def test_weights_are_swapped_only_on_an_idle_worker(studio) -> None:
    new = weights(studio.backend, 1)
    studio.backend.seconds["draw"] = 3.0
    jobs = [studio.draw(0), studio.draw(1), studio.draw(2, new), studio.draw(3)]
    studio.painters.assign()
    studio.dispatcher.wait(jobs)
    order = [(what, args[0]) for _, what, args in studio.backend.begun if what in {"bind", "draw"}]
    assert [what for what, _ in order] == ["bind", "draw", "draw", "bind", "draw", "bind", "draw"]
    assert [studio.value(job) for job in jobs] == [f"picture {n} by sha-{int(n == 2)}" for n in range(4)]
    assert not studio.painters.lost


def test_a_worker_that_has_the_weights_is_preferred() -> None:
    studio = Studio(painters=2).open()
    studio.dispatcher.wait([studio.draw(0)])
    studio.painters.workers.reverse()  # the order among equals does not do it
    studio.dispatcher.wait([studio.draw(1)])
    assert studio.done_by("bind") == ["rollout-0"]


def test_another_acknowledgement_than_the_weights_is_no_proof() -> None:
    class Liar(Painter):
        def bind(self, weights, flat):
            return Done(Ack(weights.version, 1, "another"), 0.0, 0)

    studio = Studio(painter=Liar).open()
    studio.draw(0)
    with pytest.raises(Stopped, match="acknowledged weights"):
        studio.dispatcher.wait(studio.painters.queue)
    assert not studio.done_by("draw")


def test_work_of_a_lost_worker_runs_again_on_a_successor_with_a_new_name(studio) -> None:
    studio.backend.seconds["draw"] = 5.0
    jobs = [studio.draw(n) for n in range(3)]
    calls = iter(range(100))
    studio.backend.before_wait = lambda: next(calls) == 3 and studio.backend.handles["rollout-0"].die()
    studio.dispatcher.wait(jobs)
    assert [studio.value(job) for job in jobs] == [f"picture {n} by sha-0" for n in range(3)]
    assert studio.backend.killed == ["rollout-0"], "also its process, whatever is left of it, is ended"
    assert [worker.handle.name for worker in studio.painters.workers] == ["rollout-1"]
    assert studio.notes == ["rollout-0 was lost while drawing 0 (rollout-0 died); 2 work items run again"]
    assert set(studio.done_by("draw")[-3:]) == {"rollout-1"}
    assert studio.dispatcher.forwards == {"rollout": 9}, "a lost answer is not counted"


def test_an_idle_worker_that_died_is_replaced_when_it_is_needed(studio) -> None:
    studio.backend.handles["rollout-0"].die()
    job = studio.draw(0)
    studio.dispatcher.wait([job])
    assert studio.value(job) == "picture 0 by sha-0"


@pytest.mark.parametrize("readers", [1, 2])
def test_a_lost_input_runs_its_producer_again_and_blames_no_reader(readers) -> None:
    studio = Studio(critics=2).open()
    draw = studio.draw(0)
    studio.dispatcher.wait([draw])
    studio.backend.lose(draw.call.bulk[0])
    marks = [studio.mark(draw, n) for n in range(readers)]
    studio.dispatcher.wait([draw, *marks])
    assert [studio.value(mark) for mark in marks] == ["mark of picture 0 by sha-0"] * readers
    assert len(studio.done_by("draw")) == 2
    assert not studio.critics.lost and not studio.painters.lost
    assert "an input of marking 0 is gone" in studio.notes[0]


def test_a_suspect_that_answers_with_a_lost_input_gets_work_again(studio) -> None:
    draw = studio.draw(0)
    studio.dispatcher.wait([draw])
    studio.backend.seconds["score"] = 40.0  # suspect after 30
    studio.backend.lose(draw.call.bulk[0])
    mark = studio.mark(draw)
    studio.dispatcher.wait([mark])
    assert studio.value(mark) == "mark of picture 0 by sha-0"


def test_an_input_that_is_lost_again_and_again_stops_the_run() -> None:
    studio = Studio()
    studio.open()

    def lose_pictures() -> None:
        for ref in [ref for ref, value in studio.backend.store.items() if value.startswith("picture")]:
            studio.backend.lose(ref)

    studio.backend.before_wait = lose_pictures
    mark = studio.mark(studio.draw(0))
    with pytest.raises(Stopped, match=f"ing 0 was run {MAX_RUNS} times and lost each time"):
        studio.dispatcher.wait([mark])


def test_lost_weights_stop_the_run(studio) -> None:
    studio.backend.lose(studio.weights.flats[0])
    with pytest.raises(LearnerLostError, match="the published weights are gone"):
        studio.dispatcher.wait([studio.draw(0)])


def test_workers_that_die_one_after_the_other_stop_the_run_and_name_role_and_log(tmp_path) -> None:
    class Doomed(Painter):
        def ready(self):
            raise AssertionError("does not get so far")

    studio = Studio(painter=Doomed, logs=tmp_path)

    def die() -> None:
        for name, handle in studio.backend.handles.items():
            if name.startswith("rollout"):
                handle.die()

    studio.backend.before_wait = die
    with pytest.raises(
        Stopped, match=rf"{MAX_STRIKES} rollout workers were lost .*rollout-2 was lost while starting"
    ) as caught:
        studio.open()
    assert caught.value.exit_code == 3
    assert "--resume" in str(caught.value)


def test_a_job_that_kills_every_worker_is_named_although_others_answer() -> None:
    """An answer in between starts the count of lost workers again; the job has a count of its own."""
    studio = Studio().open()

    def poison() -> None:
        for handle in studio.backend.handles.values():
            if handle.requests and handle.requests[0].method == "draw" and handle.requests[0].args[0] == 13:
                handle.die()

    studio.backend.before_wait = poison
    jobs = [studio.draw(n) for n in (13, *range(4))]
    with pytest.raises(Stopped, match="drawing 13"):
        studio.dispatcher.wait(jobs)
    assert len(studio.painters.lost) == MAX_KILLED


def test_a_job_that_may_be_given_up_has_another_answer_after_its_own_number_of_losses() -> None:
    studio = Studio().open()

    def poison() -> None:
        for handle in studio.backend.handles.values():
            if handle.requests and handle.requests[0].method == "draw" and handle.requests[0].args[0] == 13:
                handle.die()

    studio.backend.before_wait = poison
    doomed, others = studio.draw(13), [studio.draw(n) for n in range(4)]
    doomed.max_killed, doomed.otherwise = 2, lambda why: f"nothing, since {why}"
    studio.dispatcher.wait([doomed, *others])
    assert doomed.result.value.startswith("nothing, since drawing 13: 2 workers were lost one after the other")
    assert "--resume" not in doomed.result.value and all(job.done for job in others)
    assert len(studio.painters.lost) == 2
    assert any("drawing 13" in note and "It is given up, and the run goes on" in note for note in studio.notes)


@pytest.mark.parametrize("most", [2, 3, 6])
def test_jobs_that_may_be_given_up_never_stop_a_run_though_nothing_else_was_answered(most) -> None:
    """The first ones of fresh workers, two in a row: each is given up at its own number, and none is a strike."""
    studio = Studio().open()

    def poison() -> None:
        for handle in studio.backend.handles.values():
            if handle.requests and handle.requests[0].method == "draw" and handle.requests[0].args[0] >= 13:
                handle.die()

    studio.backend.before_wait = poison
    doomed, good = [studio.draw(n) for n in (13, 14)], studio.draw(1)
    for job in doomed:
        job.max_killed, job.otherwise = most, lambda why: "nothing"
    studio.dispatcher.wait([*doomed, good])
    assert [job.result.value for job in doomed] == ["nothing"] * 2 and len(studio.painters.lost) == 2 * most


def test_an_innocent_job_behind_it_is_not_the_one_that_is_given_up() -> None:
    studio = Studio(painters=1).open()
    studio.backend.seconds["draw"] = 1.0
    studio.dispatcher.wait([studio.draw(0)])
    first, behind = studio.draw(1), studio.draw(2)
    studio.painters.assign()
    studio.painters.lose(next(iter(studio.painters.workers[0].flying)), "a test")
    assert list(studio.painters.queue) == [first, behind]
    assert (first.attempts, behind.attempts) == (1, 0)


def test_a_worker_that_does_not_start_is_a_placement_error_with_what_is_missing() -> None:
    studio = Studio(painters=3)
    studio.backend.never_start = {"rollout-1", "rollout-2"}
    studio.backend.lack = "no room for 2 workers: asked {CPU: 2}; free per node {CPU: 0}; missing {CPU: 2}"
    with pytest.raises(PlacementError, match=r"rollout-1 did not start in 30 s; .*asked .*free per node .*missing"):
        studio.open()
    assert studio.backend.clock() < 32
    assert studio.backend.asked == [(2, True)], "what has started is not asked for again"


def test_a_worker_that_does_not_start_although_there_is_room_points_to_its_log(tmp_path) -> None:
    studio = Studio(logs=tmp_path)
    studio.backend.never_start = {"rollout-0"}
    with pytest.raises(PlacementError, match="the cluster has room, so see its log under"):
        studio.open()


def test_a_successor_that_does_not_start_stops_the_run_resumably(studio) -> None:
    studio.dispatcher.wait([studio.draw(0)])
    studio.backend.never_start = {"rollout-1"}
    studio.backend.handles["rollout-0"].die()
    with pytest.raises(Stopped, match="rollout-1 did not start"):
        studio.dispatcher.wait([studio.draw(0)])


def test_a_worker_that_hangs_is_suspect_then_replaced(studio) -> None:
    studio.backend.hanging = {("rollout-0", "draw")}
    job, states = studio.draw(0), Counter()
    worker = studio.painters.workers[0]
    studio.backend.before_wait = lambda: states.update([worker.health.state])
    studio.dispatcher.wait([job])
    assert studio.value(job) == "picture 0 by sha-0"
    assert studio.notes == ["rollout-0 was lost while drawing 0 (no answer in 60 s); 1 work items run again"]
    assert states[State.SUSPECT] == pytest.approx(60, abs=2), "half of the timeout, at two turns a second"
    assert 60 <= studio.backend.clock() < 65


def test_a_slow_worker_is_not_blamed_for_what_waits_behind(studio) -> None:
    studio.backend.seconds["draw"] = 50.0  # of 60; two at a time
    studio.dispatcher.wait([studio.draw(n) for n in range(4)])
    assert not studio.painters.lost


def test_workers_are_not_blamed_for_a_driver_that_slept(studio) -> None:
    job = studio.draw(0)
    studio.painters.assign()
    studio.backend.wait([next(iter(studio.painters.workers[0].flying))], 1.0)
    studio.backend.clock.now += 1000
    studio.dispatcher.wait([job])
    assert not studio.painters.lost


def test_draining_finishes_what_it_holds_and_takes_nothing_new() -> None:
    studio = Studio(painters=2).open()
    studio.backend.seconds["draw"] = 1.0
    jobs = [studio.draw(n) for n in range(4)]
    studio.dispatcher.wait([jobs[0]])
    studio.painters.resize(1)
    (leaving,) = [worker for worker in studio.painters.workers if worker.health.state is State.DRAINING]
    name = leaving.handle.name
    assert any(leaving.flying.values())
    more = [studio.draw(n) for n in range(4, 8)]
    studio.dispatcher.wait([*jobs, *more])
    assert studio.backend.killed == [name] and not studio.painters.lost
    assert len(studio.painters.workers) == 1
    assert all(job.attempts == 1 for job in [*jobs, *more])
    late = [args[0] for by, what, args in studio.backend.begun if by == name and what == "draw"]
    assert max(late) < 4


def test_a_worker_with_stale_weights_is_replaced() -> None:
    class Forgetful(Painter):
        made = 0

        def __init__(self):
            super().__init__()
            Forgetful.made += 1
            self.first = Forgetful.made == 1

        def draw(self, *args):
            if self.first:
                self.bound = None
            return super().draw(*args)

    studio = Studio(painter=Forgetful).open()
    job = studio.draw(0)
    studio.dispatcher.wait([job])
    assert studio.value(job) == "picture 0 by sha-0"
    assert studio.done_by("bind") == ["rollout-0", "rollout-1"]
    assert studio.backend.killed == ["rollout-0"]


def test_the_works_own_error_reaches_the_waiter_unchanged(studio) -> None:
    studio.dispatcher.submit(Job(studio.critics, "fail", ()))
    other = studio.draw(0)
    with pytest.raises(ZeroDivisionError, match=r"^own$"):
        studio.dispatcher.wait([other, *studio.critics.queue])
    assert not studio.critics.lost


def test_an_error_of_the_factory_reaches_the_waiter_unchanged() -> None:
    def broken():
        raise LookupError("no such model")

    with pytest.raises(LookupError, match="no such model"):
        Studio(critic=broken).open()


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    studio = Studio().open()
    never = Job(studio.painters, "draw", (0, None, None), 1, "never queued")
    mark = Job(studio.critics, "score", (), 1, "marking nothing", after=(never,))
    studio.dispatcher.submit(mark)
    with pytest.raises(RuntimeFault, match="marking nothing"):
        studio.dispatcher.wait([mark])


def test_the_tick_comes_about_once_a_second(studio) -> None:
    ticks = []
    studio.dispatcher.tick = lambda: ticks.append(studio.backend.clock())
    studio.backend.seconds["draw"] = 10.0
    studio.dispatcher.wait([studio.draw(0)])
    assert 9 <= len(ticks) <= 11


class Rank:
    def __init__(self, error=None):
        self.error = error

    def step(self):
        if self.error:
            raise self.error
        return Done("stepped", 0.0, 0)


def ranks(studio, *hosts):
    specs = [WorkerSpec("learner", lambda host=host: host, 1, {}) for host in hosts]
    return studio.backend.start_group(specs, 1.0)


def step(handles):
    return [handle.call("step", bulk=0) for handle in handles]


def test_results_come_in_the_order_of_the_calls_while_the_pools_go_on(studio) -> None:
    handles = ranks(studio, Rank(), Rank())
    studio.backend.seconds["step"] = 20.0
    draw = studio.draw(0)
    done = studio.dispatcher.results(step(handles), "a step")
    assert [one.value for one in done] == ["stepped", "stepped"]
    assert draw.done


@pytest.mark.parametrize(("limit", "seconds"), [(None, 60), (7.0, 7)])
def test_a_rank_that_does_not_answer_is_named_and_stops_the_run_in_time(studio, limit, seconds) -> None:
    handles = ranks(studio, Rank(), Rank())
    studio.backend.hanging = {("learner-1", "step")}
    start = studio.backend.clock()
    with pytest.raises(LearnerLostError, match=f"a step: learner rank 1 did not answer in {seconds} s"):
        studio.dispatcher.results(step(handles), "a step", limit)
    assert studio.backend.clock() - start == pytest.approx(seconds, abs=1)


def test_a_lost_rank_stops_the_run_and_is_named(studio) -> None:
    handles = ranks(studio, Rank(), Rank())
    calls = step(handles)
    handles[1].die()
    with pytest.raises(LearnerLostError, match="a step: learner rank 1 was lost"):
        studio.dispatcher.results(calls, "a step")


def test_a_lost_rank_is_named_although_its_peer_broke_off_first(studio) -> None:
    handles = ranks(studio, Rank(RuntimeError("connection closed by peer")), Rank())
    studio.backend.hanging = {("learner-1", "step")}
    calls = step(handles)
    start = studio.backend.clock()
    studio.backend.before_wait = lambda: studio.backend.clock() > start + 5 and handles[1].die()
    with pytest.raises(LearnerLostError, match="learner rank 1 was lost"):
        studio.dispatcher.results(calls, "a step")


@pytest.fixture
def watched(studio):
    """Two ranks that gave signs of life, due every 12 s at the latest, while something was drawn."""
    handles = ranks(studio, Rank(), Rank())
    studio.backend.beats = True
    studio.dispatcher.results(step(handles), "starting")
    studio.dispatcher.watch(handles, 12.0)
    studio.backend.seconds["draw"] = 30.0
    studio.dispatcher.wait([studio.draw(0)])
    return handles


def test_a_rank_without_a_sign_of_life_is_lost_while_others_work(studio, watched) -> None:
    """It was stopped while nobody waited for it."""
    studio.backend.frozen = {"learner-1"}
    frozen_at = studio.backend.clock()
    lost = r"learner rank 1 \(node here, pid 1\) gave no sign of life in 12 s; last heartbeat \d+ s before, with 100 MB"
    with pytest.raises(LearnerLostError, match=lost):
        studio.dispatcher.wait([studio.draw(n) for n in range(1, 9)])
    assert studio.backend.clock() - frozen_at < 12 + 12 / BEATS + 3


def test_a_rank_that_dies_while_nobody_waits_for_it_is_heard_of(studio, watched) -> None:
    watched[0].die()
    with pytest.raises(LearnerLostError, match=r"learner rank 0 \(node here, pid 1\) was lost .*; last heartbeat"):
        studio.dispatcher.wait([studio.draw(1)])


def test_a_rank_that_fails_alone_is_not_waited_out(studio) -> None:
    handles = ranks(studio, Rank(RuntimeError("own")), Rank())
    studio.backend.hanging = {("learner-1", "step")}
    start = studio.backend.clock()
    with pytest.raises(RuntimeError, match="own"):
        studio.dispatcher.results(step(handles), "a step")
    assert studio.backend.clock() - start < 15


@settings(max_examples=60)
@given(st.data())
def test_whatever_dies_or_is_lost_the_values_are_the_same_or_the_run_stops(data) -> None:
    """Workers die and inputs go at random moments; each drawing and mark is what it would have been."""
    studio = Studio(painters=2, critics=2).open()
    studio.backend.seconds = {"draw": 2.0, "score": 1.0, "bind": 0.5}
    faults = data.draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["die", "lose"]), st.integers(0, 3))))
    turn = iter(range(10**6))

    def strike() -> None:
        now = next(turn)
        for _, what, which in (fault for fault in faults if fault[0] == now):
            alive = [handle for handle in studio.backend.handles.values() if not handle.dead]
            pictures = [ref for ref, value in studio.backend.store.items() if value.startswith("picture")]
            if what == "die" and alive:
                alive[which % len(alive)].die()
            elif what == "lose" and pictures:
                studio.backend.lose(pictures[which % len(pictures)])

    studio.backend.before_wait = strike
    draws = [studio.draw(n) for n in range(6)]
    marks = [studio.mark(draw, n) for n, draw in enumerate(draws)]
    try:
        studio.dispatcher.wait([*draws, *marks])
    except Stopped as error:
        assert len(faults) >= MAX_STRIKES, error
    else:
        assert [studio.value(mark) for mark in marks] == [f"mark of picture {n} by sha-0" for n in range(6)]
    assert studio.backend.clock() < 600, "nothing waits for a timeout that nobody needs"
