"""The Grafana dashboard: as Grafana wants it, and made of what is measured."""

from __future__ import annotations

import itertools
import re

import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from cluster.gauges import OF_RUN, OF_WORKER
from tests.cluster.dashboard import dashboard, expressions, names_in, panels

OURS = {f"ray_robustscale_{name}" for name in (*OF_WORKER, *OF_RUN)}


@pytest.mark.parametrize(
    "expression, names",
    [
        ('max by (run, rank) (a_b{run=~"$run"})', {"a_b"}),
        ("60 * clamp_min(max by (run) (deriv(a[2m])), 0) - b", {"a", "b"}),
    ],
)
def test_names_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert names_in(expression) == names


def test_it_shows_all_that_is_measured_and_nothing_else() -> None:
    shown = {name for expression in expressions() for name in names_in(expression)}
    assert {name for name in shown if name.startswith("ray_robustscale_")} == OURS
    assert {name.removeprefix("ray_") for name in shown - OURS} <= set(METRICS_GAUGES)


def test_a_run_is_chosen_by_name_and_a_prometheus_by_its_own() -> None:
    variables = {v["name"]: v for v in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "session"}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for name in ("run", "session"):
        query = variables[name]["query"]["query"]
        assert (found := re.fullmatch(r"label_values\(([a-z_]+), (\w+)\)", query)), query
        assert found[1] in OURS if name == "run" else found[1].removeprefix("ray_") in METRICS_GAUGES
    for expression in expressions():
        for metric, selector in re.findall(r"(ray_[a-z_]+)(\{[^}]*\})?", expression):
            assert selector == ('{run=~"$run"}' if metric in OURS else '{SessionName=~"$session"}'), expression
    sources = [
        part["datasource"] for panel in panels() for part in (panel, *panel.get("targets", [])) if "expr" in part
    ]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_the_layout_is_one_that_grafana_keeps() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36 and re.fullmatch("[a-zA-Z0-9_-]{1,40}", board["uid"]) and "id" not in board
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert [p["title"] for p in panels() if p["type"] == "row"] == ["Training", "Throughput", "Health", "Cluster"]
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["w"] > 0 and at["h"] > 0, panel["title"]
    for one, other in itertools.combinations((panel["gridPos"] for panel in panels()), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_every_panel_says_what_it_shows() -> None:
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = re.match(r"[^a-z]*(?:60 \* clamp_min\()?\w+ by \(([^)]*)\)", target["expr"])
            assert kept and labels == set(kept[1].split(", ")), target["expr"]
