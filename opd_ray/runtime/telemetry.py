"""A run's numbers for Prometheus, through the metrics agent of the Ray node that the driver is on.

Ray puts ``ray_`` before each name, and labels of its own beside ours. Its agent listens where Ray itself does: on the
loopback address alone for a Ray that we start, on the node's addresses in a cluster that somebody else started.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge

from opd_ray.metrics import Guard

__all__ = ["METRICS", "PREFIX", "Metric", "Telemetry"]

PREFIX = "ray_"
"""What Ray puts before every name on its way out."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as Prometheus shows it."""

    name: str
    """Without ``PREFIX``; a counter's ends in ``_total``."""
    kind: Literal["gauge", "counter"]
    help: str
    unit: str
    """``seconds``, ``bytes``, or empty for plain numbers."""
    labels: tuple[str, ...] = ()
    """Besides ``run``, which every metric has."""


METRICS = (
    Metric("opd_ray_round", "gauge", "Rounds that are finished.", ""),
    Metric("opd_ray_weight_version", "gauge", "Publishes since the learner's generation began.", ""),
    Metric("opd_ray_staleness", "gauge", "Rounds between the weights that drew and those that train.", ""),
    Metric("opd_ray_loss", "gauge", "The last round's loss, and its total over tasks.", "", ("task",)),
    Metric("opd_ray_grad_norm", "gauge", "Gradient norm of the last round's last update.", ""),
    Metric("opd_ray_learning_rate", "gauge", "Learning rate of the last round's last update.", ""),
    Metric("opd_ray_score", "gauge", "Mean reward of what the student drew in the last round.", "", ("reward",)),
    Metric("opd_ray_evaluation", "gauge", "The student's last score on held-out prompts.", "", ("task",)),
    Metric("opd_ray_seconds", "gauge", "Wall time of the last round, and of its parts.", "seconds", ("part",)),
    Metric(
        "opd_ray_role_seconds_total",
        "counter",
        "Worker-seconds of a role: at work, in transfer, waiting for input, waiting until its output is asked for.",
        "seconds",
        ("role", "state"),
    ),
    Metric("opd_ray_object_store_bytes", "gauge", "Ray's object store: used now, spilled ever.", "bytes", ("kind",)),
    Metric("opd_ray_workers", "gauge", "Workers by state of life, and how many are wanted.", "", ("role", "state")),
    Metric("opd_ray_queue", "gauge", "Jobs that could run and have no free worker.", "", ("role",)),
    Metric("opd_ray_in_flight", "gauge", "Jobs that workers hold.", "", ("role",)),
    Metric("opd_ray_answers_total", "counter", "Answers of a role's workers.", "", ("role",)),
    Metric("opd_ray_lost_workers_total", "counter", "Workers that died or were given up.", "", ("role",)),
    Metric("opd_ray_heartbeat_age", "gauge", "Time since a worker of the role was last heard.", "seconds", ("role",)),
    Metric("opd_ray_memory_bytes", "gauge", "Memory of the role's largest worker process.", "bytes", ("role",)),
)
"""Everything that is exported: instruments here, and panels of a dashboard, are made from it."""

USES = ("busy", "transfer", "input", "output")
STATES = ("wanted", "starting", "healthy", "suspect", "stale", "draining")
GAUGES = {"opd_ray_queue": "queue", "opd_ray_in_flight": "in_flight", "opd_ray_heartbeat_age": "heartbeat_age"}
COUNTS = {"opd_ray_answers_total": "answers", "opd_ray_lost_workers_total": "lost"}
PLAIN = {"opd_ray_staleness": "staleness", "opd_ray_grad_norm": "grad_norm", "opd_ray_learning_rate": "lr"}
TABLES = {
    "opd_ray_loss": "loss",
    "opd_ray_score": "scores",
    "opd_ray_evaluation": "evaluation",
    "opd_ray_seconds": "seconds",
    "opd_ray_object_store_bytes": "store",
}

Sample = tuple[str, tuple[str, ...], float | None]
"""A metric's name, the values of its labels, and what to set it to or, for a counter, to add. None is left out."""


class Telemetry:
    """One run's metrics; a ``metrics.Writer``. Needs a Ray that is up; whatever fails turns it off with one note."""

    def __init__(self, run: str, note: Callable[[str], None]) -> None:
        """``run``: the run's name, the label that tells runs on one cluster apart."""
        self._guard = Guard("Prometheus", note)
        self._instruments: dict[str, Gauge | Counter] = {}
        self._set: dict[tuple[str, tuple[str, ...]], float] = {}
        """Each gauge's last value."""
        self._before: dict[tuple[str, str], float] = {}
        self._guard.attempt(lambda: self._instruments.update({m.name: _instrument(m, run) for m in METRICS}))

    def write(self, row: Mapping[str, Any]) -> None:
        """A finished round, as its row of metrics.jsonl."""
        self._guard.attempt(lambda: self._take(_of_row(row)))

    def roles(self, roles: Iterable[Mapping[str, Any]]) -> None:
        """The pools as they are now, about once a second, also while a round is long.

        Ray exports every ten seconds and forgets a gauge that was not set for twenty: each call sets the rows' again.

        Args:
            roles: for each role its name under ``role``, numbers of workers under the states of life and ``wanted``,
                ``queue``, ``in_flight``, ``answers`` and ``lost`` since the pool was made, ``heartbeat_age`` (s),
                ``memory_mb`` (2**20 bytes); what is missing or None is left out.
        """
        self._guard.attempt(lambda: self._take([*self._last_values(), *self._of_roles(roles)]))

    def close(self) -> None:
        """Ray exports the last values until it ends."""

    def _take(self, samples: Iterable[Sample]) -> None:
        for name, labels, value in samples:
            instrument = self._instruments[name]
            tags = dict(zip(LABELS[name], labels, strict=True))
            if value is None:
                continue
            if isinstance(instrument, Gauge):
                instrument.set(value, tags)
                self._set[name, labels] = value
            elif value > 0:  # Ray refuses to add nothing
                instrument.inc(value, tags)

    def _last_values(self) -> list[Sample]:
        return [(name, labels, value) for (name, labels), value in self._set.items()]

    def _of_roles(self, roles: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
        for facts in roles:
            role = str(facts["role"])
            for state in STATES:
                yield "opd_ray_workers", (role, state), facts.get(state)
            for name, key in GAUGES.items():
                yield name, (role,), facts.get(key)
            memory = facts.get("memory_mb")
            yield "opd_ray_memory_bytes", (role,), None if memory is None else memory * 2**20
            for name, key in COUNTS.items():
                yield name, (role,), self._more(role, key, facts.get(key))

    def _more(self, role: str, key: str, count: float | None) -> float | None:
        """How much a count has grown; one that fell began again, since its pool was made anew."""
        if count is None:
            return None
        before = self._before.get((role, key), 0)
        self._before[role, key] = count
        return count - before if count >= before else count


LABELS = {metric.name: metric.labels for metric in METRICS}


def _of_row(row: Mapping[str, Any]) -> Iterator[Sample]:
    yield "opd_ray_round", (), row["round"] + 1
    version = row.get("weight_version")
    yield "opd_ray_weight_version", (), None if version is None else int(str(version).rsplit(".", 1)[-1])
    for name, key in PLAIN.items():
        yield name, (), row.get(key)
    for name, key in TABLES.items():
        for label, value in (row.get(key) or {}).items():
            yield name, (str(label),), value
    for role, use in (row.get("roles") or {}).items():
        for state in USES:
            yield "opd_ray_role_seconds_total", (str(role), state), use.get(state)


def _instrument(metric: Metric, run: str) -> Gauge | Counter:
    make = Gauge if metric.kind == "gauge" else Counter
    made: Gauge | Counter = make(metric.name, metric.help, ("run", *metric.labels))
    made.set_default_tags({"run": run})
    return made
