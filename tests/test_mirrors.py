"""TensorBoard and W&B show what metrics.jsonl holds, each row once, and never end a run.

TensorBoard is the real package; W&B is a stand-in of a few lines, since the package is not in the tested set.
"""

import json
import sys
from pathlib import Path

import pytest

from opd_ray.config import parse
from opd_ray.errors import ConfigError
from opd_ray.metrics import MetricsLog, Mirror, check_logging, mirrors, rows, scalars
from opd_ray.preflight import identity

ROW = {
    "round": 3,
    "time": 1000.5,
    "loss": {"total": 0.5, "compose": 0.25},
    "lr": 1e-3,
    "staleness": 0,
    "weight_version": "0.0.4",
    "gap": {"text": {"0": 2.0, "3": 1.0}},
    "scores": {"a:b": None},
}
FLAT = {"loss/total": 0.5, "loss/compose": 0.25, "lr": 1e-3, "staleness": 0, "gap/text/0": 2.0, "gap/text/3": 1.0}

WANDB = """
import json, os
from pathlib import Path

class Settings(dict):
    def __init__(self, **given):
        super().__init__(given)

class Run:
    def __init__(self, given):
        self.path = Path(given["dir"], given["id"] + ".jsonl")
        self.step = len(self.path.read_text().splitlines()) if self.path.exists() else 0

    def log(self, data, step, commit):
        assert step == self.step and commit, (step, self.step)
        with self.path.open("a") as file:
            file.write(json.dumps([step, data]) + "\\n")
        self.step += 1

    def finish(self):
        self.path.with_suffix(".done").touch()

def init(**given):
    if os.environ.get("WANDB_FAILS"):
        raise RuntimeError("nobody is\\nlogged in")
    Path(given["dir"], "given.json").write_text(json.dumps(given))
    return Run(given)
"""


def made(**logging):
    return parse(
        {
            "name": "run",
            "rounds": 4,
            "model": {"path": "somewhere"},
            "teachers": {"text": {"lora": "a"}},
            "prompts": {"train": {"text": "t.txt"}},
            "logging": logging,
        },
        "f",
    )


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package, and a configuration that asks for it."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import is undone afterwards
    del sys.modules["wandb"]
    return made(wandb={"project": "p"})


def shown(folder: Path, tag: str) -> list[tuple[int, float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]


def attempt(config, folder: Path, rounds, notes=None, value=1.0) -> None:
    """Rows of some rounds, as an attempt that begins with the first of them writes them."""
    log = MetricsLog(folder / "metrics.jsonl", mirrors(config, folder, [].append if notes is None else notes.append))
    log.truncate_from(rounds[0])
    for round in rounds:
        log.append({"round": round, "time": 50.0 + round, "loss": {"total": value + round}})
    log.close()


def test_a_row_is_shown_as_its_numbers():
    assert scalars(ROW) == FLAT


def test_tensorboard_shows_each_row_once_also_after_a_resume(tmp_path):
    notes = []
    attempt(made(), tmp_path, range(4), notes)
    attempt(made(), tmp_path, range(2, 6), notes, value=10.0)  # the checkpoint was of round 2
    values = [1.0, 2.0, 12.0, 13.0, 14.0, 15.0]
    assert shown(tmp_path, "loss/total") == [(n, value, 50.0 + n) for n, value in enumerate(values)]
    assert [row["loss"]["total"] for row in rows(tmp_path / "metrics.jsonl")] == values and notes == []


def test_a_row_is_on_disk_before_the_next_round(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", mirrors(made(), tmp_path, print))
    log.append(ROW)
    assert shown(tmp_path, "gap/text/3") == [(3, 1.0, 1000.5)]
    log.close()


def test_nothing_opens_before_the_first_row(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl", mirrors(made(), tmp_path, print)).close()
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_there_is_no_mirror(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_ray.metrics.find_spec", lambda name: None)
    assert mirrors(made(), tmp_path, print) == []


def test_wandb_has_one_run_with_each_row_once_for_all_attempts(wandb, tmp_path):
    notes = []
    attempt(wandb, tmp_path, range(4), notes)
    attempt(wandb, tmp_path, range(2, 6), notes)
    assert notes == []
    given = json.loads((tmp_path / "given.json").read_text())
    assert (given["project"], given["name"], given["resume"]) == ("p", "run", "allow")
    assert given["config"]["rounds"] == 4
    (log,) = tmp_path.glob(f"{given['id']}.jsonl")
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        [round, {"loss/total": 1.0 + round}] for round in range(6)
    ]
    assert log.with_suffix(".done").exists()


def test_a_tool_that_fails_is_off_after_one_note(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_FAILS", "1")
    notes = []
    attempt(wandb, tmp_path, range(3), notes)
    assert notes == ["W&B is off (RuntimeError: nobody is logged in); the run goes on, and metrics.jsonl has every row"]
    assert len(list(rows(tmp_path / "metrics.jsonl"))) == len(shown(tmp_path, "loss/total")) == 3


def test_an_error_at_the_end_is_a_note_too():
    class Full:
        def write(self, row):
            pass

        def close(self):
            raise OSError("disk full")

    notes = []
    mirror = Mirror("X", lambda round: Full(), notes.append)
    mirror.write(ROW)
    mirror.close()
    assert notes == ["X is off (OSError: disk full); the run goes on, and metrics.jsonl has every row"]


def test_wandb_that_is_not_installed_is_refused(monkeypatch):
    config = made(wandb={"project": "p"})
    monkeypatch.setattr("opd_ray.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^logging.wandb: the package wandb is not installed; pip install"):
        check_logging(config)
    check_logging(made())


def test_where_numbers_are_shown_is_no_part_of_a_runs_identity():
    assert identity(made()) == identity(made(wandb={"project": "p", "entity": "e"}))
