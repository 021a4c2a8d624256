"""Prometheus gets what the rows and the pools say, from where nobody outside can read it, and never ends a run."""

import ipaddress
import time
import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from opd_ray.metrics import MetricsLog, rows
from opd_ray.runtime import telemetry
from opd_ray.runtime.telemetry import METRICS, PREFIX, Telemetry

ROW = {
    "round": 3,
    "loss": {"total": 0.5, "text": 0.25},
    "seconds": {"round": 2.0, "wait": 1.5},
    "lr": 1e-3,
    "staleness": 1,
    "weight_version": "0.1.4",
    "scores": {"ocr": None},
    "store": {"used": 1000, "spilled": 0},
    "roles": {"teacher.text": {"workers": 2.0, "busy": 3.0, "transfer": 0.5, "input": 0.5, "output": 0, "answers": 8}},
}
ROLE = {
    "role": "teacher.text",
    "wanted": 2,
    "healthy": 1,
    "starting": 1,
    "suspect": 0,
    "stale": 0,
    "draining": 0,
    "queue": 5,
    "in_flight": 2,
    "answers": 8,
    "lost": 1,
    "heartbeat_age": 0.5,
    "memory_mb": 2,
}


class Recorded:
    """A gauge or counter that keeps what Ray's would have exported."""

    made = None
    """Name -> what was made; each test has its own."""

    def __init__(self, name, help, labels):
        self.labels, self.values = labels, {}
        self.made[name] = self

    def set_default_tags(self, tags):
        self.default = tags

    def _key(self, tags):
        tags = self.default | tags
        assert set(tags) == set(self.labels)
        return tuple(tags[label] for label in self.labels)


class RecordedGauge(Recorded):
    def set(self, value, tags):
        self.values[self._key(tags)] = value


class RecordedCounter(Recorded):
    def inc(self, value, tags):
        assert value > 0
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + value


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "made", {})
    monkeypatch.setattr(telemetry, "Gauge", RecordedGauge)
    monkeypatch.setattr(telemetry, "Counter", RecordedCounter)
    return lambda name: Recorded.made[name].values


def test_every_metric_is_in_the_table_once_and_says_what_it_is():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("opd_ray_") and metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.unit in {"", "seconds", "bytes"} and "run" not in metric.labels


def test_a_row_sets_gauges_and_adds_to_counters(recorded):
    made = Telemetry("demo", pytest.fail)
    made.write(ROW)
    made.write(ROW | {"round": 4, "loss": {"total": 0.4}})
    assert recorded("opd_ray_round") == {("demo",): 5}
    assert recorded("opd_ray_weight_version") == {("demo",): 4}
    assert recorded("opd_ray_loss") == {("demo", "total"): 0.4, ("demo", "text"): 0.25}
    assert recorded("opd_ray_seconds") == {("demo", "round"): 2.0, ("demo", "wait"): 1.5}
    assert recorded("opd_ray_object_store_bytes") == {("demo", "used"): 1000, ("demo", "spilled"): 0}
    spent = {("demo", "teacher.text", state): x for state, x in (("busy", 6.0), ("transfer", 1.0), ("input", 1.0))}
    assert recorded("opd_ray_role_seconds_total") == spent
    assert recorded("opd_ray_score") == {}  # null in the row: there was no score


def test_the_pools_counts_are_cumulative_and_may_begin_again(recorded):
    made = Telemetry("demo", pytest.fail)
    for answers in (8, 8, 10, 1):
        made.roles([ROLE | {"answers": answers}, {"role": "learner", "healthy": 2, "memory_mb": None}])
    assert recorded("opd_ray_answers_total") == {("demo", "teacher.text"): 11}
    assert recorded("opd_ray_lost_workers_total") == {("demo", "teacher.text"): 1}
    workers = recorded("opd_ray_workers")
    assert workers["demo", "teacher.text", "wanted"] == 2 and workers["demo", "learner", "healthy"] == 2
    assert recorded("opd_ray_queue") == {("demo", "teacher.text"): 5}
    assert recorded("opd_ray_memory_bytes") == {("demo", "teacher.text"): 2 * 2**20}


def test_a_row_is_shown_for_as_long_as_the_round_after_it_takes(recorded):
    """Ray 2.60 forgets a gauge after 25 s without a value."""
    made = Telemetry("demo", pytest.fail)
    made.write(ROW)
    recorded("opd_ray_loss").clear()
    made.roles([])
    assert recorded("opd_ray_loss") == {("demo", "total"): 0.5, ("demo", "text"): 0.25}
    assert recorded("opd_ray_role_seconds_total")["demo", "teacher.text", "busy"] == 3.0


def test_an_error_turns_it_off_with_one_note_and_the_rows_are_kept(recorded, tmp_path):
    notes = []
    made = Telemetry("demo", notes.append)
    log = MetricsLog(tmp_path / "metrics.jsonl", [made])
    Recorded.made["opd_ray_loss"].set = None
    log.append(ROW)
    log.append(ROW | {"round": 4})
    made.roles([{"no": "role"}])
    log.close()
    assert len(notes) == 1 and notes[0].startswith("Prometheus is off (TypeError: ")
    assert [row["round"] for row in rows(tmp_path / "metrics.jsonl")] == [3, 4]


def families(node):
    """What Prometheus would read."""
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def scrape(node) -> dict[str, float]:
    """Name and our labels -> value."""
    own = ("task", "part", "role", "state", "kind")
    return {
        " ".join([sample.name, *(sample.labels[label] for label in own if label in sample.labels)]): sample.value
        for family in families(node)
        for sample in family.samples
        if sample.labels.get("run") == "scraped"
    }


@pytest.mark.ray
def test_the_values_arrive_at_an_address_of_this_machine_alone(ray_session):
    made = Telemetry("scraped", pytest.fail)
    made.write(ROW | {"scores": {"ocr": 0.5}, "grad_norm": 1.0, "evaluation": {"text": 0.75}})
    (node,) = ray.nodes()
    assert ipaddress.ip_address(node["NodeManagerAddress"]).is_loopback
    deadline, seen = time.monotonic() + 60, {}
    while time.monotonic() < deadline and f"{PREFIX}opd_ray_queue teacher.text" not in seen:
        made.roles([ROLE])
        time.sleep(1)  # Ray exports every ten seconds
        seen = scrape(node)
    assert seen[f"{PREFIX}opd_ray_queue teacher.text"] == 5
    assert seen[f"{PREFIX}opd_ray_loss text"] == 0.25 and seen[f"{PREFIX}opd_ray_round"] == 4
    assert seen[f"{PREFIX}opd_ray_role_seconds_total teacher.text busy"] == 3
    assert seen[f"{PREFIX}opd_ray_answers_total teacher.text"] == 8
    assert seen[f"{PREFIX}opd_ray_workers teacher.text wanted"] == 2
    made_of = {PREFIX + metric.name: metric.help for metric in METRICS}
    assert {name.split()[0] for name in seen} == set(made_of)
    told = {sample.name: family.documentation for family in families(node) for sample in family.samples}
    assert {name: told[name] for name in made_of} == made_of
