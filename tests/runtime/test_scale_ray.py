"""Other numbers of workers while a run goes on, asked for through the run folder; the student is the same."""

import threading
import time

import pytest

from opd_ray.storage.checkpoint import newest
from opd_ray.storage.control import ask
from opd_ray.storage.run_folder import read_json
from tests.runtime.runs import alive, go, pid_of, same

pytestmark = pytest.mark.ray
ROUNDS = 8
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
        rollouts, (rank,) = run.dispatcher.pools[0], run.learner.ranks

        def pause(enough) -> None:
            """Rounds are faster than a worker's start; meanwhile the run does what it does within a round."""
            deadline = time.monotonic() + 60
            while not enough():
                assert time.monotonic() < deadline, (answers, rollouts.describe())
                run.dispatcher.results([rank.call("hashes", bulk=0)], "a pause")
                run.tick()

        def step() -> None:
            roles.append(rollouts.describe())
            if run.round == 1:
                asking({"rollout": 2, "a": 2})
            if run.round == 3:
                pause(lambda: len(answers) == 1 and rollouts.describe().healthy == 2)
                pids.extend(pid_of(worker.handle) for worker in rollouts.workers)
            if run.round == 5:
                asking({"teacher.a": 1, "rollout": 1})
            if run.round == 6:
                pause(lambda: len(answers) == 2)

        live.after_round = step

    done = go(make_config("ray", rounds=ROUNDS, checkpoint={"every": 4}), folder, watch=watch)
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
