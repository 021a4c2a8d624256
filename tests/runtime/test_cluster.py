"""The Ray backend with small workers: what Ray really raises, stores and offers."""

import os
import pickle
import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import grpc
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OwnerDiedError, RayTaskError

from opd_ray.errors import InputLostError, NotFiniteError, PlacementError, RunFolderError, WorkerLostError
from opd_ray.runtime import cluster
from opd_ray.runtime.cluster import RayBackend, classify
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Done, WorkerSpec
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.local import LocalBackend
from opd_ray.runtime.pool import Pool
from tests.runtime.runs import nowhere
from tests.runtime.toys import Toy

pytestmark = pytest.mark.ray
SPEC = WorkerSpec("toy", Toy, 2, {"cpu": 0.25})


@pytest.fixture(scope="module")
def backend(ray_session):
    """Joins the session's Ray, as a run does."""
    backend = RayBackend(object_store_mb=100)
    yield backend
    backend.close()
    assert ray.is_initialized(), "a Ray that was there before stays"


def test_who_handled_sigterm_before_ray_handles_it_after(monkeypatch):
    """Ray's own would end a driver with exit code 15 and no word."""

    def init(*, asked, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", partial(init, asked=False))
    RayBackend(object_store_mb=100).close()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(ray, "init", partial(init, asked=True))
    with pytest.raises(KeyboardInterrupt):
        RayBackend(object_store_mb=100)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def toy(backend):
    """A worker that every test leaves alive."""
    return backend.start(SPEC, "toy-shared")


@pytest.fixture
def mortal(backend):
    return backend.start(SPEC, "toy-mortal")


def finish(backend, call) -> Done:
    deadline = time.monotonic() + 60
    while not backend.wait([call.done], 1.0):
        assert time.monotonic() < deadline
    return backend.result(call.done)


@pytest.mark.verify
def test_a_worker_that_sees_another_run_folder_is_refused_and_names_node_and_path(backend, tmp_path) -> None:
    """As on a node where the run folder's path leads to a disk of its own."""
    nonce = tmp_path / ".nonce"
    specs = [replace(SPEC, nonce=(nonce, text), logs=tmp_path / "logs") for text in ("mine", "another's")]
    nonce.write_text("mine")
    same, other = (backend.start(spec, f"folder-{number}") for number, spec in enumerate(specs))
    calls = [worker.call("ready", bulk=0) for worker in (same, other)]
    assert finish(backend, calls[0]).value
    with pytest.raises(
        RunFolderError, match=rf"node [\d.]+: {re.escape(str(tmp_path))} is not the run folder that .*no toy can"
    ):
        finish(backend, calls[1])
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["folder-0.log"], "nothing is written elsewhere"
    for worker in (same, other):
        worker.kill()


def test_a_node_that_has_just_gone_does_not_keep_the_store_from_being_asked_for(backend, monkeypatch) -> None:
    """Ray asks one node after the other, among them one that it does not know to be gone."""

    def refused(address):
        with grpc.insecure_channel("127.0.0.1:1") as channel:  # nobody listens there
            channel.unary_unary("/x/x")(b"", timeout=5)

    assert backend.object_store().smallest > 0
    monkeypatch.setattr(cluster, "get_memory_info_reply", refused)
    assert backend.object_store() is None


def gone(pid) -> bool:
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("count", [0, 1, 100, 200_000])
def test_every_result_is_in_the_object_store_however_small(backend, toy, count) -> None:
    call = toy.call("make", count, bulk=1)
    assert finish(backend, call) == Done(count, 0.0, 0)
    assert not nowhere([*call.bulk, call.done])


def test_a_returned_value_outlives_its_worker(backend, toy, mortal) -> None:
    call = mortal.call("make", 3, bulk=1)
    finish(backend, call)
    pid = finish(backend, mortal.call("ready", bulk=0)).value
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(WorkerLostError, match="ActorDiedError"):
        finish(backend, mortal.call("ready", bulk=0))
    assert finish(backend, toy.call("total", call.bulk[0], bulk=0)).value == 3


def test_a_worker_that_dies_in_a_call_is_lost_and_nothing_answers_in_its_place(backend, mortal) -> None:
    finish(backend, mortal.call("ready", bulk=0))
    calls = [mortal.call("die", bulk=0), mortal.call("ready", bulk=0)]
    for call in calls:
        with pytest.raises(WorkerLostError):
            finish(backend, call)


def test_the_works_own_error_keeps_type_and_text(backend, toy) -> None:
    with pytest.raises(ZeroDivisionError, match=r"^own$"):
        finish(backend, toy.call("fail", bulk=0))


def test_a_killed_worker_is_lost_and_its_process_ends(backend, mortal) -> None:
    pid = finish(backend, mortal.call("ready", bulk=0)).value
    call = mortal.call("nap", 60, bulk=0)
    mortal.kill()
    with pytest.raises(WorkerLostError):
        finish(backend, call)
    assert gone(pid)


def test_wait_sleeps_until_something_is_done_and_takes_all_of_it(backend, toy) -> None:
    quick = [toy.call("ready", bulk=0).done for _ in range(3)]
    for ref in quick:
        assert ref in backend.wait([ref], 30.0)
    slow = toy.call("nap", 1.0, bulk=0).done
    assert set(backend.wait([*quick, slow], 30.0)) == set(quick)
    assert backend.wait([slow], 0.05) == []
    start = time.monotonic()
    assert backend.wait([], 0.2) == []
    assert time.monotonic() - start >= 0.2
    assert backend.wait([slow], 30.0) == [slow]


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_NUM_THREADS", "2"), ("CUDA_VISIBLE_DEVICES", ""), ("OMP_WAIT_POLICY", "PASSIVE")]
)
def test_workers_have_their_threads_set_and_see_no_card(backend, toy, name, value) -> None:
    assert finish(backend, toy.call("environment", name, bulk=0)).value == value
    assert finish(backend, toy.call("threads", bulk=0)).value == 2


def test_in_this_process_each_role_has_its_threads_too() -> None:
    before, local = torch.get_num_threads(), LocalBackend()
    try:
        handles = [local.start(replace(SPEC, threads=threads), f"toy-{threads}") for threads in (1, 2)]
        assert [local.result(one.call("threads", bulk=0).done).value for one in [*handles, *handles]] == [1, 2, 1, 2]
    finally:
        torch.set_num_threads(before)


def lost_object(kind=ObjectLostError):
    return kind("00" * 28, None, "")


def test_a_lost_input_is_told_from_a_lost_worker_alone_and_as_a_cause() -> None:
    for lost in (lost_object(), lost_object(OwnerDiedError)):
        assert isinstance(classify(lost), InputLostError)
        wrapped = RayTaskError("call", "traceback", lost).as_instanceof_cause()
        found = classify(wrapped)
        assert isinstance(found, InputLostError)
        assert str(found).startswith(f"{type(lost).__name__}: "), "the loss, not the reader's traceback"
        reader = RuntimeError("reading")
        reader.__cause__ = lost
        assert isinstance(classify(reader), InputLostError)
    assert isinstance(classify(GetTimeoutError()), WorkerLostError)
    assert classify(RayTaskError("call", "traceback", ValueError("own")).as_instanceof_cause()) is None
    assert classify(ValueError("own")) is None


def test_errors_that_cross_process_borders_stay_whole() -> None:
    error = NotFiniteError("teacher a answered NaN")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.exit_code) == (NotFiniteError, "teacher a answered NaN", 3)


def test_a_shortage_says_asked_per_node_and_missing(backend, toy) -> None:
    cpus = ray.cluster_resources()["CPU"]
    assert backend.shortage([SPEC] * int(4 * cpus)) is None
    text = backend.shortage([replace(SPEC, resources={"cpu": cpus, "slot": 2.0})] * 2)
    assert f"no room for 2 workers: asked {{CPU: {2 * cpus:g}, slot: 4}}" in text
    assert f"per node {{CPU: {cpus:g}}}" in text
    assert f"missing {{CPU: {2 * cpus:g}, slot: 4}}" in text
    finish(backend, toy.call("ready", bulk=0))
    used = backend.shortage([SPEC] * int(4 * cpus), free=True)
    assert f"free per node {{CPU: {cpus - 0.25:g}}}; missing {{CPU: 0.25}}" in used


def test_a_worker_needs_all_that_it_asks_for_on_one_node(monkeypatch, ray_session) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 2.0, "slot": 1.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    backend = RayBackend(object_store_mb=100)
    assert backend.shortage([replace(SPEC, resources={"cpu": 2.0})] * 2) is None
    assert "missing {CPU: 3}" in backend.shortage([replace(SPEC, resources={"cpu": 3.0})])
    assert backend.shortage([replace(SPEC, resources={"cpu": 2.0, "slot": 1.0})]) is None


def test_a_worker_that_has_no_room_is_a_placement_error_and_leaves_nothing(backend) -> None:
    dispatcher = Dispatcher(backend, call_timeout_s=60)
    spec = replace(SPEC, resources={"slot": 1.0})
    pool = Pool(backend, spec, 1, clock=time.monotonic, start_timeout_s=2, call_timeout_s=60)
    dispatcher.pools.append(pool)
    with pytest.raises(PlacementError, match=r"toy-0 did not start in 2 s; .*asked \{slot: 1\}; free per node \{\}"):
        dispatcher.wait_ready()
    pool.workers[0].handle.kill()


def test_a_group_that_has_no_room_is_a_placement_error(ray_session) -> None:
    backend = RayBackend(object_store_mb=100)
    with pytest.raises(PlacementError, match=r"the learner was not placed in 1 s; .*missing \{slot: 2\}"):
        backend.start_group([replace(SPEC, resources={"slot": 1.0})] * 2, 1.0)
    backend.close()


def test_a_hanging_worker_is_replaced(backend) -> None:
    """Through the whole path: the pool's timeout, the new process, the same answer."""
    dispatcher, notes = Dispatcher(backend, call_timeout_s=3), []
    dispatcher.note = notes.append
    pool = Pool(backend, SPEC, 1, clock=time.monotonic, start_timeout_s=120, call_timeout_s=3)
    dispatcher.pools.append(pool)
    dispatcher.wait_ready()
    first = pool.workers[0]
    naps = iter((60, 0))
    job = dispatcher.submit(Job(pool, "nap", lambda: (next(naps),), 0, "a nap"))
    dispatcher.wait([job])
    assert job.result.value == "rested"
    assert notes[0].startswith("toy-0 (node ") and "was lost while a nap (no answer in 3 s); 1 work items" in notes[0]
    assert "last heartbeat" in notes[0] and " MB" in notes[0]
    assert pool.workers[0].handle.name == "toy-1" and gone(first.facts)
    pool.workers[0].handle.kill()
