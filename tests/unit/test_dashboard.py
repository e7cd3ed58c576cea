"""The dashboard, the alerts and their examples: complete, and about metrics that exist."""

from __future__ import annotations

import itertools
import re
import subprocess
from typing import Any

import click
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from templated.cli.main import root
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.reports.metrics import Metrics
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.upkeep.host_metrics import HostMetrics
from templated.services.upkeep.nets import PolicyMetrics
from tests.unit.observability import (
    ALERTS_TEST,
    OBSERVABILITY,
    dashboard,
    expressions,
    metrics_of,
    panels,
    rules,
)

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# The units of Grafana that are used: https://grafana.com/docs/grafana (standard options).
UNITS = {"s", "bytes", "percentunit", "ops", "short", "none"}


def served() -> set[str]:
    """Names of all series that the daemon can have, and those of Prometheus itself."""
    metrics = Metrics()
    HostMetrics(metrics.registry)
    FunctionMetrics(metrics.registry)
    ScalingMetrics(metrics.registry)
    PolicyMetrics(metrics.registry)
    EgressMetrics(metrics.registry)
    names = {"up"}
    for collector in metrics.registry._collector_to_names:
        if isinstance(collector, MetricWrapperBase):
            kind, name = str(collector._type), collector._name
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
            names |= {name + ending for ending in endings.get(kind, ("",))}
    return names | {s.name for family in metrics.registry.collect() for s in family.samples}


def test_every_metric_that_is_asked_for_exists() -> None:
    """In panels and in alerts."""
    asked = [expression for _, expression in expressions()] + [rule["expr"] for rule in rules()]
    assert set().union(*map(metrics_of, asked)) <= served()


def test_every_metric_is_shown() -> None:
    """What nobody looks at need not be measured."""
    shown = set().union(*(metrics_of(expression) for _, expression in expressions()))
    shown |= {name.rsplit("_", 1)[0] for name in shown}
    variables = str(dashboard()["templating"])
    known = {name.removesuffix("_bucket") for name in served() if name.startswith("templated_")}
    # Only a limit to be alerted of, and the version.
    known -= {"templated_clones_limit"}
    missing = {n for n in known if not n.endswith(("_sum", "_count")) and n not in shown}
    assert {name for name in missing if name not in variables} == set()


# The dashboard


def test_what_provisioning_needs() -> None:
    """A stable uid, no id of one installation, a schema that Grafana knows."""
    found = dashboard()
    assert found["uid"] == "templated" and found["id"] is None
    assert 36 <= found["schemaVersion"] <= 41
    assert found["title"] == "templated" and found["time"] and found["refresh"]


def test_variables() -> None:
    """The data source is one, and all others ask it; each is used."""
    source, *others = dashboard()["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    text = " ".join(expression for _, expression in expressions())
    for variable in others:
        assert variable["datasource"] == DATASOURCE and variable["includeAll"]
        assert metrics_of(variable["query"]["query"]) <= served()
        assert f"${variable['name']}" in text
    assert {v["name"] for v in others} == {"job", "instance", "template", "function"}


def test_ids_are_unique() -> None:
    """Of panels, and of the queries in each."""
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panel(panel: dict[str, Any]) -> None:
    """It says what it is, in which unit, and asks the data source that was chosen."""
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == DATASOURCE
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["legendFormat"] or panel["type"] == "table"
        assert target.get("instant", False) != target["range"]
        # Of one host out of several, and of one template where there are such.
        assert "$instance" in target["expr"]
        of_functions = re.search(
            r"templated_(invocation|function|instances|scaling_(desired|kept|ready))",
            target["expr"],
        )
        assert ("$function" in target["expr"]) == bool(of_functions)


def test_start_latency_has_its_line() -> None:
    """100 ms."""
    panel = next(p for p in panels() if p["title"] == "Start latency by path")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["custom"]["thresholdsStyle"] == {"mode": "line"}
    assert [step["value"] for step in defaults["thresholds"]["steps"]] == [None, 0.1]


def test_panels_do_not_overlap() -> None:
    """And none stands out of the grid, which is 24 wide."""
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        assert place["w"] > 0 and place["h"] > 0
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_provisioning_files() -> None:
    """They are YAML, and the folder is where the README puts the dashboard."""
    folder = OBSERVABILITY / "grafana/provisioning"
    provider = yaml.safe_load((folder / "dashboards/templated.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] in (OBSERVABILITY / "README.md").read_text()
    source = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["type"] == "prometheus"


# Alerts


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alert(rule: dict[str, Any]) -> None:
    """It says what is wrong and what to do, by steps that have commands."""
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    steps = notes["runbook"].splitlines()
    assert steps[0].startswith("1. ") and "`" in notes["runbook"]
    assert "\n" not in notes["summary"]
    # Where there is an instance, it is named.
    assert "$labels.instance" in notes["summary"] or rule["alert"] == "TemplatedAbsent"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_commands_of_runbooks_exist(rule: dict[str, Any]) -> None:
    """With the options that are given."""
    for line in re.findall(r"`templated ([^`|]+)", rule["annotations"]["runbook"]):
        words = line.split()
        command = find(words)
        known = {option for parameter in command.params for option in parameter.opts}
        known |= {"--follow", "--no-follow"} if words[0] == "events" else set()
        assert {word for word in words if word.startswith("-")} <= known, line


def find(words: list[str]) -> click.Command:
    """The command that a line begins with."""
    context = click.Context(root)
    command: click.Command | None = root.get_command(context, words[0])
    if isinstance(command, click.Group):
        command = command.get_command(context, words[1])
    assert command is not None, words
    return command


def test_every_alert_is_tested() -> None:
    """That it fires, and that it does not."""
    by_name: dict[str, list[list[Any]]] = {}
    for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"]:
        for check in test["promql_expr_test"]:
            assert f'alertname="{test["name"]}"' in check["expr"]
            by_name.setdefault(test["name"], []).append(check["exp_samples"])
        series = [entry["series"] for entry in test["input_series"]]
        # Those of `good` are there in the same number, and must not fire.
        bad = [s.replace('"bad"', '"good"') for s in series if '"bad"' in s]
        assert set(bad) <= set(series)
    assert set(by_name) == {rule["alert"] for rule in rules()}
    assert all(any(samples) for samples in by_name.values())


def test_alerts_fire_when_they_should() -> None:
    """As promtool evaluates them."""
    done = subprocess.run(
        ["promtool", "test", "rules", ALERTS_TEST], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize(("kind", "name"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_accepts(kind: str, name: str) -> None:
    """The example configuration, and the rules."""
    command = ["promtool", "check", kind, str(OBSERVABILITY / name)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
