"""The host's end of a guest's serial port: a socket that the hypervisor listens on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from templated import failpoints
from templated.drivers.pace import READ
from templated.errors import GuestError

_TRIES, _PAUSE = 20, 0.05


async def open_port(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the hypervisor's end of a port; GuestError when it is not there."""
    try:
        if failpoints.armed:
            await failpoints.reach("agent.connect")
        for _ in range(_TRIES):
            try:
                return await asyncio.open_unix_connection(path, limit=READ)
            except BlockingIOError:  # QEMU has not yet noticed that the last one was closed
                await asyncio.sleep(_PAUSE)
        return await asyncio.open_unix_connection(path, limit=READ)
    except OSError as error:
        raise GuestError(f"the agent's port is not there: {error}") from error


async def close_port(writer: asyncio.StreamWriter) -> None:
    """End a connection, also when the guest does not take what it was sent. Raises nothing."""
    if writer.transport.get_write_buffer_size():
        # What a guest has not taken it may never take. The next connection begins with what ends
        # a line of which it has a part.
        writer.transport.abort()
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        pass
