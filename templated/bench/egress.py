"""`bench egress`: failover, switch, restart and throughput of an egress, in namespaces of its own.

A daemon of the run's own makes the egress on a host that is a namespace. A clone is a namespace on
that daemon's bridge, and so no VM takes time from what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templated.bench.egress_clones import Source, measure_clones
from templated.bench.lanes import DRAIN, QUIET, measure_lanes
from templated.bench.netrig import (
    FIXED,
    LENGTH,
    NETWORK,
    SERVER,
    Flows,
    Rig,
    poured,
    program,
    run,
    spec,
)
from templated.bench.served import Served, served
from templated.bench.stats import summarize
from templated.client import Client
from templated.errors import Timeout
from templated.model.egress import EgressView, Role

ROUNDS = {
    "undisturbed": "nothing happens",
    "cut": "all links of the active one cut",
    "killed": "the active one killed",
    "switch": "planned switch",
    "daemon": "daemon killed and started again",
}
"""What is done to the flows, for people."""
_NAME = "bench"
_BY_HAND = "172.20.0.200"
_BEFORE = 1.5
"""Seconds for which flows run before something is done to them."""
_SETTLE = 30.0
_PORT = 9000


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    flows: int
    rounds: int
    """Of each way to lose the active forwarder, of switches and of restarts."""
    seconds: float
    """For which flows send in a round, and one bulk flow in a measurement of throughput."""
    pairs: int
    """Measurements of throughput, each way."""
    clones: int = 0
    """Clones that are started and ended, of `source`."""
    source: Source | None = None


@dataclass(frozen=True)
class _Bench:
    rig: Rig
    daemon: Served
    client: Client
    plan: Plan
    progress: Callable[[str], None]

    def view(self) -> EgressView:
        return self.client.show_egress(_NAME)

    def settled(self) -> EgressView:
        """The egress, once one forwarder is active and the other a standby."""
        deadline = time.monotonic() + _SETTLE
        while True:
            view = self.view()
            if {one.role for one in view.forwarders} == {Role.ACTIVE, Role.STANDBY}:
                return view
            if time.monotonic() > deadline:
                raise Timeout(f"egress {_NAME} does not settle: {view.problem}")
            time.sleep(0.1)


def measure_egress(plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """All figures of one run; see `goals`. Raises HostError, Timeout; leaves nothing then, too."""
    host = {"cpus": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    with Rig() as rig, _daemon(rig, plan.source) as (daemon, client):
        bench = _Bench(rig, daemon, client, plan, progress)
        rig.add_clone()
        rig.watch(_BY_HAND)
        began = time.perf_counter()
        view = _create(client)
        try:
            created = time.perf_counter() - began
            rig.mark(view.mark)
            report = {
                "kind": "egress",
                "flows": plan.flows,
                "create_s": round(created, 2),
                **{key: _rounds(bench, key, action) for key, action in _ACTIONS.items()},
                "throughput": _throughput(bench),
                "churn": _churn(bench),
                **_cloned(bench),
                "host": host,
            }
            client.remove_egress(_NAME)
            report |= measure_lanes(rig, client, plan.pairs, plan.seconds, progress)
            return report | {"packets_seen": rig.right(), "wrong_sources": rig.wrong()}
        finally:
            with contextlib.suppress(Exception):
                client.remove_egress(_NAME)


@contextlib.contextmanager
def _daemon(rig: Rig, source: Source | None) -> Iterator[tuple[Served, Client]]:
    with (
        tempfile.TemporaryDirectory(prefix="tb.", dir="/tmp") as name,
        tempfile.TemporaryDirectory(prefix="templated-bench.", dir="/dev/shm") as shm,
    ):
        places = Path(name)
        config = {
            "state_dir": f"{name}/state",
            "runtime_dir": f"{name}/run",
            "shm_dir": shm,
            "template_dirs": [f"{name}/templates"],
            "socket": f"{name}/run/socket",
            "metrics": None,
            "gateway": None,
            "accel": "tcg" if source is None else source.accel,
            "network": {"mode": "bridge", "netns": rig.host.name},
            "egress": {"quiet": QUIET, "drain": DRAIN},
            # Pools are filled whatever else this host does.
            "pools": {"pressure": {"cpu": 100, "memory": 100, "io": 100}},
        }
        (places / "templates").mkdir()
        if source is not None:  # the images are the other daemon's
            (places / "state").mkdir(mode=0o700)
            (places / "state/images").symlink_to(source.state_dir / "images")
        (places / "config").write_text(json.dumps(config))  # JSON is YAML
        client = Client(str(places / "run/socket"))
        with served(client, places / "config") as daemon:
            yield daemon, client


def _create(client: Client) -> EgressView:
    return client.create_egress(spec(_NAME))


def _rounds(bench: _Bench, key: str, action: Callable[[_Bench, EgressView], None]) -> Any:
    """The flows' longest silences over all rounds, in milliseconds, and what they lost."""
    silences: list[float] = []
    lost, sources = 0, set[str]()
    for number in range(bench.plan.rounds):
        bench.progress(f"{ROUNDS[key]}: round {number + 1} of {bench.plan.rounds}")
        view = bench.settled()
        flows = Flows(bench.rig, bench.plan.flows, bench.plan.seconds, _PORT + number)
        try:
            time.sleep(_BEFORE)
            action(bench, view)
            gone, some, seen = flows.result()
        finally:
            flows.close()
        lost += gone
        sources |= seen
        silences += some
        _mend(bench)
    return {
        "rounds": bench.plan.rounds,
        "flows_lost": lost,
        "sources": sorted(sources),
        **summarize([1000 * silence for silence in silences]).as_dict(),
    }


def _cut(bench: _Bench, view: EgressView) -> None:
    assert view.active is not None
    pid = view.forwarders[view.active - 1].pid
    links = json.loads(bench.rig.host.ip("-j", "link"))
    ports = [one["ifname"] for one in links if one["ifname"].endswith(f".{view.active}")]
    downs = "".join(f"link set {port} down\n" for port in ports)
    # All at once: one process inside the forwarder, and one outside that does the others.
    outside = bench.rig.host.start("ip", "-batch", "-", stdin=subprocess.PIPE)
    run("nsenter", "-n", "-t", str(pid), "ip", "link", "set", "out", "down")
    outside.communicate(downs.encode(), timeout=_SETTLE)


def _kill(bench: _Bench, view: EgressView) -> None:
    assert view.active is not None
    os.kill(view.forwarders[view.active - 1].pid, signal.SIGKILL)


def _switch(bench: _Bench, view: EgressView) -> None:
    bench.client.switch_egress(_NAME)


def _restart(bench: _Bench, view: EgressView) -> None:
    bench.daemon.kill()
    bench.daemon.restart()


_ACTIONS: dict[str, Callable[[_Bench, EgressView], None]] = {
    "undisturbed": lambda bench, view: None,
    "cut": _cut,
    "killed": _kill,
    "switch": _switch,
    "daemon": _restart,
}


def _mend(bench: _Bench) -> None:
    """A forwarder that was cut off is started again: that gives it new links."""
    for one in bench.view().forwarders:
        if one.role is Role.FAULT and one.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)


def _throughput(bench: _Bench) -> dict[str, Any]:
    """Bytes per second of one flow: by the egress, in turn with the same path made by hand."""
    view = bench.settled()
    found: dict[str, list[float]] = {"egress": [], "by_hand": []}
    with _made_by_hand(bench.rig) as mark:
        for number in range(bench.plan.pairs):
            for way, used in (("egress", view.mark), ("by_hand", mark)):
                bench.progress(f"throughput: {way.replace('_', ' ')} {number + 1}")
                bench.rig.mark(used)
                found[way].append(poured(bench.rig, bench.plan.seconds, 1))
        bench.rig.mark(view.mark)
    egress, by_hand = (statistics.median(found[way]) for way in ("egress", "by_hand"))
    return {
        "egress_gbit": round(egress * 8 / 1e9, 2),
        "by_hand_gbit": round(by_hand * 8 / 1e9, 2),
        "ratio": round(egress / by_hand, 3),
    }


@contextlib.contextmanager
def _made_by_hand(rig: Rig) -> Iterator[int]:
    """A namespace that routes and masquerades, and nothing else; the mark that leads to it."""
    mark, router = 77, rig.net("router")
    rig.join(router, "hand0", "in", "192.0.2.2/30")
    rig.host.ip("addr", "add", "192.0.2.1/30", "dev", "hand0")
    rig.host.ip(
        *("link", "add", "link", "vpc0", "name", "hand1", "type", "macvlan", "mode", "bridge")
    )
    rig.host.ip("link", "set", "hand1", "netns", router.name)
    router.ip("addr", "add", f"{_BY_HAND}/{LENGTH}", "dev", "hand1")
    router.ip("link", "set", "hand1", "up")
    router.ip("route", "add", "10.78.0.0/16", "via", "192.0.2.1")
    router.sysctl("ipv4/ip_forward", "1")
    router.run(
        "nft",
        "add table ip nat; add chain ip nat out { type nat hook postrouting priority srcnat; };"
        "add rule ip nat out oifname hand1 masquerade",
    )
    rig.host.ip("route", "add", NETWORK, "via", "192.0.2.2", "table", str(mark))
    rig.host.ip("rule", "add", "fwmark", str(mark), "table", str(mark))
    try:
        yield mark
    finally:
        rig.host.ip("rule", "del", "fwmark", str(mark))
        rig.host.ip("link", "del", "hand0")


def _churn(bench: _Bench) -> dict[str, Any]:
    """The egress is removed and made again while the clone goes on sending."""
    rig, rounds = bench.rig, bench.plan.rounds
    sender = rig.clone.start(*program("shout", SERVER, str(_PORT)))
    try:
        for number in range(rounds):
            bench.progress(f"removed and made again: round {number + 1} of {rounds}")
            bench.client.remove_egress(_NAME)
            rig.mark(_create(bench.client).mark)
    finally:
        sender.kill()
        sender.wait(_SETTLE)
    return {"rounds": rounds}


def _cloned(bench: _Bench) -> dict[str, Any]:
    """What came of the clones; nothing when none were asked for."""
    plan = bench.plan
    if plan.source is None or not plan.clones:
        return {}
    bench.rig.mark(None)
    made = measure_clones(bench.client, bench.rig, plan.source, _NAME, plan.clones, bench.progress)
    return {"clones": made}


def goals(report: Mapping[str, Any]) -> list[str]:
    """What of the report is not as it must be: a line each."""
    missed = []
    for key in (*ROUNDS, "scaling"):
        row = report[key]
        if row["flows_lost"] or row["sources"] != [FIXED]:
            missed.append(f"{key}: {row['flows_lost']} flows lost, sources {row['sources']}")
    for key in ("cut", "killed"):
        if report[key]["p99"] > 300:
            missed.append(f"{key}: p99 of the longest gaps is {report[key]['p99']} ms")
    if report["switch"]["max"] > 60:
        missed.append(f"switch: the longest gap is {report['switch']['max']} ms")
    if report["throughput"]["ratio"] < 0.85:
        missed.append(f"throughput: {report['throughput']['ratio']} of the path made by hand")
    carried = report["lanes_throughput"]["ratio"]
    if carried < 1.5 and report["host"]["cpus"] > 2:
        missed.append(f"throughput: two active forwarders have {carried} of one's")
    clones = report.get("clones", {"starts": 0, "packets": 0})
    if clones["packets"] < clones["starts"]:
        missed.append(f"{clones['starts']} clones sent {clones['packets']} packets only")
    if report["wrong_sources"]:
        missed.append(f"{report['wrong_sources']} packets had a wrong source")
    return missed
