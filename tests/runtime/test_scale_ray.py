"""Other numbers of workers while a run goes on, asked for through the run folder; the student is the same."""

import threading

import pytest

from opd_ray.storage.checkpoint import newest
from opd_ray.storage.control import ask
from opd_ray.storage.run_folder import read_json
from tests.runtime.runs import alive, go, pid_of, same

pytestmark = pytest.mark.ray
ROUNDS = 40
SMALL = {"resources": {"cpu": 0.25}}


def test_a_run_is_scaled_up_and_down_from_outside_and_changes_no_bit(
    make_config, ray_session, reference, tmp_path
) -> None:
    folder, answers, roles, threads, pids = tmp_path / "run", [], [], [], []

    def asking(targets) -> None:
        thread = threading.Thread(target=lambda: answers.append(ask(folder, targets, timeout_s=60)))
        thread.start()
        threads.append(thread)

    def watch(run, live) -> None:
        def step() -> None:
            roles.append(run.dispatcher.pools[0].describe())
            if run.round == 1:
                asking({"rollout": 2, "a": 2})
            if len(answers) == 1 and len(threads) == 1 and run.dispatcher.pools[0].describe().healthy == 2:
                pids.extend(pid_of(worker.handle) for worker in run.dispatcher.pools[0].workers)
                asking({"teacher.a": 1, "rollout": 1})
            if run.round < ROUNDS - 4 and len(threads) < 2:
                run.dispatcher.results([run.learner.ranks[0].call("hashes", bulk=0)], "a pause")
                run.tick()

        live.after_round = step

    done = go(make_config("ray", rounds=ROUNDS, checkpoint={"every": 5, "keep": 20}), folder, watch=watch)
    for thread in threads:
        thread.join(timeout=60)
    assert [answer.ok for answer in answers] == [True, True], [answer.text for answer in answers]
    assert answers[0].text.splitlines() == ["rollout 1 -> 2", "teacher.a 1 -> 2"]
    assert {seen.healthy + seen.stale for seen in roles} == {1, 2}
    told = {row["role"]: row for row in read_json(folder / "status.json")["roles"]}
    assert told["rollout"]["wanted"] == 1 and told["rollout"]["heartbeat_age"] is not None
    assert same(done, reference(ROUNDS))
    assert done.result["forwards"] == reference(ROUNDS).result["forwards"]
    assert len(alive(pids, within_s=10)) == 0
    saved, _ = newest(folder)
    assert saved.state["driver"]["targets"] == {"rollout": [1, 1], "teacher.a": [1, 1], "teacher.b": [1, 1]}
    row = done.rows[-1]
    assert set(row["roles"]) == {"rollout", "teacher.a", "teacher.b", "learner"} and row["store"]["spilled"] == 0
