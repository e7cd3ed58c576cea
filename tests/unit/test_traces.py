"""Trace ids: what is taken from a header, and which request made which."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.handlers
import pytest

from templated.scaling.chains import Agenda, Chains
from templated.services.functions.foreseen import Foreseen
from templated.services.functions.traces import MAX_HEADER, Caller, Span, Traces
from tests.unit.fake_instances import World, play, version
from tests.unit.function_guest import Caller as Host
from tests.unit.function_guest import Guest, calling, functions_in
from tests.unit.lambda_client import Gate, create, talk

TELLS = """
import os
def handler(event, context):
    return os.environ.get("_X_AMZN_TRACE_ID")
"""
ROOT = "1-5759e988-bd862e3fe1be46a994272793"
HEADER = re.compile(r"Root=1-[0-9a-f]{8}-[0-9a-f]{24};Parent=[0-9a-f]{16};Sampled=[01]")


def test_a_root_is_made_where_there_is_none() -> None:
    traces = Traces()
    spans = [traces.begin("a", "", 0.0) for _ in range(100)]
    assert all(HEADER.fullmatch(span.header) and span.caller is None for span in spans)
    assert len({span.root for span in spans}) == len({span.segment for span in spans}) == 100
    age = time.time() - int(spans[0].root.split("-")[1], 16)
    assert -2 < age < 60


@pytest.mark.parametrize(
    "header",
    [
        "x",
        "Root=1",
        "Root=",
        "=;=;;=",
        f"Root={ROOT.upper()}",
        f"Root={ROOT}0",
        f"Root={ROOT}\n",
        f"Root= {ROOT}",
        f"root={ROOT}",
        f"Root={ROOT};{'x' * MAX_HEADER}",
        "Root=1-5759e988-bd862e3fe1be46a99427279\xb2",
        "\0" * 100,
    ],
)
def test_garbage_is_ignored(header: str) -> None:
    span = Traces().begin("a", header, 0.0)
    assert HEADER.fullmatch(span.header) and ROOT not in span.header and span.caller is None


def test_only_what_is_known_is_passed_on() -> None:
    given = f"Self=1-67891234-abc; Root={ROOT};Parent=<script>;Sampled=1;Lineage=a:1;X=\r\nY: z"
    span = Traces().begin("a", given, 0.0)
    assert span.header == f"Root={ROOT};Parent={span.segment};Sampled=1"
    assert Traces().begin("a", f"Root={ROOT};Sampled=?", 0.0).sampled == "0"


def test_the_parent_is_who_called() -> None:
    traces = Traces()
    a = traces.begin("a", "", 0.0)
    b = traces.begin("b", a.header, 1.0)
    c = traces.begin("c", b.header, 2.0)
    assert b.caller == Caller("a", a.segment) and c.caller == Caller("b", b.segment)
    assert a.root == b.root == c.root and len({a.segment, b.segment, c.segment}) == 3
    # What a function has left behind comes later, as an event does.
    traces.end(a)
    assert traces.begin("d", a.header, 3.0).caller == Caller("a", a.segment)
    # A segment is one of its root.
    other = f"Root={ROOT};Parent={a.segment};Sampled=0"
    assert traces.begin("e", other, 3.0).caller is None


def test_a_segment_that_a_tracing_library_made() -> None:
    """It is of the function that runs with this root, where that is but one."""
    traces = Traces()
    outside = f"Root={ROOT};Parent=00000000000000aa;Sampled=0"
    a = traces.begin("a", outside, 0.0)
    inside = f"Root={ROOT};Parent=00000000000000bb;Sampled=0"
    b = traces.begin("b", inside, 1.0)
    assert a.caller is None and b.caller == Caller("a", a.segment)
    assert traces.begin("c", inside, 1.0).caller is None, "two may have made it"
    # Two requests of one client outside, one after the other began.
    traces = Traces()
    traces.begin("a", outside, 0.0)
    assert traces.begin("b", outside, 0.0).caller is None


def test_the_table_is_bounded_and_ages() -> None:
    traces = Traces(most=10, age=100.0)
    first = traces.begin("a", "", 0.0)
    kept = [traces.begin("a", "", 1.0) for _ in range(10)][-1]
    traces.end(first)
    assert traces.begin("b", first.header, 1.0).caller is None
    assert traces.begin("b", kept.header, 50.0).caller == Caller("a", kept.segment)
    # It is over: else its root alone would tell.
    traces.end(kept)
    traces.end(kept)
    assert traces.begin("b", kept.header.replace("Root=1", "Root=2"), 500.0).caller is None
    assert len(traces._spans) == 1


def test_a_clock_that_goes_back_makes_room() -> None:
    traces = Traces(most=10)
    for now in (1e6, 0.0, -1e6, 1e9):
        traces.begin("a", "", now)
        assert len(traces._spans) == 1


class Watcher:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None]] = []

    def arrived(self, span: Span) -> None:
        self._add("arrived", span)

    def began(self, span: Span, at: float) -> None:
        assert at >= span.arrived
        self._add("began", span)

    def ended(self, span: Span, at: float) -> None:
        assert at >= span.arrived
        self._add("ended", span)

    def _add(self, what: str, span: Span) -> None:
        self.seen.append((what, span.function, span.caller.function if span.caller else None))


@pytest.mark.usefixtures("no_blocking_calls")
def test_the_router_tells_of_each_request() -> None:
    async def scenario(world: World) -> None:
        watcher = Watcher()
        world.router.watchers.append(watcher)
        await world.ask(1)
        (order,) = world.made[0].vm.agent.orders
        assert [what for what, _, _ in watcher.seen] == ["arrived", "began", "ended"]
        await asyncio.gather(world.ask(2, trace=order.trace), world.ask(3))
        callers = [caller for what, _, caller in watcher.seen[3:] if what == "began"]
        assert sorted(callers, key=str) == [None, "f"]
        assert not world.router._traces._running

    play(scenario, version())


@pytest.mark.usefixtures("no_blocking_calls")
def test_what_requests_lead_to_is_foreseen() -> None:
    """Through the router: `f` calls `g`, and the second time that is known before."""

    async def scenario(world: World) -> None:
        chains, agenda = Chains(), Agenda()
        foreseen = Foreseen(chains, agenda, lambda function: 5.0)
        world.router.watchers.append(foreseen)
        horizon = time.perf_counter()
        for _ in range(3):
            await world.ask(1)
            order = world.made[0].vm.agent.orders[-1]
            await world.router.invoke("g", None, b"1", trace=order.trace)
            await asyncio.sleep(0)
        # The runs are over when so much time has passed.
        chains.began("f", horizon + 100)
        (edge,) = chains.edges()
        assert (edge.caller, edge.callee, edge.traced, edge.share) == ("f", "g", True, 1.0)
        await world.ask(1)
        await asyncio.sleep(0)
        wanted = agenda.wanted("g", time.perf_counter())
        assert wanted is not None and wanted.count == 1 and wanted.reason.startswith("f calls it")
        assert not foreseen._began

    play(scenario, version(), version("g"))


def test_the_gateway_takes_and_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As botocore sends it by itself, inside of a function."""

    def work(gate: Gate) -> None:
        create(gate.client())
        header = f"Root={ROOT};Parent=53995c3f42cd8ad8;Sampled=1"
        answer = gate.client().invoke(FunctionName="hello")
        monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "caller")
        monkeypatch.setenv("_X_AMZN_TRACE_ID", header)
        gate.client().invoke(FunctionName="hello")
        router: Any = gate.functions.router
        assert router.traces == ["", header]
        told = answer["ResponseMetadata"]["HTTPHeaders"]["x-amzn-trace-id"]
        assert told == f"Root={ROOT}"

    talk(tmp_path, work)


def test_what_botocore_adds_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = Traces()
    a = traces.begin("a", "", 0.0)
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "a")
    monkeypatch.setenv("_X_AMZN_TRACE_ID", a.header)
    params: dict[str, Any] = {"headers": {}}
    botocore.handlers.add_recursion_detection_header(params)
    assert traces.begin("b", params["headers"]["X-Amzn-Trace-Id"], 0.0).caller == ("a", a.segment)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with functions_in(tmp_path) as guest:
        yield guest


def test_the_runtime_sets_it_for_each_request(guest: Guest) -> None:
    code = (
        "import os\ndef handler(event, context):\n    return os.environ.get('_X_AMZN_TRACE_ID')\n"
    )
    guest.write("app.py", code)

    async def body(host: Host) -> None:
        await host.load()
        for trace in ("Root=1", "Root=2", "", "Root=3"):
            assert json.loads((await host.invoke(trace=trace)).payload) == (trace or None)

    calling(guest, body)
    assert "_X_AMZN_TRACE_ID" not in os.environ
