"""Housekeeping beside requests: a console that is full shows nothing new."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from templated.drivers import boundedlog
from templated.drivers.hypervisor.base import Places

INTERVAL = 5.0
# So that there is room for what comes until the next look.
_FULL = boundedlog.LIMIT // 2


async def keep_logs_short(slots: Path) -> None:
    """Cut logs that are half full to their end, until cancelled: a full one takes no more.

    Raises nothing: a log can go away at any moment.
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
                    if boundedlog.length(path) > _FULL:
                        boundedlog.cut(path)
