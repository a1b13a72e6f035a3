"""Alerts and dashboard are valid to promtool, fire when they should, and ask for what our /metrics really have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from testkit.harness import ROOT, free_port, http_request, said
from testkit.needed import tool
from testkit.system import System

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "faashound.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
VARIABLES = {"$__rate_interval": "5m", "$function": ".*"}
OURS = re.compile(r"\b(?:gateway|worker)_[a-z_]+\b")
LABELS = re.compile(r"by \(([a-z_, ]+)\)|[{,]([a-z_]+)=")
OF_PROMETHEUS = {"job", "instance"}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DASHBOARD["panels"]
    return found


def shown_expressions() -> list[str]:
    found = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    for name, value in VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in ALERTS for rule in group["rules"]]


@pytest.fixture(scope="module")
def samples() -> Iterator[list[tuple[str, set[str]]]]:
    """The names and labels of all that a gateway and its worker tell once all has happened that can."""
    ports = {"metrics_port": str(free_port()), "worker_metrics_port": str(free_port()), "callback_retry_attempts": "1"}
    with System(
        '[cat]\nfprocess = "cat"\n[broken]\nfprocess = "false"', {**ports, "max_retry_attempts": "1"}
    ) as system:
        for function in ("cat", "broken"):
            system.request("POST", f"/function/{function}", b"x")
            system.ended(system.submit(function, b"x"))
        system.submit("cat", b"x", {"X-Delay": "1h"})
        lost = system.submit("cat", b"x", {"X-Callback-Url": f"http://127.0.0.1:{free_port()}/"})
        system.until(lost, lambda status: status.get("callback", {}).get("state") == "dead")
        texts = [http_request(int(port), "GET", "/metrics").text for name, port in ports.items() if "port" in name]
        families = [family for text in texts for family in text_string_to_metric_families(text)]
        yield [(sample.name, set(sample.labels)) for family in families for sample in family.samples]


@pytest.mark.parametrize("command", [("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml")])
def test_promtool_accepts_what_prometheus_is_given(command: tuple[str, ...]) -> None:
    said([tool("promtool"), *command[:2], str(PROMETHEUS / command[2])])


def test_alerts_fire_when_they_should_and_not_else() -> None:
    said([tool("promtool"), "test", "rules", str(PROMETHEUS / "alerts.test.yml")])


@pytest.mark.parametrize(
    ("queued_count", "running_count", "workers_count"),
    [
        pytest.param(640, 0, 0, id="delayed calls alone"),
        pytest.param(640, 8, 0.5, id="delayed calls, and few others"),
        pytest.param(640, 64, 4, id="two workers have all that they may have"),
        pytest.param(640, 256, 16, id="and eight have"),
        pytest.param(8, 64, 2.25, id="little waits"),
    ],
)
def test_workers_are_scaled_by_what_waits_but_to_twice_what_is_busy_at_most(
    tmp_path: Path, queued_count: int, running_count: int, workers_count: float
) -> None:
    scaled = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "scaling" / "worker.yaml").read_text(encoding="utf-8"))
    asked = scaled["spec"]["triggers"][0]["metadata"]
    counts = {"queued": queued_count, "running": running_count}
    series = [
        {"series": f'gateway_queue_calls{{instance="{each}", state="{state}"}}', "values": count}
        for state, count in counts.items()
        for each in "ab"
    ]
    wanted = {
        "expr": asked["query"],
        "eval_time": "1m",
        "exp_samples": [{"value": workers_count * int(asked["threshold"])}],
    }
    path = tmp_path / "scaling.test.yml"
    path.write_text(yaml.safe_dump({"tests": [{"input_series": series, "promql_expr_test": [wanted]}]}))
    said([tool("promtool"), "test", "rules", str(path)])


def test_every_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    for rule in (rule for group in ALERTS for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("warning", "critical"), rule
        assert {"summary", "description"} <= set(rule["annotations"]), rule


def test_promtool_understands_what_the_dashboard_asks(tmp_path: Path) -> None:
    rules = [{"record": f"shown:{number}", "expr": expr} for number, expr in enumerate(shown_expressions())]
    path = tmp_path / "shown.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
    said([tool("promtool"), "check", "rules", str(path)])


@pytest.mark.parametrize("expression", [*alert_expressions(), *shown_expressions()])
def test_expression_asks_for_names_and_labels_that_metrics_have(
    samples: list[tuple[str, set[str]]], expression: str
) -> None:
    names, known = set(OURS.findall(expression)), {name for name, _ in samples}
    assert names or expression.startswith("up{"), expression
    assert names <= known, names - known
    labels = {word.strip() for pair in LABELS.findall(expression) for part in pair for word in part.split(",") if part}
    assert labels - OF_PROMETHEUS <= {label for name, found in samples if name in names for label in found}


def test_dashboard_has_panels_of_one_place_and_one_name_each() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for panel in panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    for panel in panels():
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["fieldConfig"]["defaults"]["unit"]
