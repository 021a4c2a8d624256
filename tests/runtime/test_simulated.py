"""The simulated clock itself."""

import pytest

from opd_ray.errors import WorkerLostError
from opd_ray.planning.rates import Rates
from opd_ray.planning.simulate import simulate
from opd_ray.planning.simulated import SimulatedBackend
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.pool import Pool


def take(role, method, args):
    return args[0] if args else 0.0


def start(backend, role="rollout"):
    return backend.start(WorkerSpec(role, object, 1, {}), f"{role}-0")


def test_a_worker_does_one_call_after_the_other() -> None:
    backend = SimulatedBackend(take, start_s=10.0)
    worker = start(backend)
    first, second = worker.call("draw", 2.0, bulk=1), worker.call("draw", 3.0, bulk=0)
    assert backend.wait([second.done, first.done], 11.0) == [] and backend.clock() == 11.0
    assert backend.wait([second.done, first.done], 60.0) == [first.done] and backend.clock() == 12.0
    assert backend.result(first.done).seconds == 2.0
    assert backend.wait([second.done], 60.0) == [second.done] and backend.clock() == 15.0
    assert backend.wait([], 5.0) == [] and backend.clock() == 20.0


def test_an_answer_is_kept_for_whoever_asks_for_it() -> None:
    backend = SimulatedBackend(take)
    worker, other = start(backend), start(backend)
    mine, theirs = worker.call("draw", 1.0, bulk=0), other.call("draw", 2.0, bulk=0)
    assert backend.wait([theirs.done], 60.0) == [theirs.done]
    assert backend.wait([mine.done], 60.0) == [mine.done] and backend.clock() == 2.0


def test_a_worker_dies_when_it_is_said_to() -> None:
    backend = SimulatedBackend(take, failures={"rollout-0": 1.5})
    worker = start(backend)
    call = worker.call("draw", 2.0, bulk=0)
    assert backend.wait([call.done], 60.0) == [call.done] and backend.clock() == 1.5
    with pytest.raises(WorkerLostError, match="rollout-0 died"):
        backend.result(call.done)
    late = worker.call("draw", 2.0, bulk=0)
    assert backend.wait([late.done], 60.0) == [late.done] and backend.clock() == 1.5


def test_drawn_durations_are_seeded_and_within_their_spread() -> None:
    def durations(seed):
        backend = SimulatedBackend(take, spread=0.5, seed=seed)
        return [backend.draw_seconds("rollout", "draw", (2.0,)) for _ in range(100)]

    assert durations(1) == durations(1) != durations(2)
    assert 1.0 <= min(durations(1)) < 1.2 and 2.8 < max(durations(1)) <= 3.0


def test_the_real_pool_replaces_a_worker_that_dies_in_it() -> None:
    backend = SimulatedBackend(take, start_s=1.0, failures={"rollout-1": 4.0})
    dispatcher = Dispatcher(backend, call_timeout_s=600, clock=backend.clock)
    spec = WorkerSpec("rollout", object, 1, {})
    pool = Pool(backend, spec, 2, clock=backend.clock, start_timeout_s=30, call_timeout_s=600)
    dispatcher.pools.append(pool)
    dispatcher.wait_ready()
    jobs = [dispatcher.submit(Job(pool, "draw", (1.0,), 0, "drawing")) for _ in range(40)]
    dispatcher.wait(jobs)
    assert all(job.done for job in jobs) and len(pool.lost) == 1
    assert 20 < backend.clock() < 24


def test_a_run_goes_on_where_a_worker_dies() -> None:
    rates = Rates(item_size=1, items={"a": 8}, seconds={"rollout": 1.0}, learner={"shared": 0.8})
    workers = {"rollout": 2, "learner": 1}
    whole = simulate(rates, workers, 0, rounds=4)
    broken = simulate(rates, workers, 0, rounds=4, failures={"rollout-0": 6.5})
    assert whole.published[-1] < broken.published[-1] < whole.published[-1] + 3
    assert whole.waited == pytest.approx(whole.published[-1] - 4 * 0.1, rel=0.2)
