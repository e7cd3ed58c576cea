"""A part of `bench egress`: lanes that come and go under flows, and what two of them carry."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from templated.bench.netrig import Flows, Rig, poured, run, spec
from templated.bench.stats import summarize
from templated.client import Client
from templated.errors import Timeout
from templated.model.egress import EgressView, LaneState, Role

QUIET = "5s"
"""`egress.quiet` of the bench's daemon."""
DRAIN = "5m"
MOST = 3
_NAME = "lanes"
_BANDWIDTH = "256KiB"
"""Of a lane: 200 flows that send every 0.2 s need less than one, and `_LOAD` more than three."""
_EVERY = 0.2
_LOAD = 500
_LOADED = 12.0
_SECONDS = 45.0
_WITHIN = 60.0
_PORT = 9100
_TIME_WAIT = "net.netfilter.nf_conntrack_tcp_timeout_time_wait"


def measure_lanes(
    rig: Rig, client: Client, pairs: int, seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """1, 3 and 1 lanes under flows that go on; and bulk flows by two lanes, in turn with one.

    Raises HostError or Timeout; no egress of it is left then.
    """
    return {
        "scaling": _scaling(rig, client, progress),
        "lanes_throughput": _throughput(rig, client, pairs, seconds, progress),
    }


@contextlib.contextmanager
def _egress(rig: Rig, client: Client, **more: object) -> Iterator[EgressView]:
    view = client.create_egress(spec(_NAME) | more)
    try:
        rig.mark(view.mark)
        yield view
    finally:
        with contextlib.suppress(Exception):
            client.remove_egress(_NAME)


def _scaling(rig: Rig, client: Client, progress: Callable[[str], None]) -> dict[str, Any]:
    """Half of the flows begin in one lane, and half in three."""
    with _egress(rig, client, max=MOST, bandwidth=_BANDWIDTH), contextlib.ExitStack() as running:
        progress(f"1 to {MOST} lanes")
        groups = [_flows(running, rig, 100, _SECONDS, _PORT, _EVERY)]
        began = time.monotonic()
        load = _flows(running, rig, _LOAD, _LOADED, _PORT + 1)
        _until(client, lambda view: _serving(view) == MOST)
        grown = time.monotonic() - began
        groups.append(_flows(running, rig, 100, _SECONDS - grown, _PORT + 2, _EVERY))
        view = _until(client, lambda view: all(lane.flows > 0 for lane in view.lanes))
        for one in view.forwarders:
            # What has ended is tracked for two minutes otherwise, and a lane waits for that.
            run("nsenter", "-n", "-t", str(one.pid), "sysctl", "-qw", f"{_TIME_WAIT}=1")
        results = [load.result()]
        progress(f"{MOST} lanes to 1")
        view = _until(client, lambda view: _serving(view) == 1)
        kept = [lane.flows for lane in view.lanes]
        results += [group.result() for group in groups]
        _until(client, lambda view: len(view.lanes) == 1)
    silences = [1000 * one for _, some, _ in results[1:] for one in some]
    return {
        "flows": len(silences),
        "load": _LOAD,
        "grown_s": round(grown, 1),
        "flows_of_lanes": kept,
        "flows_lost": sum(lost for lost, _, _ in results),
        "sources": sorted(set[str]().union(*(seen for _, _, seen in results))),
        **summarize(silences).as_dict(),
    }


def _flows(
    running: contextlib.ExitStack, rig: Rig, number: int, seconds: float, port: int, *every: float
) -> Flows:
    flows = Flows(rig, number, seconds, port, *every)
    running.callback(flows.close)
    return flows


def _serving(view: EgressView) -> int:
    return sum(lane.state is LaneState.SERVING for lane in view.lanes)


def _until(client: Client, what: Callable[[EgressView], bool]) -> EgressView:
    deadline = time.monotonic() + _WITHIN
    while not what(view := client.show_egress(_NAME)):
        if time.monotonic() > deadline:
            raise Timeout(f"egress {_NAME} has {len(view.lanes)} lanes still: {view.problem}")
        time.sleep(0.1)
    return view


def _throughput(
    rig: Rig, client: Client, pairs: int, seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Bytes per second of two bulk flows together: by one forwarder, and by two."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for number in range(pairs):
        for lanes, rates in found.items():
            progress(f"throughput of {lanes} active forwarders: {number + 1}")
            with _egress(rig, client, min=lanes, max=lanes) as view:
                assert sum(one.role is Role.ACTIVE for one in view.forwarders) == lanes
                rates.append(poured(rig, seconds, 2))
    one, two = (statistics.median(found[lanes]) for lanes in (1, 2))
    return {
        "one_gbit": round(one * 8 / 1e9, 2),
        "two_gbit": round(two * 8 / 1e9, 2),
        "ratio": round(two / one, 3),
    }
