"""Housekeeping beside requests: a guest must not fill the host's disk with its console."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from templated.drivers.hypervisor.base import Places

INTERVAL = 5.0
SERIAL_LIMIT = 4 << 20
_KEEP = 256 << 10


async def keep_logs_short(slots: Path) -> None:
    """Cut console logs that grew over SERIAL_LIMIT bytes to their end, until cancelled.

    Raises nothing: a log can go away at any moment.

    Hypervisors append (O_APPEND), so cutting an open log leaves no hole in it.
    """
    while True:
        await asyncio.sleep(INTERVAL)
        await asyncio.to_thread(_sweep, slots)


def _sweep(slots: Path) -> None:
    with contextlib.suppress(OSError):
        for directory in slots.iterdir():
            places = Places(directory, directory)
            for path in (places.serial_log, places.log):
                # A log can go away, with its clone, at any moment.
                with contextlib.suppress(OSError):
                    if path.stat().st_size > SERIAL_LIMIT:
                        cut(path)


def cut(path: Path) -> None:
    """Keep the last part of a log in NAME.1 and empty the log."""
    with open(path, "r+b") as log:
        log.seek(-_KEEP, os.SEEK_END)
        path.with_suffix(".log.1").write_bytes(log.read(_KEEP))
        log.truncate(0)
