"""The host's side of the agent protocol, against a peer that does what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from templated.drivers.guest import Agent, ExecResult
from templated.drivers.pace import MAX_LINE
from templated.errors import Busy, GuestError, Timeout
from tests.fuzz.cases import check_error, fuzz
from tests.fuzz.values import JSON, mutated, nested
from tests.unit.test_agent import identity

_BOUND, _TIMEOUT = 20.0, 0.05
# KiB that the peak may grow by: a file and output that waits, each at its bound, and a copy.
_MEMORY = 256 << 10
_ID = b'"ID"'
_GOOD = [
    {"id": "ID", "ok": True, "result": {}},
    {"id": "ID", "ok": True, "result": {"time": 1.5}},
    {"id": "ID", "ok": True, "result": {"seen": "00" * 90}},
    {"id": "ID", "ok": True, "result": {"exit_code": 0, "signal": None, "timed_out": False}},
    {"id": "ID", "ok": True, "result": {"data": "YQ==", "eof": True, "size": 1, "mode": 420}},
    {"id": "ID", "ok": True, "result": {"data": "", "eof": False, "size": 1, "mode": 420}},
    {"id": "ID", "ok": False, "error": {"code": "enoent", "message": "a\nb\x1b[2J" * 900}},
    {"id": "ID", "stream": "stdout", "data": "b3V0"},
    {"id": "ID", "stream": "stderr", "data": "no base64 \u00e9"},
]
_LINES = st.sampled_from([json.dumps(line).encode() for line in _GOOD])
_FIELDS = st.sampled_from(["id", "ok", "result", "error", "stream", "data", "time", "seen", "eof"])


@st.composite
def _changed(draw: st.DrawFn) -> bytes:
    """A good line with a field of another value, in it or in its result."""
    line: dict[str, Any] = json.loads(draw(_LINES))
    part = draw(st.sampled_from([line, line.get("result", line)]))
    part[draw(st.one_of(_FIELDS, st.sampled_from(sorted(part) or ["id"])))] = draw(JSON)
    return json.dumps(line).encode()


_HUGE = st.sampled_from(
    [
        b"x" * (MAX_LINE + 9),
        b"y" * (3 * MAX_LINE),
        b"\n" * MAX_LINE,
        nested(100_000),
        b'{"id": "ID", "error": {"a": ' + nested(2000) + b"}}",
        b'{"id": "ID", "ok": true, "result": ' + nested(2000) + b"}",
        b'{"id": ' + b"9" * 5000 + b"}",
        b'{"id": "ID", "stream": "stdout", "data": "' + b"YWFh" * 200_000 + b'"}',
    ]
)
_ANSWER = st.one_of(_LINES, _changed(), mutated(_LINES), st.binary(max_size=60), _HUGE)
_SCRIPT = st.tuples(
    st.lists(st.tuples(_ANSWER, st.sampled_from([b"\n", b"\r\n", b""])), max_size=5),
    # How often it says it, and whether it hangs up then.
    st.sampled_from([1, 1, 1, 2, 300]),
    st.booleans(),
)
Call = Callable[[Agent], Awaitable[object]]


async def _exec(agent: Agent) -> None:
    async for part in agent.exec(["x"], timeout=_TIMEOUT - 5.0):
        if isinstance(part, ExecResult):
            assert part.exit_code is None or 0 <= part.exit_code <= 255
            assert part.signal is None or 0 < part.signal < 128


async def _clock(agent: Agent) -> None:
    assert math.isfinite(await agent.adjust_clock(1.0, _TIMEOUT))


_CALLS: dict[str, Call] = {
    "ping": lambda agent: agent.ping(_TIMEOUT),
    "identify": lambda agent: agent.identify(_TIMEOUT, identity()),
    "clock": _clock,
    "quiesce": lambda agent: agent.quiesce(_TIMEOUT),
    "exec": _exec,
    "put": lambda agent: agent.put("/x", b"y" * 40_000, 0o644, _TIMEOUT),
    "get": lambda agent: agent.get("/x", _TIMEOUT),
}


class Peer:
    """The other end: it answers by its script, or well once that is None."""

    def __init__(self) -> None:
        self.script: tuple[list[tuple[bytes, bytes]], int, bool] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                if line.strip():
                    number = str(json.loads(line)["id"]).encode()
                    if not await self._answer(writer, number):
                        break
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, number: bytes) -> bool:
        if self.script is None:
            writer.write(b'{"id": %s, "ok": true, "result": {}}\n' % number)
            return True
        lines, times, goes_on = self.script
        data = b"".join(line + end for line, end in lines).replace(_ID, number)
        for _ in range(min(times, 1 + (4 << 20) // (len(data) + 1))):
            writer.write(data)
            await writer.drain()
        return goes_on


async def _talk(path: Path, peer: Peer, call: Call) -> None:
    agent = Agent(path)
    try:
        await agent.connect()
        for _ in range(2):
            with contextlib.suppress(GuestError, Timeout, Busy):
                await call(agent)
    except (GuestError, Timeout, Busy) as error:
        check_error(error, hint=False)
    finally:
        await agent.close()


def test_hostile_answers(tmp_path: Path) -> None:
    """Each call ends well or with one clear error, and the next connection works."""
    strange: list[dict[str, Any]] = []

    async def case(script: Any, name: str) -> None:
        peer, path = Peer(), tmp_path / "agent"
        asyncio.get_running_loop().set_exception_handler(lambda _, what: strange.append(what))
        server = await asyncio.start_unix_server(peer.serve, str(path), limit=MAX_LINE)
        try:
            async with asyncio.timeout(_BOUND):
                peer.script = script
                await _talk(path, peer, _CALLS[name])
                peer.script = None
                agent = Agent(path)
                await agent.connect()
                await agent.ping(_BOUND)
                await agent.close()
        finally:
            server.close()
        assert not strange, strange

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(
        "agent protocol, host's side",
        st.tuples(_SCRIPT, st.sampled_from(sorted(_CALLS))),
        lambda value: asyncio.run(case(*value)),
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MEMORY
