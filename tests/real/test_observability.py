"""Dashboard, alert rules and metrics together: a real Prometheus scrapes a daemon with real clones.

Grafana itself is not in Debian. Its dashboard is held to the form by a unit test, and what it would
ask is asked here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.host.procfs import mapped_bytes
from tests.real.conftest import prepare
from tests.real.harness import Daemon
from tests.real.prometheus import OF_A_BRIDGE, Prometheus, concrete, free_port, until
from tests.unit.observability import expressions, metrics_of, rules

pytestmark = pytest.mark.real

# What is legitimately empty on a healthy host, by the panel's title, and why.
EMPTY = {
    "Daemon starts": "the daemon was not restarted",
}
INVOCATIONS = "templated_invocations_total"
FUNCTION = """
import os


def handler(event, context):
    if event == "leave":
        os._exit(3)
    return event
"""
PSI = Path("/proc/pressure/cpu").exists()
# Of series that the pools make; those of `expect` are there from the beginning.
FROM_POOLS = re.compile(r"templated_pool_(size|target|refill_seconds|refill_blocked)|path=\"warm\"")


@pytest.fixture(scope="module")
def busy(image_store: Path) -> Iterator[Daemon]:
    """A daemon where everything happens: starts by two paths, a dead clone, a failed build, a
    function.

    Its template is to have pools of one VM per tier.
    """
    daemon = prepare(Daemon(metrics={"listen": f"127.0.0.1:{free_port()}"}), image_store)
    try:
        daemon.variant("pooled", "pool: {standby: 1, warm: 1}")
        daemon.variant("broken", without_probes=True)
        text = (daemon.templates / "broken.yaml").read_text()
        never = "probes: [{name: never, type: tcp, port: 9, timeout: 100ms}]\n"
        daemon.template("broken", text + never)
        daemon.start()
        daemon.build("pooled")
        daemon.fails("template", "build", "broken")
        code = daemon.places / "code"
        code.mkdir()
        (code / "app.py").write_text(FUNCTION)
        words = ("--code", str(code), "--handler", "app.handler", "--template", "pooled")
        daemon.cli("function", "deploy", "hello", *words)
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def prometheus(busy: Daemon) -> Iterator[Prometheus]:
    """Prometheus, once it has seen starts before and after its first scrape."""
    found = Prometheus(busy.config["metrics"]["listen"])
    try:
        found.wait()
        busy.json("clone", "first", "--path", "direct", "--template", "pooled")
        busy.json("clone", "full", "--path", "cold", "--template", "pooled")
        busy.json("clone", "victim", "--path", "direct", "--template", "pooled")
        count = "templated_clone_seconds_count"
        until(lambda: len(found.query(f'{count}{{path=~"direct|cold"}}')) == 2, found.log)
        assert busy.run("invoke", "hello", "--payload", '"leave"').returncode
        # A rate needs a second value of each.
        os.kill(busy.json("show", "victim")["pid"], signal.SIGKILL)
        busy.json("clone", "second", "--path", "direct", "--template", "pooled")
        busy.json("clone", "again", "--path", "cold", "--template", "pooled")
        until(lambda: found.has(f'rate({count}{{path="cold"}}[2m]) > 0'), found.log)
        assert busy.json("invoke", "hello", "--payload", "1")["payload"] == 1
        until(lambda: found.has(f"sum({INVOCATIONS}) == 2"), found.log)
        until(lambda: found.has(f"rate({INVOCATIONS}[2m]) > 0"), found.log)
        until(lambda: found.has('templated_clones{state="dead"} == 1'), found.log)
        until(lambda: found.has("templated_clone_memory_bytes"), found.log)
        until(lambda: found.has("rate(templated_clone_cpu_seconds_total[2m])"), found.log)
        yield found
    finally:
        found.close()


def test_rules_are_loaded_and_evaluated(prometheus: Prometheus) -> None:
    """All of them, without an error."""

    def health() -> dict[str, str]:
        groups = prometheus.ask("rules")["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    until(lambda: set(health().values()) == {"ok"}, str(health()))
    assert set(health()) == {rule["alert"] for rule in rules()}


def test_what_was_provoked_is_on_its_way_to_an_alert(prometheus: Prometheus) -> None:
    """A failed build fires at once; a dead clone waits its time. Texts are filled in."""

    def alerts() -> dict[str, dict[str, Any]]:
        return {a["labels"]["alertname"]: a for a in prometheus.ask("alerts")["data"]["alerts"]}

    until(lambda: {"TemplatedBuildFailed", "TemplatedDeadClones"} <= set(alerts()), str(alerts()))
    found = alerts()
    assert found["TemplatedBuildFailed"]["state"] == "firing"
    assert found["TemplatedBuildFailed"]["labels"]["reason"] == "probe_failed"
    assert found["TemplatedDeadClones"]["state"] == "pending"
    assert "TemplatedDown" not in found and "TemplatedAbsent" not in found
    for alert in found.values():
        texts = alert["annotations"].values()
        assert not [text for text in texts if "error" in text and "<" in text], alert


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_panel_has_data(prometheus: Prometheus, where: str, expression: str) -> None:
    """Each expression is understood, and gives a number."""
    asked = concrete(expression)
    prometheus.query(asked)
    if where in EMPTY or OF_A_BRIDGE.search(expression) or FROM_POOLS.search(expression):
        return  # understood; data about pools is the matter of a test below
    if "pressure" in expression and not PSI:
        return
    until(lambda: prometheus.has(asked), f"no data: {where}: {asked}", 30)


def test_every_metric_of_a_rule_is_there(prometheus: Prometheus) -> None:
    """A rule on a metric that nobody has would never fire."""
    names = set().union(*(metrics_of(rule["expr"]) for rule in rules()))
    assert names
    for name in sorted(names):
        if OF_A_BRIDGE.match(name) or FROM_POOLS.search(name):
            continue
        if name.startswith("templated_host_pressure") and not PSI:
            continue
        until(partial(prometheus.query, name), f"nobody has {name}", 30)


def test_pools_have_data(busy: Daemon, prometheus: Prometheus) -> None:
    """Once they have been filled, and a start has taken a VM from them."""
    until(lambda: filled(busy), "the pools were not filled", 120)
    busy.json("clone", "warm", "--path", "warm", "--template", "pooled")
    until(lambda: filled(busy), "the pools were not filled again", 120)
    until(lambda: prometheus.has('templated_clone_seconds_count{path="warm"}'), "no warm start")
    busy.json("clone", "warmer", "--path", "warm", "--template", "pooled")
    for where, expression in expressions():
        if FROM_POOLS.search(expression):
            asked = concrete(expression)
            until(partial(prometheus.has, asked), f"no data: {where}: {asked}", 60)
    for tier in ("standby", "warm"):
        labels = f'{{template="pooled",state="{tier}"}}'
        until(partial(prometheus.has, f"templated_clone_memory_bytes{labels}"), f"memory of {tier}")


def filled(daemon: Daemon) -> bool:
    """Whether each tier of each pool has what it is to have."""
    command = ["curl", "-s", "--unix-socket", str(daemon.socket), "http://x/v1/pools"]
    text = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout
    pools = [pool for pool in json.loads(text) if pool["template"] == "pooled"]
    tiers = [pool[tier] for pool in pools for tier in ("standby", "warm")]
    return bool(tiers) and all(tier["ready"] == tier["target"] == 1 for tier in tiers)


def test_promtool_has_nothing_to_say_about_the_metrics(busy: Daemon) -> None:
    """Names, units and types are as Prometheus wants them."""
    command = ["curl", "-s", "--unix-socket", str(busy.socket), "http://x/metrics"]
    text = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout
    lint = ["promtool", "check", "metrics"]
    done = subprocess.run(lint, input=text, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_top(busy: Daemon, prometheus: Prometheus) -> None:
    """One frame of `templated top` tells the same as the API and Prometheus."""
    frame = busy.json("top", "--once")
    starts = {(s["template"], s["path"]): s for s in frame["starts"]}
    direct = starts["pooled", "direct"]
    # Three clones, and instances of the function.
    (series,) = prometheus.query('templated_clone_seconds_count{path="direct"}')
    assert direct["count"] == float(series["value"][1]) >= 3
    assert direct["p50_ms"] <= direct["p99_ms"]
    (series,) = prometheus.query(
        'histogram_quantile(0.5, sum by (le) (templated_clone_seconds_bucket{path="direct"}))'
    )
    assert direct["p50_ms"] == pytest.approx(float(series["value"][1]) * 1000, abs=0.01)
    running = {clone["name"] for clone in busy.json("ls") if clone["state"] == "running"}
    assert {clone["name"] for clone in frame["biggest"]} <= running
    assert all(clone["memory_bytes"] > 1 << 20 for clone in frame["biggest"])
    assert {"template": "pooled", "state": "dead", "count": 1} in frame["clones"]
    (function,) = frame["functions"]
    assert (function["function"], function["count"], function["failed"]) == ("hello", 2, 1)
    # The second instance may have been started ahead of its request.
    assert 1 <= function["cold_starts"] <= 2 and sum(function["instances"].values()) == 1
    assert any(event["type"] == "clone.dead" for event in frame["events"])
    (pool,) = (pool for pool in frame["pools"] if pool["template"] == "pooled")
    assert pool["standby"]["target"] == pool["warm"]["target"] == 1
    text = busy.cli("top", "--once")
    assert "pooled" in text and "clone." in text and "\x1b" not in text


def test_memory_of_clones_is_what_the_kernel_says(busy: Daemon, prometheus: Prometheus) -> None:
    """The mean is between the smallest and the biggest; the template's memory counts once."""
    pids = [clone["pid"] for clone in busy.json("ls") if clone["state"] == "running"]
    pss = [m.proportional if (m := mapped_bytes(pid)) else 0 for pid in pids]
    state = '{state="running"}'
    until(
        lambda: prometheus.has(f"templated_clone_memory_measured{state} == {len(pss)}"),
        "not all clones were measured",
    )
    sums = f"templated_clone_memory_bytes{state} / templated_clone_memory_measured{state}"
    (series,) = prometheus.query(sums)
    assert min(pss) / 2 < float(series["value"][1]) < max(pss) * 2
