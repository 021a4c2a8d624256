"""`status` and `scale` on a run folder, with a stand-in for the driver."""

import io
import json
import threading
import time

import pytest
from rich.console import Console

from opd_ray.commands import status as module
from opd_ray.commands.scale import parse_targets
from opd_ray.commands.status import Standing
from opd_ray.errors import ConfigError
from opd_ray.storage import control
from opd_ray.storage.run_folder import STAGES, claim, write_json_atomic

ROLES = [
    {"role": "rollout", "wanted": 2, "starting": 1, "healthy": 1, "suspect": 0, "stale": 0, "draining": 0, "queue": 3}
    | {"in_flight": 2, "answers": 90, "weights": "0.0.12", "heartbeat_age": 1.2, "memory_mb": 2345.0, "lost": 0}
    | {"busy": 0.71, "rate": 42.0, "teachers": []},
    {"role": "teacher.typography", "wanted": 1, "starting": 0, "healthy": 0, "suspect": 1, "stale": 0, "draining": 0}
    | {"queue": 0, "in_flight": 1, "answers": 9, "weights": None, "heartbeat_age": None, "memory_mb": None, "lost": 1}
    | {"busy": None, "rate": None, "teachers": ["typography"]},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "[bold]demo"
    claim(folder, {})
    rows = [{"round": number, "time": 1000.0 + 2.5 * number} for number in range(12)]
    rows.insert(3, {"round": 2, "time": 17.0})  # an attempt long ago
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"round": 12, "ti')
    return folder


def beat(folder, **changes):
    about = {"status": "running", "round": 12, "rounds": 80, "attempt": 0, "time": time.time(), "pid": 1}
    write_json_atomic(folder / "status.json", about | {"roles": ROLES, "waiting": None, "phase": None} | changes)


def shown(folder, width):
    console = Console(width=width, markup=False, emoji=False, file=io.StringIO())
    console.print(Standing.read(folder).show(console))
    return console.file.getvalue()


def test_without_a_terminal_it_is_a_few_lines(cli, run):
    beat(run)
    done = cli("status", run)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "[bold]demo: running, 12 of 80 rounds done, 2.5 s a round, 2 min 50 s left",
        "heartbeat 0.0 s ago, attempt 0",
        "rollout: 1 of 2 healthy, 1 starting, busy 71 %, queue 3, 42.0 a minute, weights 0.0.12, heartbeat 1.2 s, "
        "memory 2.3 GB",
        "teacher.typography: 0 of 1 healthy, 1 suspect, queue 0",
    ]


def test_a_wide_screen_gets_a_table_and_a_narrow_one_loses_nothing(run):
    beat(run)
    wide = shown(run, 140).splitlines()
    (title,) = [line for line in wide if "wanted" in line]
    assert title.split() == ["role", *" ".join(module.COLUMNS.values()).split()]
    (rollout,) = [line for line in wide if line.split()[:1] == ["rollout"]]
    assert " ".join(rollout.split()) == "rollout 2 1 1 0 71 % 3 42.0 0.0.12 1.2 s 2.3 GB"
    for width in (100, 80, 40, 24):
        text = shown(run, width)
        assert max(map(len, text.splitlines())) <= width
        words = " ".join(text.split())
        assert "1 of 2 healthy" in words and "memory 2.3 GB" in words and "…" not in words


def test_what_it_waits_for_and_what_it_does(cli, run):
    now = time.time()
    beat(run, time=now, phase="saving", waiting={"for": "teacher.text", "since": now - 12, "why": "no room\nfor it"})
    assert cli("status", run).out.splitlines()[2:4] == ["waiting for teacher.text since 12 s: no room for it", "saving"]


def test_an_old_heartbeat_says_what_to_do(cli, run):
    beat(run, time=time.time() - 120.2)
    done = cli("status", run)
    assert done.code == 0
    assert done.out.splitlines()[1] == (
        "no heartbeat for 2 min: the driver is gone or hangs; go on with opd-ray train ... --resume"
    )


def test_a_finished_run_has_no_workers(cli, run):
    beat(run, status="done", round=80, time=time.time() - 7200.5)
    assert cli("status", run).out.splitlines() == [
        "[bold]demo: done, 80 of 80 rounds done, 2.5 s a round",
        "ended 2 h 00 min ago",
    ]
    assert cli("status", run, "--watch").code == 0, "there is nothing to wait for"


def test_a_stopped_job_names_what_has_not_begun_and_how_to_go_on(cli, run):
    job = run.parent
    write_json_atomic(job / STAGES, {"stages": [run.name, "text", "student"]})
    beat(run, status="stopped", time=time.time() - 7200.5)
    told = ["ended 2 h 00 min ago; go on with opd-ray train ... --resume", "text: not begun", "student: not begun"]
    assert cli("status", job).out.splitlines()[1:] == told
    assert cli("status", job, "--watch").out.splitlines()[1:] == told, "there is nothing to wait for"


def test_json_is_the_heartbeat_and_what_follows_from_it(cli, run):
    beat(run)
    done = cli("status", run, "--json", "--watch")
    data = json.loads(done.out)
    assert data["roles"] == ROLES and data["round"] == 12 and data["seconds_per_round"] == 2.5
    assert 0 <= data["heartbeat_age"] < 60


def test_a_run_of_before_has_neither_roles_nor_rows(cli, run):
    (run / "metrics.jsonl").unlink()
    write_json_atomic(run / "status.json", {"status": "running", "attempt": 0, "time": time.time(), "roles": {"a": 1}})
    assert cli("status", run).out.startswith("[bold]demo: running, 0 of 0 rounds done\nheartbeat ")


def test_watching_waits_for_a_start_and_ends_with_the_run(cli, run, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        beat(run, **({} if len(looks) == 1 else {"status": "done"}))

    monkeypatch.setattr(module.time, "sleep", sleep)
    done = cli("status", run, "--watch")
    assert done.code == 0 and looks == [1.0, 1.0]
    told = [line for line in done.out.splitlines() if "attempt 0 has no heartbeat" in line or "[bold]demo: " in line]
    assert [line.partition("demo: ")[2].split(",")[0] for line in told][1:] == ["running", "done"]


def test_ctrl_c_ends_watching(cli, run, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    beat(run)
    monkeypatch.setattr(module.time, "sleep", sleep)
    done = cli("status", run, "--watch")
    assert (done.code, done.err) == (0, "") and done.out.count("[bold]demo: running") == 1


@pytest.mark.parametrize("args", [["status"], ["status", "--watch"], ["status", "--json"], ["scale", "rollout=2"]])
def test_no_run_folder(cli, tmp_path, args):
    verb, *rest = args
    assert "not a run folder (no run.json); run folders are runs/<name>" in cli(verb, tmp_path / "no", *rest).error


def test_a_run_that_only_starts(cli, run):
    assert "attempt 0 has no heartbeat yet; its workers start" in cli("status", run).error
    assert "attempt 0 has no heartbeat yet; its workers start" in cli("scale", run, "rollout=2").error


@pytest.fixture
def driver(run, monkeypatch):
    """Answers as a run with one role does."""

    def act(targets):
        if targets.keys() != {"rollout"}:
            raise ConfigError("no role 'x'; known: rollout")
        return f"rollout 1 -> {targets['rollout']}"

    def look():
        while not over.wait(0.01):
            control.serve(run, act)

    monkeypatch.setattr(control, "POLL_S", 0.01)
    beat(run)
    over = threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    yield
    over.set()
    thread.join(10)


def test_scale_says_what_changed(cli, run, driver):
    done = cli("scale", run, "rollout=3")
    assert (done.code, done.out, done.err) == (0, "rollout 1 -> 3\n", "")


def test_scale_says_what_the_run_refused(cli, run, driver):
    assert cli("scale", run, "x=3").error == "no role 'x'; known: rollout"


def test_scale_without_anybody_who_answers(cli, run):
    beat(run, time=time.time() - 300)
    error = cli("scale", run, "rollout=3", "--timeout", "1").error
    assert "no answer in 1 s; the request was withdrawn. The driver's last heartbeat is 30" in error
    beat(run, status="done")
    assert cli("scale", run, "rollout=3").error.endswith("(done), so it has no workers to scale")


@pytest.mark.parametrize("text", ["rollout", "rollout=", "=3", "rollout=two", "rollout=1.5", "rollout==2", "rollout=²"])
def test_malformed_targets(cli, run, text):
    beat(run)
    error = cli("scale", run, "reward=1", text).error
    assert error == f"{text}: expected role=number, for instance rollout=2 or teacher.text=3"
    assert not (run / "control").exists()


def test_targets():
    assert parse_targets(["teacher.text=3", "rollout=0", "x=-1"]) == {"teacher.text": 3, "rollout": 0, "x": -1}
    with pytest.raises(ConfigError, match=r"^a=2: a was given before; give it once$"):
        parse_targets(["a=1", "a=2"])


@pytest.mark.parametrize("verb", ["scale", "status"])
def test_help(cli, verb):
    done = cli(verb, "--help")
    assert done.code == 0 and "Usage: opd-ray" in done.out and max(map(len, done.out.splitlines())) <= 80
