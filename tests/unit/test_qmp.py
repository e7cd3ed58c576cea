"""Events of QEMU, of which a guest can cause some as often as it likes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from templated.drivers.hypervisor.qemu import machine

_GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": [],
    }
}
_STAMP = {"timestamp": {"seconds": 1, "microseconds": 1}}
_EVENT = {**_STAMP, "event": "ACPI_DEVICE_OST", "data": {"info": {"slot": "0"}}}
_MIGRATION = {**_STAMP, "event": "MIGRATION", "data": {"status": "completed"}}


class Flood:
    """QEMU, whose guest causes `events` after each command, and then one that is waited for."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(message: object) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        say(_GREETING)
        while asked := await reader.read(4096):
            command = json.loads(asked)
            say({"return": {}, **({"id": command["id"]} if "id" in command else {})})
            for _ in range(self._events):
                say(_EVENT)
            say(_MIGRATION)
        writer.close()
        await writer.wait_closed()


async def _talk(
    path: Path, events: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[float]]:
    """One command after a flood: how often it was called one, and the rests."""
    rests: list[float] = []
    floods = 0
    sleep = asyncio.sleep

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        await sleep(0)

    def flooded() -> None:
        nonlocal floods
        floods += 1

    server = await asyncio.start_unix_server(Flood(events).serve, str(path))
    client = machine._Client("a", flooded)
    monkeypatch.setattr(asyncio, "sleep", rest)
    async with asyncio.timeout(20):
        with client.listener("MIGRATION") as listener:
            await client.connect(str(path))
            assert await client.execute("stop") == {}
            for _ in range(2):
                assert (await listener.get())["event"] == "MIGRATION"
        # What the library keeps for a listener that nobody asked for.
        assert {event["event"] for event in client.events.history} <= {"MIGRATION"}
        await client.disconnect()
    monkeypatch.undo()
    server.close()
    await server.wait_closed()
    return floods, rests


def test_a_flood_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is kept, they are read with rests, answers come, and one without end is reported."""
    monkeypatch.setattr(machine, "_PACE", 1)
    monkeypatch.setattr(machine, "_USUAL", 1)
    events = machine._FLOOD + 20 * machine._EVENTS
    floods, rests = asyncio.run(_talk(tmp_path / "qmp", events, monkeypatch))
    assert floods >= 1
    assert len([seconds for seconds in rests if seconds > 0]) >= events // machine._EVENTS


def test_some_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a guest that sets its clock now and then are no flood."""
    floods, rests = asyncio.run(_talk(tmp_path / "qmp", machine._EVENTS // 4, monkeypatch))
    assert floods == 0 and not any(rests)
