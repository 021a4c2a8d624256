"""Grafana's dashboard of a run, made from the table of metrics that the code exports: opd_ray.json beside this file.

python deploy/grafana/make_dashboard.py
"""

import json
from pathlib import Path

from opd_ray.runtime.telemetry import METRICS, PREFIX, Metric

FILE = Path(__file__).parent / "opd_ray.json"
UNITS = {"": "short", "seconds": "s", "bytes": "bytes"}
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


def dashboard() -> dict:
    """Everything of the table, a panel each: first what is trained, then who does it."""
    sections = {
        "Training": [metric for metric in METRICS if "role" not in metric.labels],
        "Workers": [metric for metric in METRICS if "role" in metric.labels],
    }
    panels, y = [], 0
    for title, metrics in sections.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": []}
            | {"gridPos": {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}}
        )
        y += 1
        for index, metric in enumerate(metrics):
            place = {"x": WIDTH * (index % COLUMNS), "y": y + HEIGHT * (index // COLUMNS), "w": WIDTH, "h": HEIGHT}
            panels.append(panel(metric) | {"gridPos": place})
        y += HEIGHT * -(-len(metrics) // COLUMNS)
    return {
        "uid": "opd-ray",
        "title": "opd_ray",
        "tags": ["opd_ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",  # as often as Ray exports
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": variables()},
        "panels": [one | {"id": number} for number, one in enumerate(panels, start=1)],
    }


def panel(metric: Metric) -> dict:
    """One metric over time. Labels that Ray adds, such as the driver's process, are aggregated away."""
    series = ", ".join(("run", *metric.labels))
    selected = f'{PREFIX}{metric.name}{{run=~"$run"}}'
    title = metric.name.removeprefix("opd_ray_").removesuffix("_total").replace("_", " ").capitalize()
    query, unit = f"max by ({series}) ({selected})", UNITS[metric.unit]
    if metric.kind == "counter" and metric.unit == "seconds":  # seconds a second: so many workers, on average
        query, unit = f"sum by ({series}) (rate({selected}[$__rate_interval]))", "short"
        title += " a second"
    elif metric.kind == "counter":
        query = f"sum by ({series}) (increase({selected}[5m]))"
        title += " in 5 minutes"
    return {
        "type": "timeseries",
        "title": title,
        "description": metric.help,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "targets": [
            {"refId": "A", "expr": query}
            | {"legendFormat": " ".join(f"{{{{{label}}}}}" for label in ("run", *metric.labels))}
        ],
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def variables() -> list[dict]:
    """Which Prometheus, and which runs."""
    known = f"label_values({PREFIX}{METRICS[0].name}, run)"
    source = {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}
    runs = {"type": "query", "name": "run", "label": "Run", "query": known, "refresh": 2, "multi": True}
    runs |= {"includeAll": True, "datasource": {"type": "prometheus", "uid": "${datasource}"}}
    return [source, runs | {"current": {"text": "All", "value": "$__all"}}]


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
