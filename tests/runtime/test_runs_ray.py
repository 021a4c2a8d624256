"""Whole runs on Ray: the same bits as in this process, whatever the workers, and whoever dies."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from safetensors.torch import load_file

from opd_ray.errors import PlacementError
from opd_ray.runtime.cluster import RayBackend, RayHandle
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.storage import checkpoint
from tests.runtime.runs import LOOPBACK, Killer, alive, go, listeners, nowhere, pid_of, same, tensors_in
from tests.runtime.toys import Toy

pytestmark = pytest.mark.ray
ROUNDS = 12
SMALL = {"resources": {"cpu": 0.25}}
SHARED = {"share_teachers": True}


def stored() -> tuple[int, int]:
    """Bytes in use in the object store, and bytes ever spilled."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.object_store_bytes_used, stats.spilled_bytes_total


@pytest.fixture(scope="module")
def dozen(make_config, ray_session, tmp_path_factory):
    """Twelve rounds with one worker of each role; what went through the driver and what stayed in the store."""
    calls, answers, store = [], [], []
    call, result = RayHandle.call, RayBackend.result
    patch = pytest.MonkeyPatch()

    def watch(run, live) -> None:
        def calling(self, *args, **options):
            made = call(self, *args, **options)
            if run.round < 2:  # the references are held on to, which later rounds are about
                calls.append((args[0], made))
            return made

        def answering(self, ref):
            answers.append(result(self, ref))
            return answers[-1]

        def counting() -> None:
            if run.round == 2:
                refs = [ref for _, made in calls for ref in (*made.bulk, made.done)]
                inlined.append((len(refs), nowhere(refs)))
                names.update(name for name, made in calls if made.bulk)
                calls.clear()
            if run.round in {4, 8, ROUNDS}:
                time.sleep(2.5)  # Ray lets go of objects once a second
                store.append(stored())

        patch.setattr(RayHandle, "call", calling)
        patch.setattr(RayBackend, "result", answering)
        live.after_round = counting

    inlined, names = [], set()
    try:
        done = go(make_config("ray", rounds=ROUNDS), tmp_path_factory.mktemp("dozen") / "run", watch=watch)
    finally:
        patch.undo()
    return done, answers, store, inlined, names


def test_ray_and_local_are_one(dozen, reference) -> None:
    assert same(dozen[0], reference(ROUNDS))


def test_no_tensor_passes_through_the_driver(dozen) -> None:
    _, answers, _, [(count, inlined)], names = dozen
    assert names == {"draw", "score", "publish"}
    assert count > 20 and not inlined
    assert len(answers) > ROUNDS * 10
    assert not [found for answer in answers for found in tensors_in(answer)]


def test_what_a_round_stored_goes_with_it_and_nothing_is_spilled(dozen) -> None:
    _, _, store, _, _ = dozen
    used = [bytes_used for bytes_used, _ in store]
    assert len(used) == 3
    assert max(used) <= 1.1 * min(used), used
    assert all(spilled == 0 for _, spilled in store)


def test_no_worker_outlives_its_run(dozen) -> None:
    assert len(dozen[0].pids) == 4
    assert not alive(dozen[0].pids)


@pytest.mark.verify
def test_more_workers_and_shared_teachers_are_one_with_local(make_config, ray_session, reference, tmp_path) -> None:
    config = make_config("ray", cluster=SHARED | {"rollout": SMALL | {"workers": 2}})
    assert same(go(config, tmp_path / "run"), reference(3))


@pytest.mark.verify
def test_drawings_in_parts_are_one_with_whole_ones_also_where_a_worker_is_killed(
    make_config, ray_session, tmp_path
) -> None:
    longer, killers = {"sampling": {"steps": 6}, "rounds": 2}, []
    config = make_config("ray", cluster=SHARED | {"step_chunks": 2, "rollout": SMALL | {"workers": 2}}, **longer)
    done = go(config, tmp_path / "run", watch=lambda run, live: killers.append(Killer(run, {"rollout": 1})))
    assert len(killers[0].killed) == 1
    assert same(done, go(make_config(**longer), tmp_path / "local"))


@pytest.mark.verify
def test_killed_workers_change_no_bit(make_config, ray_session, reference, tmp_path) -> None:
    killers = []
    config = make_config("ray", cluster={"rollout": SMALL | {"workers": 2}}, rounds=4)
    done = go(
        config,
        tmp_path / "run",
        watch=lambda run, live: killers.append(Killer(run, {"rollout": 1, "teacher.a": 2, "teacher.b": 1})),
    )
    assert sorted(name.rpartition("-")[0] for name in killers[0].killed) == ["rollout", "teacher.a", "teacher.b"]
    assert [note.split(" while ")[0] for note in done.notes if "was lost" in note]
    assert len([note for note in done.notes if "was lost" in note]) == 3
    assert same(done, reference(4))
    assert not alive(done.pids)


@pytest.mark.verify
def test_an_evaluation_whose_reward_worker_is_killed_scores_as_local(
    make_config, ray_session, prompts, tiny, tiny_teachers, tmp_path, monkeypatch
) -> None:
    """All paths are relative to a directory in which Ray's workers are not, and what is written is shipped."""
    monkeypatch.chdir(tmp_path)
    bright, killers, shipped = "tests.commands.scoring:brightness", [], {"storage": "ship"}
    settings = {
        "rounds": 1,
        "model": {"path": os.path.relpath(tiny)},
        "teachers": {name: {"lora": os.path.relpath(tiny_teachers[name]), "guidance": 2.0} for name in "ab"},
        "prompts": {"train": os.path.relpath(prompts), "eval": os.path.relpath(prompts)},
        "rewards": {bright: {}},
        "evaluation": {"images_per_task": 4, "steps": 2, "batch": 2, "rewards": {"a": [bright], "b": [bright]}},
    }
    local = go(make_config(**settings), Path("local"))
    done = go(
        make_config("ray", cluster=SHARED | shipped | {"rewards": {"default": SMALL | {"workers": 2}}}, **settings),
        Path("run"),
        watch=lambda run, live: killers.append(Killer(run, {"reward": 1})),
    )
    assert len(killers[0].killed) == 1 and killers[0].killed[0].startswith("reward")
    assert same(done, local) and done.result["scores"] == local.result["scores"]
    assert len(list(Path("run/samples").glob("*/*.png"))) == 4 * 2 * 4, "models, tasks, pictures"
    for made in Path("local/samples").glob("*/*.png"):
        assert made.read_bytes() == Path("run", made.relative_to("local")).read_bytes(), made
    for made in Path("local/lora").rglob("*.safetensors"):  # whose metadata is in no order
        tensors, shipped = load_file(made), load_file(Path("run", made.relative_to("local")))
        assert tensors.keys() == shipped.keys() and all(torch.equal(one, shipped[n]) for n, one in tensors.items())
    saved, _ = checkpoint.newest(Path("run"))
    assert saved is not None and saved.round == 1


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"backend": "fsdp2"}, id="fsdp2", marks=pytest.mark.verify),
        pytest.param({"backend": "deepspeed", "zero_stage": 3}, id="zero3", marks=pytest.mark.verify),
    ],
)
def test_two_ranks_agree_with_one(make_config, ray_session, reference, tmp_path, backend) -> None:
    hashes, listening = [], []

    def watch(run, live) -> None:
        listening.append([address for pid in map(pid_of, run.learner.ranks) for address in listeners(pid)])
        live.after_round = lambda: hashes.append(
            [
                one.value
                for one in run.dispatcher.results([r.call("hashes", bulk=0) for r in run.learner.ranks], "hashes")
            ]
        )

    config = make_config("ray", cluster=SHARED | {"learner": SMALL | {"ranks": 2} | backend})
    done, alone = go(config, tmp_path / "run", watch=watch), reference(3)
    assert all(one == other for one, other in hashes), "both ranks hold the same weights"
    assert len({one["student_sha256"] for one, _ in hashes}) == 3
    for mine, theirs in zip(done.rows, alone.rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["forwards"] == theirs["forwards"]
    assert listening[0] and set(listening[0]) == {LOOPBACK}


def test_too_many_workers_are_refused_before_any_starts(make_config, ray_session, tmp_path) -> None:
    config = make_config("ray", cluster={"rollout": SMALL | {"workers": 400}})
    with pytest.raises(PlacementError, match=r"no room for 403 workers: asked \{CPU: .*missing") as caught:
        go(config, tmp_path / "run")
    assert caught.value.exit_code == 2
    assert ray.is_initialized()


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_twenty_rounds_of_chaos_change_no_bit(make_config, ray_session, reference, tmp_path) -> None:
    killers, rounds = [], 20

    def watch(run, live) -> None:
        killers.append(killer := Killer(run, {"rollout": 1, "teacher": 2}))

        def again() -> None:
            if run.round % 4 == 0:
                killer.meet_successors()
                killer.rounds |= {"rollout": run.round + 1, "teacher": run.round + 2}

        live.after_round = again

    config = make_config("ray", cluster=SHARED | {"rollout": SMALL | {"workers": 2}}, rounds=rounds)
    done = go(config, tmp_path / "run", watch=watch)
    assert len(killers[0].killed) >= 8
    assert same(done, reference(rounds))
    assert not alive(killers[0].everybody)


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize("staleness", [0, 1])
def test_two_hundred_rounds_leave_the_object_store_as_it_was(make_config, ray_session, tmp_path, staleness) -> None:
    """Ray lets go of objects about once a second, so that a fast round's row still sees some of the rounds before."""
    still = []

    def watch(run, live) -> None:
        def pausing() -> None:
            if run.round % 20 == 0:
                time.sleep(2.5)
                still.append(stored())

        live.after_round = pausing

    config = make_config("ray", cluster=SHARED | {"max_staleness": staleness}, rounds=200, checkpoint={"every": 50})
    done = go(config, tmp_path / "run", watch=watch)
    used = [bytes_used for bytes_used, _ in still]
    # With staleness 1 the next round is under way in every pause, more or less of it.
    assert len(used) == 10 and max(used[5:]) <= 1.1 * max(used[:5]), used
    assert len(done.rows) == 200
    assert all(row["store"]["spilled"] == still[0][1] == 0 for row in done.rows)
    early, late = (max(row["store"]["used"] for row in part) for part in (done.rows[20:80], done.rows[140:]))
    assert late <= 1.5 * early, (early, late)


@pytest.mark.verify
def test_a_run_waits_for_what_an_old_attempt_still_holds(make_config, ray_session, reference, tmp_path) -> None:
    cpus = ray.available_resources()["CPU"]
    holder = ray_session.start(WorkerSpec("holder", Toy, 1, {"cpu": cpus - 0.1}), "holder-0")
    pid = ray_session.result(_answered(ray_session, holder.call("ready", bulk=0))).value
    threading.Timer(8, os.kill, (pid, signal.SIGKILL)).start()
    done = go(make_config("ray", cluster=SHARED), tmp_path / "run")
    assert any(note.startswith("waiting up to") and "missing {CPU" in note for note in done.notes), done.notes
    assert same(done, reference(3))


def _answered(backend, call):
    assert backend.wait([call.done], 60)
    return call.done
