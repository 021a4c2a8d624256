"""Real workers that fail in every way there is: the run goes on to the same bits, and says what it knows."""

import re

import pytest

from tests.runtime.faults import ROLES, Saboteur, Strike
from tests.runtime.runs import alive, go, same

pytestmark = pytest.mark.ray
TWO = {"resources": {"cpu": 0.25}, "workers": 2}
HEARTBEAT_S, CALL_S = 4.0, 16.0  # far apart: on a busy machine each fault is still found by its own limit
SETTINGS = {
    "algorithm": {"name": "tests.runtime.faults:Scored", "args": {"steps_per_item": 2}},
    "rewards": {"tests.commands.scoring:brightness": {}},
}
CLUSTER = {
    "share_teachers": True,
    "rollout": TWO,
    "teachers": {"default": TWO},
    "rewards": {"default": TWO},
    "heartbeat_timeout_s": HEARTBEAT_S,
    "call_timeout_s": CALL_S,
}
FEW = (
    Strike(0, "rollout", "lock"),
    Strike(0, "teacher", "kill"),
    Strike(1, "rollout", "nan"),  # alone: whoever reads it has no answer to spoil
    Strike(2, "teacher", "channels"),
    Strike(2, "reward", "shape"),
)
"""One of each way in which a fault is found: no sign of life, a lost process, by a reader, and by the driver."""
MANY = (
    Strike(0, "rollout", "stop"),
    Strike(0, "teacher", "kill"),
    Strike(1, "teacher", "hang"),
    Strike(1, "rollout", "version"),
    Strike(1, "reward", "shape"),
    Strike(2, "rollout", "lock"),
    Strike(2, "teacher", "nan"),
    Strike(2, "reward", "kill"),
    Strike(3, "rollout", "nan"),
    Strike(3, "teacher", "shape"),
    Strike(4, "rollout", "kill"),
    Strike(4, "teacher", "channels"),
)
WHY = {
    "kill": r"ActorDiedError",
    "stop": rf"no sign of life in {HEARTBEAT_S:.0f} s",
    "hang": rf"no answer in {CALL_S:.0f} s",
    "lock": rf"no sign of life in {HEARTBEAT_S:.0f} s",
    "nan": r"NaN or infinity in",
    "inf": r"expected finite numbers or NaN",
    "shape": r"expected",
    "channels": r"expected",
    "version": r"expected",
}
READ = {"nan", "channels"}
"""What is wrong in the arrays, which whoever reads them finds."""
PHASE = {"rollout": r"drawing", "teacher": r"[ab] marking", "reward": r"scoring"}


def disturbed(config, folder, strikes):
    """A run with these strikes."""
    met = []
    with pytest.MonkeyPatch.context() as patch:
        done = go(config, folder, watch=lambda run, live: met.append(Saboteur(run, strikes, patch)))
    return done, met[0]


def undergo(make_config, folder, strikes, rounds):
    """The same run with these strikes and, undisturbed, in this process."""
    done, saboteur = disturbed(make_config("ray", cluster=CLUSTER, rounds=rounds, **SETTINGS), folder / "run", strikes)
    assert not done.error, done.error
    assert not saboteur.left
    local = go(make_config(cluster={"share_teachers": True}, rounds=rounds, **SETTINGS), folder / "local")
    for row, alone in zip(done.rows, local.rows, strict=True):  # what was answered badly was work too
        assert all(row["forwards"][role] >= count for role, count in alone["forwards"].items())
        row["forwards"] = alone["forwards"]
    return done, local, saboteur.struck, folder / "run" / "logs"


def check(strike, done, struck, logs) -> None:
    """Whom it hit, where, at what, why, its last sign of life and its last words."""
    name = struck[strike]
    notes = [note for note in done.notes if note.startswith(f"{name} ")]
    assert len(notes) == 1, (strike, done.notes)
    (note,) = notes
    work = rf"{PHASE[strike.role]} round {strike.round} [ab]\[\d\]"
    found = rf"\(its answer to {work} cannot be: " if strike.kind in READ else rf"{work} \("
    assert re.match(
        rf"{name} \(node 127\.0\.0\.1, pid \d+\) was lost while .*{found}.*{WHY[strike.kind]}.*\); \d work items run "
        r"again; last heartbeat \d+ s before, with \d+ MB",
        note,
    ), note
    if strike.kind in {"hang", "lock"}:
        where = {"hang": "in hang", "lock": "in hold_the_lock"}[strike.kind]
        assert where in (logs / f"{name}.log").read_text()
        assert where in note.partition(f"; last in {name}.log: ")[2], "of all stacks, the one that matters"


@pytest.mark.parametrize(
    "strikes", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.verify)]
)
def test_workers_that_fail_in_every_way_change_no_bit_and_are_told_of(
    make_config, ray_session, tmp_path, strikes
) -> None:
    done, local, struck, logs = undergo(make_config, tmp_path, strikes, strikes[-1].round + 2)
    for strike in strikes:
        check(strike, done, struck, logs)
    assert same(done, local)
    assert not alive(done.pids), "also a process that was stopped is ended"


@pytest.fixture(scope="module")
def matrix(make_config, ray_session, tmp_path_factory):
    """Role -> a run in which its workers fail once in every way, one after the other."""
    known = {}

    def of(role):
        if role not in known:
            strikes = [Strike(number, role, kind) for number, kind in enumerate(ROLES[role])]
            known[role] = None
            known[role] = undergo(make_config, tmp_path_factory.mktemp(role), strikes, len(strikes) + 1)
        assert known[role] is not None, "that run failed once already"
        return known[role]

    return of


@pytest.mark.verify
@pytest.mark.parametrize(("role", "kind"), [(role, kind) for role, kinds in ROLES.items() for kind in kinds])
def test_every_fault_of_every_role(role, kind, matrix) -> None:
    done, local, struck, logs = matrix(role)
    (strike,) = [strike for strike in struck if strike.kind == kind]
    check(strike, done, struck, logs)
    assert same(done, local)


def learner_of(make_config, rounds, ranks=1):
    small = {"resources": {"cpu": 0.25}}
    cluster = {"share_teachers": True, "learner": small | {"ranks": ranks}}
    return make_config("ray", cluster=cluster, rounds=rounds, checkpoint={"every": 2})


def test_a_learner_that_is_killed_comes_back_by_itself_at_its_last_checkpoint(
    make_config, ray_session, reference, tmp_path
) -> None:
    """In round 3 of 4, of which the checkpoint holds two: round 2 is done again."""
    done, _ = disturbed(learner_of(make_config, 4), tmp_path / "run", [Strike(3, "learner", "kill", "take")])
    assert not done.error and same(done, reference(4))
    assert [row["round"] for row in done.rows] == list(range(4))
    (lost,) = [note for note in done.notes if re.search(r"learner rank 0.* was lost", note)]
    assert re.match(
        r"taking round 3 [ab]\[\d\]: learner rank 0( \(node [\d.]+, pid \d+\))? was lost \(ActorDiedError", lost
    ), lost
    assert lost.endswith("the learner starts again from the last checkpoint")
    assert "going on after round 2 of 4" in done.notes
    assert done.rows[-1]["weight_version"].split(".")[1] == "1", "another generation"
    assert not alive(done.pids)


@pytest.mark.verify
def test_one_of_two_ranks_that_is_killed_takes_the_other_with_it_and_both_come_back(
    make_config, ray_session, tmp_path
) -> None:
    undisturbed = go(learner_of(make_config, 4, ranks=2), tmp_path / "undisturbed")
    strikes = [Strike(1, "learner", "kill", "update", rank=1), Strike(3, "learner", "kill", "take", rank=0)]
    done, saboteur = disturbed(learner_of(make_config, 4, ranks=2), tmp_path / "run", strikes)
    assert not saboteur.left and not done.error and same(done, undisturbed)
    assert [row["round"] for row in done.rows] == list(range(4))
    lost = [note for note in done.notes if "was lost" in note]
    assert [re.search(r"learner rank (\d)", note)[1] for note in lost] == ["1", "0"]
    assert not alive(done.pids)


@pytest.mark.verify
def test_a_learner_that_is_killed_again_and_again_stops_the_run_and_it_can_be_resumed(
    make_config, ray_session, reference, tmp_path
) -> None:
    strikes = [
        Strike(3, "learner", "kill", method)  # its checkpoint is of round 2, which is done again each time
        for method in ("update", "take", "update", "take")
    ]
    stopped, saboteur = disturbed(learner_of(make_config, 4), tmp_path / "run", strikes)
    assert not saboteur.left and stopped.error.exit_code == 3
    assert re.match(r"(update|taking round 3 .*): learner rank 0.* was lost .*--resume goes on", str(stopped.error))
    assert len([note for note in stopped.notes if "starts again" in note]) == 3
    assert [row["round"] for row in stopped.rows] == [0, 1, 2]
    assert not alive(stopped.pids)
    assert same(go(learner_of(make_config, 4), tmp_path / "run", resume=True), reference(4))
