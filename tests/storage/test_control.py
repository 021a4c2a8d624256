"""Requests and answers through the run folder: exactly once, in order, and nothing in it can end the run."""

import json
import threading
import time

import pytest

from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.storage import control
from opd_ray.storage.control import Answer, answer, ask, heartbeat, pending, serve
from opd_ray.storage.run_folder import claim, write_json_atomic


def beat(folder, **changes):
    about = {"status": "running", "round": 3, "rounds": 8, "attempt": 0, "time": time.time(), "pid": 1}
    write_json_atomic(folder / "status.json", about | changes)


@pytest.fixture
def run(tmp_path):
    claim(tmp_path / "run", {})
    beat(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(control, "POLL_S", 0.005)


def put(run, name="00000000000000000001-a", text=None, **changes):
    """A request as a file, without anybody who waits."""
    (run / "control").mkdir(exist_ok=True)
    request = {"targets": {"rollout": 2}, "attempt": 0, "time": time.time()} | changes
    (run / "control" / f"{name}.json").write_text(json.dumps(request) if text is None else text)


def told(run, name="00000000000000000001-a"):
    return json.loads((run / "control" / f"{name}.answer.json").read_text())


def names(run):
    return sorted(path.name for path in (run / "control").iterdir())


class Driver:
    """Looks until it is told to end."""

    def __init__(self, run, act):
        self.run, self.act, self.lines, self.over = run, act, [], False
        self.thread = threading.Thread(target=self.look)

    def look(self):
        while not self.over:
            self.lines += serve(self.run, self.act)
            time.sleep(0.005)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over = True
        self.thread.join(10)


def test_an_answer_comes_back(run):
    with Driver(run, lambda targets: f"rollout 1 -> {targets['rollout']}") as driver:
        assert ask(run, {"rollout": 2}, 10) == Answer(True, "rollout 1 -> 2")
        assert ask(run, {"rollout": 5}, 10) == Answer(True, "rollout 1 -> 5")
    assert driver.lines == ["scaled: rollout 1 -> 2", "scaled: rollout 1 -> 5"]
    assert len(names(run)) == 2 and all(name.endswith(".answer.json") for name in names(run))


def test_a_refusal_comes_back_and_the_driver_goes_on(run):
    def refuse(targets):
        raise ConfigError("no role 'x'; known: rollout")

    with Driver(run, refuse) as driver:
        assert ask(run, {"x": 2, "y": 1}, 10) == Answer(False, "no role 'x'; known: rollout")
    assert driver.lines == ["scale x=2 y=1 was refused: no role 'x'; known: rollout"]


def test_many_who_ask_at_once_get_their_own_answers(run):
    answers = {}

    def one(number):
        answers[number] = ask(run, {"rollout": number}, 20).text

    with Driver(run, lambda targets: f"is {targets['rollout']}"):
        threads = [threading.Thread(target=one, args=(number,)) for number in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == {number: f"is {number}" for number in range(30)}


def test_requests_are_taken_in_the_order_in_which_they_came(run):
    for text in (3, 1, 2):
        with pytest.raises(RunFolderError):
            put_and_leave(run, text)
    assert [request.targets["rollout"] for request in pending(run)] == [3, 1, 2]


def put_and_leave(run, number):
    """As somebody does who is killed while waiting: nothing is withdrawn."""
    withdraw, control._withdraw = control._withdraw, lambda path: True
    try:
        ask(run, {"rollout": number}, 0.01)
    finally:
        control._withdraw = withdraw


def test_without_a_driver_the_request_is_withdrawn_and_the_heartbeats_age_told(run):
    beat(run, time=time.time() - 120)
    with pytest.raises(RunFolderError, match=r"in 0.05 s; the request was withdrawn.*heartbeat is 12\d s old"):
        ask(run, {"rollout": 2}, 0.05)
    assert names(run) == [] and pending(run) == []


def test_a_request_that_was_taken_is_waited_for_a_little_longer(run, monkeypatch):
    waits = []

    def wait(path, timeout_s, real=control._wait):
        waits.append(timeout_s)
        if len(waits) == 1:  # the driver takes it at the last moment, and answers after it
            (request,) = pending(run)
            assert real(path, 0) is None
            answer(run, request, True, "rollout 1 -> 2")
            return None
        return real(path, timeout_s)

    monkeypatch.setattr(control, "_wait", wait)
    assert ask(run, {"rollout": 2}, 0.0) == Answer(True, "rollout 1 -> 2")


def test_a_driver_that_dies_with_a_request_is_told_of(run, monkeypatch):
    monkeypatch.setattr(control, "GRACE_S", 0.0)
    monkeypatch.setattr(control, "_withdraw", lambda path: False)
    with pytest.raises(RunFolderError, match="it has taken the request, so look at its status"):
        ask(run, {"rollout": 2}, 0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "done"}, r"the run is not under way \(done\), so it has no workers to scale"),
        ({"status": "stopped"}, r"not under way \(stopped\)"),
        ({"attempt": 4}, "attempt 0 has no heartbeat yet"),
        ({"time": None}, "attempt 0 has no heartbeat yet"),
    ],
)
def test_nobody_is_asked_who_cannot_answer(run, changes, expected):
    beat(run, **changes)
    with pytest.raises(RunFolderError, match=expected):
        ask(run, {"rollout": 2})
    assert not (run / "control").exists()


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder \(no run.json\)"):
        ask(tmp_path / "nothing", {"rollout": 2})
    (run / "status.json").unlink()
    with pytest.raises(RunFolderError, match="its workers start, or it could not start"):
        heartbeat(run)


def test_requests_of_an_earlier_attempt_and_old_ones_expire(run):
    put(run, "a", attempt=0)
    put(run, "b", attempt=1, time=time.time() - 2 * control.EXPIRES_S)
    put(run, "c", attempt=1)
    claim(run, {}, resume=True)
    assert [request.id for request in pending(run)] == ["c"]
    assert told(run, "a")["text"] == "expired: it was for attempt 0, and this is attempt 1; ask again"
    assert told(run, "b")["text"].startswith("expired: it was 1200 s old") and told(run, "b")["ok"] is False
    assert names(run) == ["a.answer.json", "b.answer.json", "c.taken.json"]


def test_what_was_taken_and_not_answered_is_taken_again(run):
    put(run)
    (first,) = pending(run)
    assert pending(run) == [first]
    answer(run, first, True, "done")
    assert pending(run) == [] and told(run)["text"] == "done"


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"targets": {"rollout": 2}',
        "[]",
        "null",
        "[" * 100_000,
        "\x00",
        '{"targets": [1], "attempt": 0, "time": 0}',
        '{"targets": {"rollout": "2"}, "attempt": 0, "time": 0}',
        '{"targets": {"rollout": true}, "attempt": 0, "time": 0}',
        '{"targets": {"rollout": 2}}',
    ],
    ids=range(10),
)
def test_broken_requests_are_moved_aside_with_a_reason(run, text):
    put(run, text=text)
    put(run, "z")
    assert [request.id for request in pending(run)] == ["z"]
    assert told(run)["ok"] is False and told(run)["text"].startswith("broken: ")
    assert "00000000000000000001-a.broken" in names(run)


def test_strange_things_in_the_folder_end_nothing(run):
    assert pending(run) == []  # nobody has asked yet
    put(run)
    (run / "control" / "folder.json").mkdir()
    (run / "control" / "notes.txt").touch()
    (run / "control" / ".hidden.json").touch()
    (run / "control" / "dangling.json").symlink_to("nowhere")
    assert [request.id for request in pending(run)] == ["00000000000000000001-a"]
    assert {"folder.broken", "notes.txt", ".hidden.json", "dangling.broken"} <= set(names(run))
    assert [request.id for request in pending(run)] == ["00000000000000000001-a"]


def test_few_answers_are_kept(run, monkeypatch):
    monkeypatch.setattr(control, "READ_S", -1.0)
    for number in range(30):
        put(run, f"{number:03d}", text="broken" if number % 2 else None)
        serve(run, lambda targets: "done")
    kept = [name for name in names(run) if name.endswith(".answer.json")]
    assert kept == [f"{number:03d}.answer.json" for number in range(10, 30)]
    assert len(names(run)) <= 2 * control.KEPT
