"""The dashboard shows every metric that the code exports, and none that it does not."""

import importlib.util
import json
import re

import pytest
import yaml

from opd_ray.runtime.telemetry import METRICS, PREFIX
from tests.deploy.kustomize import KUBERAY, ROOT, build, one

GRAFANA = ROOT / "deploy" / "grafana"
BOARD = json.loads((GRAFANA / "opd_ray.json").read_text(encoding="utf-8"))
PANELS = {panel["title"]: panel for panel in BOARD["panels"] if panel["type"] != "row"}
EXPORTED = {PREFIX + metric.name: metric for metric in METRICS}


def named(query):
    """The metrics that a query names: words that are no function, label or variable."""
    return set(re.findall(rf"\b{PREFIX}\w+", query))


def test_the_committed_file_is_what_the_command_makes():
    spec = importlib.util.spec_from_file_location("make_dashboard", GRAFANA / "make_dashboard.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (GRAFANA / "opd_ray.json").read_text(encoding="utf-8") == made.text(), (
        "python deploy/grafana/make_dashboard.py"
    )


def test_every_metric_is_shown_and_no_query_names_another():
    queries = [target["expr"] for panel in PANELS.values() for target in panel["targets"]]
    assert set().union(*map(named, queries)) == set(EXPORTED)
    variables = [variable["query"] for variable in BOARD["templating"]["list"]]
    assert set().union(*map(named, variables)) <= set(EXPORTED)


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_asks_for_labels_that_are_there(title):
    (target,) = PANELS[title]["targets"]
    metric = EXPORTED[named(target["expr"]).pop()]
    by = re.search(r"by \((.*?)\)", target["expr"])[1].split(", ")
    assert by == ["run", *metric.labels] == re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
    assert bool(re.search(r"rate\(|increase\(", target["expr"])) == (metric.kind == "counter")
    assert PANELS[title]["description"] == metric.help


def test_panels_have_places_and_numbers_of_their_own():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"]) == len(METRICS) + 2
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24


def test_prometheus_scrapes_a_port_that_the_nodes_have():
    monitor = yaml.safe_load((GRAFANA / "pod_monitor.yaml").read_text(encoding="utf-8"))
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    spec = one(build(KUBERAY / "raycluster"), "RayCluster")["spec"]
    for node in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        ports = {port["name"] for port in node["template"]["spec"]["containers"][0]["ports"]}
        assert endpoint["port"] in ports
