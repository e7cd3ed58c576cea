"""The host's end of qemu-ga against guests that misbehave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from templated.drivers.qga.agent import GaAgent, _Interface, seen_address
from templated.drivers.qga.port import MAX_REPLY, GaPort
from templated.errors import GuestError, Timeout, UnfitAgent

Answer = Callable[[dict[str, Any]], bytes]


def answered(value: object) -> bytes:
    """An answer of an agent."""
    return json.dumps({"return": value}).encode() + b"\n"


def scenario(
    folder: Path, answer: Answer, body: Callable[[GaPort], Coroutine[Any, Any, None]]
) -> None:
    """Run `body` on a port whose agent agrees as it should, and answers commands by `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line.lstrip(b"\xff"))
            if request["execute"] == "guest-sync-delimited":
                # Newer ones complain of the delimiter, and late answers come before.
                writer.write(b'{"error": {"class": "GenericError", "desc": "JSON"}}\n')
                writer.write(b'{"return": "late"}\n\xff' + answered(request["arguments"]["id"]))
            else:
                writer.write(answer(request))
        writer.close()

    async def main() -> None:
        server = await asyncio.start_unix_server(serve, str(folder / "agent"))
        port = GaPort(folder / "agent")
        try:
            await port.connect()
            await body(port)
        finally:
            await port.close()
            server.close()
            await server.wait_closed()

    asyncio.run(main())


def test_answers(tmp_path: Path) -> None:
    """Names have hyphens, and each command has its own answer."""
    seen = []

    def answer(request: dict[str, Any]) -> bytes:
        seen.append(request)
        return answered(len(seen))

    async def body(port: GaPort) -> None:
        assert await port.command("a", int, 5.0) == 1
        assert await port.command("b", int, 5.0, buf_b64="x") == 2

    scenario(tmp_path, answer, body)
    assert seen == [{"execute": "a"}, {"execute": "b", "arguments": {"buf-b64": "x"}}]


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        (b"nonsense\n", GuestError, "nonsense"),
        (b"{}\n", GuestError, "nonsense"),
        (answered("text"), GuestError, "nonsense"),
        (b"[" * 100_000 + b"\n", GuestError, "nonsense"),
        (b'{"return": "' + b"x" * 2 * MAX_REPLY + b'"}\n', GuestError, "longer than 4 MiB"),
        (b'{"error": {"class": "GenericError", "desc": "no"}}\n', GuestError, "refused c: no"),
        (b'{"error": {"class": "CommandNotFound", "desc": "x"}}\n', UnfitAgent, "not allow c"),
        (b"", Timeout, "answer to c took longer than 0.2 s"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_bad_answers(tmp_path: Path, line: bytes, kind: type[GuestError], what: str) -> None:
    """They fail the command that waits, in one line; the next one has its own answer."""

    def answer(request: dict[str, Any]) -> bytes:
        return line if request["execute"] == "c" else answered(5)

    async def body(port: GaPort) -> None:
        with pytest.raises(kind, match=what):
            await port.command("c", int, 5.0 if line else 0.2)
        assert await port.command("d", int, 5.0) == 5

    scenario(tmp_path, answer, body)


def test_an_agent_that_never_answers(tmp_path: Path) -> None:
    """Every wait has a bound, and what is missing in the guest is said."""

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(serve, str(tmp_path / "agent"))
        agent = GaAgent(tmp_path / "agent")
        await agent.connect()
        with pytest.raises(Timeout, match="guest-sync-delimited"):
            await agent.ping(0.1)
        assert "install the package qemu-guest-agent" in agent.absence
        await agent.close()
        with pytest.raises(GuestError, match="closed"):
            await agent.ping(0.1)
        server.close()
        await server.wait_closed()

    asyncio.run(main())


def test_no_port(tmp_path: Path) -> None:
    """The hypervisor has gone."""
    with pytest.raises(GuestError, match="port is not there"):
        asyncio.run(GaPort(tmp_path / "agent").connect())


@pytest.mark.parametrize("mark", ["9" * 20, "9" * 400, "9" * 5000, "\u0663", "-1", "x", ""])
def test_marks(tmp_path: Path, mark: str) -> None:
    """Whatever a guest says of its mark, it leads no further than to the guest's own clock."""

    async def main() -> None:
        agent = GaAgent(tmp_path / "agent")
        agent._time = AsyncMock(return_value=1_700_000_000_000_000_000)  # type: ignore[method-assign]
        begin = time.monotonic()
        assert await agent._mark({"mark": mark}) == 1_700_000_000_000_000_000
        assert begin - 60 <= agent.marked <= time.monotonic()

    asyncio.run(main())


def card(name: str, mac: str, *addresses: str) -> _Interface:
    """An interface as the agent tells of it."""
    from templated.drivers.qga.agent import _Address

    kinds = ["ipv6" if ":" in address else "ipv4" for address in addresses]
    found = tuple(_Address(a, kind, 16) for a, kind in zip(addresses, kinds, strict=True))
    return _Interface(name, mac, found)


def test_addresses() -> None:
    """What is not as it should be shows, and so never compares as equal."""
    lo = card("lo", "00:00:00:00:00:00", "127.0.0.1")
    good = card("eth0", "02::1", "10.0.0.1", "fe80::1")
    assert seen_address((lo, good), "02::1") == ("02::1", "10.0.0.1", 16)
    assert seen_address((lo, good), "02::2") == ("02::1", "10.0.0.1", 16)
    two = card("eth0", "02::1", "10.0.0.1", "10.0.0.2")
    assert seen_address((two,), "02::1")[1] == "10.0.0.1, 10.0.0.2"
    twice = (good, card("eth1", "02::1"))
    assert seen_address(twice, "02::1")[0] == "02::1, 02::1"
    assert seen_address((lo,), "02::1") == ("", "", 0)
