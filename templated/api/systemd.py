"""The notify protocol of systemd (sd_notify(3)): ready, watchdog, stopping."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(state: str) -> None:
    """Send a state to the service manager; nothing when none asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            pass  # the manager is gone or busy; the watchdog tells it


async def watchdog() -> None:
    """Tell the manager twice per interval that the event loop still turns, until cancelled."""
    interval = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6
    while interval > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval / 2)
