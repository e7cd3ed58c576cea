"""The notify protocol of systemd (sd_notify(3)): ready, watchdog, stopping."""

from __future__ import annotations

import asyncio
import os
import socket

_MORE_SECONDS = 30


def notify(state: str) -> None:
    """Send a state to the service manager; does nothing without one."""
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
            pass  # the manager is gone or busy; its watchdog notices


async def ask_for_time() -> None:
    """While the daemon starts: ask the manager for more time again and again, until cancelled.

    Many clones to adopt, or large memories to digest, take longer than any fixed TimeoutStartSec;
    that stays the bound on a daemon that hangs (EXTEND_TIMEOUT_USEC in sd_notify(3)).
    """
    while True:
        notify(f"EXTEND_TIMEOUT_USEC={_MORE_SECONDS * 1_000_000}")
        await asyncio.sleep(_MORE_SECONDS / 3)


async def watchdog() -> None:
    """Tell the manager twice per interval that the event loop still turns, until cancelled."""
    interval = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6
    while interval > 0:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval / 2)
