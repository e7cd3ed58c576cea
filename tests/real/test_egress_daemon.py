"""An egress from the commands of a real daemon to the packets of a real clone."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from templated.bench.egress import ROUNDS
from tests.real.egress_rig import NEEDS, Rig, Sink
from tests.real.harness import ROOT, Daemon
from tests.real.prometheus import OF_A_BRIDGE, Prometheus, concrete, free_port
from tests.real.prometheus import until as eventually
from tests.unit.observability import expressions

pytestmark = NEEDS
FIXED = "172.20.0.100"
CREATE = (
    *("egress", "create", "acme", "--interface", "vpc0", "--address", f"{FIXED}/16"),
    *("--gateway", "172.20.0.1", "--to", "172.20.0.0/16"),
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, clones=False)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def bridged(fresh: Daemon, rig: Rig) -> Daemon:
    """A daemon whose network is the rig's host; it ends before the rig goes."""
    fresh.config["network"] = {"mode": "bridge", "netns": rig.host.name}
    fresh.config["metrics"] = {"listen": f"127.0.0.1:{free_port()}"}
    fresh.start()
    return fresh


def until(daemon: Daemon, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The view of acme once `what` holds of it."""
    deadline = time.monotonic() + 20
    while not what(view := daemon.json("egress", "show", "acme")):
        assert time.monotonic() < deadline, view
        time.sleep(0.1)
    return dict(view)


def both(view: dict[str, Any]) -> bool:
    return sorted(one["role"] for one in view["forwarders"]) == ["active", "standby"]


def test_commands_and_restarts(bridged: Daemon, rig: Rig) -> None:
    """Made and shown by commands; killed and started again, a daemon adopts what runs."""
    before = rig.shown()
    made = bridged.json(*CREATE)
    assert (made["state"], made["active"], made["problem"]) == ("active", 1, "")
    assert "acme" in bridged.cli("egress", "ls") and FIXED in bridged.cli("egress", "show", "acme")
    assert bridged.cli("-q", "egress", "ls") == "acme\n"
    assert "already" in bridged.fails(*CREATE)
    assert "interface eth9" in bridged.fails(
        *("egress", "create", "other", "--interface", "eth9", "--address", "172.21.0.9/16"),
        *("--gateway", "172.21.0.1", "--to", "172.21.0.0/16"),
    )
    assert "172.20.0.0" in bridged.fails(
        *("egress", "create", "other", "--interface", "vpc0", "--address", "172.20.0.0/16"),
        *("--gateway", "172.20.0.1", "--internet"),
    )
    assert bridged.json("egress", "switch", "acme")["active"] == 2
    pids = {one["pid"] for one in until(bridged, both)["forwarders"]}
    bridged.stop(signal.SIGKILL)
    bridged.start()
    view = until(bridged, both)
    assert view["active"] == 2 and {one["pid"] for one in view["forwarders"]} == pids
    bridged.cli("egress", "rm", "acme")
    assert "no egress acme" in bridged.fails("egress", "rm", "acme")
    assert bridged.json("egress", "ls") == []
    assert rig.shown() == before
    assert list((bridged.places / "run/egress").iterdir()) == []


def test_a_clone_by_an_egress(bridged: Daemon, rig: Rig) -> None:
    """Its flows go on, under the fixed address, while forwarders switch and the daemon dies.

    Each panel of the dashboard about networks and egresses has data then.
    """
    bridged.variant("out", "network: {egress: acme}")
    assert "no egress acme" in bridged.fails("template", "build", "out")
    before = rig.shown()
    bridged.cli(*CREATE)
    bridged.build("out")
    bridged.cli("clone", "c", "--template", "out")
    assert "the policy of out" in bridged.fails("egress", "rm", "acme")
    listen = bridged.config["metrics"]["listen"]
    with (
        contextlib.closing(Sink(rig)) as sink,
        contextlib.closing(Prometheus(listen)) as prometheus,
    ):
        bridged.cli("cp", str(ROOT / "templated/bench/flows.py"), "c:/root/flows.py")
        send = "python3 /root/flows.py send 172.20.0.1 9000 20 8 >/root/told 2>&1 </dev/null &"
        bridged.cli("exec", "c", "--", "sh", "-c", f"setsid {send}")
        time.sleep(1)
        bridged.stop(signal.SIGKILL)
        bridged.start()
        until(bridged, both)
        assert bridged.json("egress", "switch", "acme")["active"] == 2
        lines: list[str] = []
        deadline = time.monotonic() + 60
        while len(lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
            lines = bridged.output("c", "cat", "/root/told").splitlines()
        lost, _, sources = sink.result(json.loads(lines[1])["sent"])
        assert (lost, sources) == (0, {FIXED})
        _have_data(prometheus)
    assert "172.20.0.100" not in bridged.guest("c", _connect("172.20.0.1", 22))
    bridged.cli("rm", "c")
    bridged.cli("template", "rm", "out")
    bridged.cli("egress", "rm", "acme")
    assert rig.shown() == before


def _have_data(prometheus: Prometheus) -> None:
    """What a daemon in user mode has no data for; see test_observability.py."""
    asked = [(where, concrete(one)) for where, one in expressions() if OF_A_BRIDGE.search(one)]
    assert len(asked) > 10
    prometheus.wait()
    for where, one in asked:
        eventually(partial(prometheus.has, one), f"no data: {where}: {one}", 30)


@pytest.mark.long
def test_bench(host: Daemon) -> None:
    """Nothing is lost, and nothing is of a wrong source, also of clones that send as they start."""
    few = ("--flows", "20", "--rounds", "1", "--seconds", "4", "--pairs", "1", "--clones", "6")
    report = host.json("bench", "egress", *few)
    assert sum(report["clones"]["paths"].values()) == 6 <= report["clones"]["packets"]
    assert report["wrong_sources"] == 0 < report["packets_seen"]
    assert all(report[key]["flows_lost"] == 0 for key in ROUNDS)


def _connect(address: str, port: int) -> str:
    return f"import socket; print(socket.socket().connect_ex(('{address}', {port})))"
