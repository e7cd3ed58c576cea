"""Ends the daemon when a call of the host that it cannot do without does not return.

A transaction that hangs may be written or not, and nobody can tell: no answer to its caller would
be right, and nothing can be started or removed any more. The next start of the daemon finds out
from the journal. VMs go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)
_INTERVAL = 0.5
FAILED = 1
"""The exit code: systemd starts the daemon again."""


@asynccontextmanager
async def ended_when_stalled(
    limit: float, calls: Mapping[str, Callable[[], float]]
) -> AsyncIterator[None]:
    """While the block runs, end the process when one of `calls` has taken `limit` seconds.

    Each returns the seconds that the call of this name has taken so far.
    """
    watching = asyncio.create_task(_watch(limit, calls))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _watch(limit: float, calls: Mapping[str, Callable[[], float]]) -> None:
    while True:
        await asyncio.sleep(min(_INTERVAL, limit))
        for name, taken in calls.items():
            if taken() > limit:
                log.critical(
                    "%s has not answered for %g s: the daemon ends, VMs go on", name, limit
                )
                os._exit(FAILED)  # an orderly end would wait for it, too
