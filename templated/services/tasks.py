"""The daemon's background work: the one place that guards tasks.

A task that fails never ends the daemon: its error is logged here, or raised to its caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from templated.errors import Defect, TemplatedError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Tasks:
    """Starts tasks, and can end all of them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Run `work` in the background; an error is logged under `name`."""
        self._begin(work, name).add_done_callback(_report)

    async def run(self, work: Coroutine[Any, Any, T], name: str | None = None) -> T:
        """Run `work` to its end, also when the caller is cancelled; raises what it raises."""
        return await asyncio.shield(self._begin(work, name))

    def _begin(self, work: Coroutine[Any, Any, T], name: str | None) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def end(self) -> None:
        """Cancel all tasks, and wait until they have given back what they hold. Raises nothing."""
        running = set(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


def _report(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, TemplatedError) and not isinstance(error, Defect):
        log.warning("%s failed: %s", task.get_name(), error.message)
    elif error is not None:  # whatever it is, the rest of the daemon goes on
        log.error("%s failed", task.get_name(), exc_info=error)
