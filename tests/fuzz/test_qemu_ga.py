"""The host's end of qemu-ga, against a peer that does what it likes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from templated.drivers.guest import ExecResult
from templated.drivers.qga import agent as module
from templated.drivers.qga.agent import GaAgent
from templated.drivers.qga.port import MAX_REPLY
from templated.errors import GuestError, Timeout
from tests.fuzz.cases import check_error, fuzz
from tests.fuzz.values import JSON, mutated, nested
from tests.unit.qemu_ga import order

_BOUND, _TIMEOUT = 20.0, 0.05
_NIC = {"name": "eth0", "hardware-address": "02:00:00:00:00:01"}
_MARKS = [base64.b64encode(b"mark=" + b"9" * count).decode() for count in (18, 400, 5000)]
_GOOD = [
    *({"return": {"exited": True, "exitcode": 0, "out-data": mark}} for mark in _MARKS),
    {"return": {}},
    {"return": {"supported_commands": [{"name": name} for name in module.NEEDED]}},
    {"return": {"pid": 7}},
    {"return": {"exited": True, "exitcode": 0, "out-data": "aG9zdG5hbWU9eAo="}},
    {"return": {"exited": True, "signal": 9, "err-data": "no base64 \u00e9"}},
    {"return": {"exited": False}},
    {"return": [{**_NIC, "ip-addresses": []}]},
    {"return": 1_700_000_000_000_000_000},
    {"return": {"count": 3, "eof": True, "buf-b64": "YWFh"}},
    {"return": {"count": 0, "eof": False, "buf-b64": ""}},
    {"error": {"class": "GenericError", "desc": "a\nb\x1b[2J" * 900}},
    {"error": {"class": "CommandNotFound", "desc": "no"}},
]
_LINES = st.sampled_from([json.dumps(line).encode() for line in _GOOD])
_HUGE = st.sampled_from(
    [b"x" * (MAX_REPLY + 9), b"\xff" * MAX_REPLY, b"\n" * MAX_REPLY, nested(100_000)]
)


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    """A good line with another value in it."""
    line: dict[str, Any] = json.loads(draw(_LINES))
    inner = line.get("return")
    part = draw(st.sampled_from([line, inner if isinstance(inner, dict) else line]))
    part[draw(st.sampled_from(sorted(part) or ["return"]))] = draw(JSON)
    return json.dumps(line).encode()


_ANSWER = st.one_of(_LINES, _LINES, _changed(), mutated(_LINES), st.binary(max_size=60), _HUGE)
_SCRIPT = st.tuples(
    st.lists(st.tuples(_ANSWER, st.sampled_from([b"\n", b"\n", b"\r\n", b""])), max_size=5),
    # Whether it agrees where they are when it is asked, and how often it says it.
    st.booleans(),
    st.sampled_from([1, 1, 1, 50]),
)


async def _exec(agent: GaAgent) -> None:
    async for part in agent.exec(["x"], timeout=_TIMEOUT):
        if isinstance(part, ExecResult):
            assert part.exit_code is None or 0 <= part.exit_code <= 255
            assert part.signal is None or 0 < part.signal < 128


async def _clock(agent: GaAgent) -> None:
    assert math.isfinite(await agent.adjust_clock(1.0, _TIMEOUT))


_CALLS: dict[str, Callable[[GaAgent], Awaitable[object]]] = {
    "ping": lambda agent: agent.ping(_TIMEOUT),
    "settle": lambda agent: agent.settle(_TIMEOUT),
    "identify": lambda agent: agent.identify(_TIMEOUT, order(1)),
    "clock": _clock,
    "quiesce": lambda agent: agent.quiesce(_TIMEOUT),
    "exec": _exec,
    "put": lambda agent: agent.put("/x", b"y" * 40_000, 0o644, _TIMEOUT),
    "get": lambda agent: agent.get("/x", _TIMEOUT),
}


class Peer:
    """The other end: it answers by its script, or well once that is None."""

    def __init__(self) -> None:
        self.script: tuple[list[tuple[bytes, bytes]], bool, int] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                request = json.loads(line.rpartition(b"\xff")[2])
                lines, agrees, times = self.script or ([], True, 0)
                if agrees and request["execute"] == "guest-sync-delimited":
                    number = request["arguments"]["id"]
                    # Behind a line that may have no end yet.
                    writer.write(b'\n\xff{"return": %d}\n' % number)
                elif self.script is None:
                    writer.write(b'{"return": 1700000000000000000}\n')
                else:
                    data = b"".join(answer + end for answer, end in lines)
                    for _ in range(min(times, 1 + (8 << 20) // (len(data) + 1))):
                        writer.write(data)
                        await writer.drain()
        writer.close()


def test_hostile_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call ends well or with one clear error; and the next command has its own answer."""
    monkeypatch.setattr(module, "_SHORT", _TIMEOUT)
    path = tmp_path / "agent"

    async def case(script: tuple[list[tuple[bytes, bytes]], bool, int], name: str) -> None:
        peer = Peer()
        server = await asyncio.start_unix_server(peer.serve, str(path), limit=1 << 20)
        agent = GaAgent(path)
        try:
            await agent.connect()
            peer.script = script
            try:
                await _CALLS[name](agent)
            except (GuestError, Timeout) as error:
                check_error(error, hint=False)
            peer.script = None
            async with asyncio.timeout(_BOUND):
                while True:  # the rest of a flood is read at a pace
                    with contextlib.suppress(GuestError, Timeout):
                        assert await agent.adjust_clock(0.0, _BOUND) == 1_700_000_000.0
                        break
        finally:
            await agent.close()
            server.close()
            await server.wait_closed()

    fuzz(
        "qemu-ga's protocol, host's side",
        st.tuples(_SCRIPT, st.sampled_from(sorted(_CALLS))),
        lambda value: asyncio.run(case(*value)),
    )
