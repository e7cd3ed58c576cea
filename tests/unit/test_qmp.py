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
_EVENT = {"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {"seconds": 1}}
_FLOOD = 1000


async def _flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """QEMU, with a guest that sets its clock all the time; then it answers one command."""

    def say(message: object) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    say(_GREETING)
    for _ in range(2):
        command = json.loads(await reader.read(4096))
        say({"return": {}, **({"id": command["id"]} if "id" in command else {})})
        for _ in range(_FLOOD):
            say(_EVENT)
    await reader.read()
    writer.close()
    await writer.wait_closed()


def test_a_flood_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is kept that nobody listens for, and they are read with rests; answers still come."""
    rests: list[float] = []
    sleep = asyncio.sleep

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        await sleep(0)

    async def main() -> None:
        server = await asyncio.start_unix_server(_flood, str(tmp_path / "qmp"))
        client = machine._Client("a")
        async with asyncio.timeout(20):
            await client.connect(str(tmp_path / "qmp"))
            monkeypatch.setattr(asyncio, "sleep", rest)
            assert await client.execute("stop") == {}
            while client._events_read < 2 * _FLOOD:
                await sleep(0.001)
            monkeypatch.undo()
            assert client.events.empty() and client.events.history == ()
            await client.disconnect()
        server.close()
        await server.wait_closed()

    asyncio.run(main())
    assert len([seconds for seconds in rests if seconds > 0]) >= 2 * _FLOOD // machine._EVENTS - 2
