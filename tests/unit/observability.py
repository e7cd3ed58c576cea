"""What docs/observability holds, as the tests read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

OBSERVABILITY = Path(__file__).parents[2] / "docs/observability"
DASHBOARD = OBSERVABILITY / "grafana/templated.json"
ALERTS = OBSERVABILITY / "alerts.yml"
ALERTS_TEST = OBSERVABILITY / "alerts_test.yml"

_METRIC = re.compile(r"\b(?:(?:templated|process|python)_[a-z_]+|up)\b(?!\s*=)")


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    return dict(json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    """All panels but the rows' titles."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    """All alerts."""
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def expressions() -> list[tuple[str, str]]:
    """All that Grafana asks Prometheus, and for which panel."""
    found = [(p["title"], target["expr"]) for p in panels() for target in p["targets"]]
    found += [(a["name"], a["expr"]) for a in dashboard()["annotations"]["list"]]
    return found


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    return set(_METRIC.findall(expression))
