"""Who gets which job, and the books of time, over a backend in memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Done, WorkerSpec
from opd_ray.runtime.health import State
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.pool import Pool
from tests.runtime.fake import FakeBackend, Painter, weights

ROOM = 2
LOAD_S = 5.0


class Library:
    """Answers for whichever of several it has loaded; it holds ``ROOM`` of them."""

    def __init__(self, backend) -> None:
        self.backend, self.held, self.loads = backend, [], 0

    def ready(self):
        return Done("up", 0.0, 0, holds=())

    def score(self, teacher):
        loading = 0.0
        if teacher not in self.held:
            loading, self.loads = LOAD_S, self.loads + 1
            self.backend.clock.now += loading
            self.held = [*self.held, teacher][-ROOM:]
        return Done(teacher, 1.0 + loading, 1, holds=tuple(self.held), loading=loading)


def hall(workers, seconds=1.0, host=Library):
    backend = FakeBackend()
    backend.seconds["score"] = seconds
    dispatcher = Dispatcher(backend, call_timeout_s=600, clock=backend.clock)
    spec = WorkerSpec("teacher", lambda: host(backend), 1, {})
    pool = Pool(backend, spec, workers, clock=backend.clock, start_timeout_s=30, call_timeout_s=600)
    dispatcher.pools.append(pool)
    dispatcher.wait_ready()
    return backend, dispatcher, pool


def ask(dispatcher, pool, teacher):
    return dispatcher.submit(Job(pool, "score", (teacher,), 0, f"asking {teacher}", asset=teacher))


def loads(backend):
    return sum(handle.host.loads for handle in backend.handles.values() if handle.host)


def test_a_worker_that_has_the_teacher_is_preferred() -> None:
    backend, dispatcher, pool = hall(2)
    for teacher in ("a", "b") * 10:
        dispatcher.wait([ask(dispatcher, pool, teacher)])
    assert loads(backend) == 2


def test_an_idle_worker_loads_a_teacher_when_the_queue_saved_exceeds_the_load() -> None:
    backend, dispatcher, pool = hall(2)
    dispatcher.wait([ask(dispatcher, pool, "a")])
    dispatcher.wait([ask(dispatcher, pool, "a") for _ in range(4)])
    assert loads(backend) == 1, "four seconds of waiting are not worth five of loading"
    dispatcher.wait([ask(dispatcher, pool, "a") for _ in range(40)])
    assert loads(backend) == 2


def test_twelve_teachers_on_two_workers() -> None:
    backend, dispatcher, pool = hall(2)
    names = [f"t{number}" for number in range(12)]
    jobs = [ask(dispatcher, pool, name) for name in names for _ in range(6)]
    dispatcher.wait(jobs)
    assert [job.result.value for job in jobs] == [name for name in names for _ in range(6)]
    assert loads(backend) <= 16, "about one load a teacher, not one a request"


def test_a_teacher_that_nobody_holds_is_not_starved_by_one_that_is_always_asked_for() -> None:
    _, dispatcher, pool = hall(1)
    common = [ask(dispatcher, pool, "a") for _ in range(4)]
    rare = ask(dispatcher, pool, "b")
    later = [ask(dispatcher, pool, "a") for _ in range(40)]
    dispatcher.wait([*common, rare])
    assert sum(job.done for job in later) <= 3


def test_more_workers_load_prove_and_then_work_and_fewer_finish_what_they_hold() -> None:
    backend, dispatcher, pool = hall(1)
    jobs = [ask(dispatcher, pool, "a") for _ in range(60)]
    dispatcher.wait(jobs[:4])
    pool.resize(3)
    assert [worker.health.state for worker in pool.workers] == [State.HEALTHY, State.STARTING, State.STARTING]
    dispatcher.wait(jobs[:30])
    assert pool.describe().healthy == 3
    pool.resize(1)
    dispatcher.wait(jobs)
    assert [worker.health.state for worker in pool.workers] == [State.HEALTHY]
    assert not pool.lost and len(backend.killed) == 2
    assert all(job.attempts == 1 for job in jobs)


def test_a_growth_that_finds_no_room_is_withdrawn_and_the_work_goes_on() -> None:
    backend, dispatcher, pool = hall(1)
    notes = []
    dispatcher.note = notes.append
    backend.never_start = {"teacher-1"}
    backend.lack = "no room for 1 workers: asked {CPU: 1}; free per node {CPU: 0}; missing {CPU: 1}"
    pool.resize(2)
    jobs = [ask(dispatcher, pool, "a") for _ in range(60)]
    dispatcher.wait(jobs)
    assert pool.size == 1 and len(pool.workers) == 1
    assert any("missing {CPU: 1}" in note and "withdrawn; teacher goes on with 1" in note for note in notes)


def test_a_slow_worker_has_one_job_at_a_time() -> None:
    class Slow(Library):
        made = 0

        def __init__(self, backend) -> None:
            super().__init__(backend)
            Slow.made += 1
            self.extra = 2.0 if Slow.made == 1 else 0.0

        def score(self, teacher):
            self.backend.clock.now += self.extra
            return Done(teacher, 1.0 + self.extra, 1)

    _, dispatcher, pool = hall(4, host=Slow)
    dispatcher.wait([dispatcher.submit(Job(pool, "score", ("a",), 0, "asking")) for _ in range(40)])
    assert sorted(worker.slots for worker in pool.workers) == [1, 2, 2, 2]


@pytest.mark.parametrize(("workers", "count"), [(2, 2), (3, 6)])
def test_whoever_proved_new_weights_first_does_not_get_two_jobs_while_others_prove_them(workers, count) -> None:
    backend, dispatcher, pool = hall(workers, host=lambda backend: Painter())
    backend.seconds["draw"] = 1.0
    by, start = weights(backend, 0), backend.clock.now
    args = (by.version, by.sha256)
    jobs = [dispatcher.submit(Job(pool, "draw", (number, *args), 1, "drawing", weights=by)) for number in range(count)]
    dispatcher.wait(jobs[:workers])
    assert len({job.by for job in jobs[:workers]}) == workers, "the first ones, a worker each"
    dispatcher.wait(jobs)
    assert backend.clock.now - start == count // workers


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0.1, 3.0), st.integers(1, 5)), min_size=1, max_size=8),
)
def test_busy_transfer_and_waiting_are_all_of_the_workers_time(workers, batches) -> None:
    class Plain:
        def ready(self):
            return Done("up", 0.0, 0)

        def score(self, seconds):
            return Done(seconds, 0.75, 1)  # of one second; the rest is transport

    backend, dispatcher, pool = hall(workers, host=lambda backend: Plain())
    start = pool.usage
    for pause, count in batches:
        dispatcher.wait([dispatcher.submit(Job(pool, "score", (1,), 0, "asking")) for _ in range(count)])
        backend.clock.now += pause
    spent = pool.usage - start
    whole = spent.busy + spent.transfer + spent.input + spent.output
    assert whole == pytest.approx(spent.workers) == pytest.approx(workers * spent.seconds)
    assert spent.busy == pytest.approx(0.75 * spent.answers) and spent.transfer == pytest.approx(0.25 * spent.answers)
    assert spent.input == pytest.approx(0.0, abs=1e-9)
