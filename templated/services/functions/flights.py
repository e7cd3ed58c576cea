"""One piece of work per key, however many ask for it at once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Flights(Generic[T]):
    """Work that is under way, by key. It goes on when those who wait for it are cancelled."""

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Task[T]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._under_way

    async def join(self, key: str, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work for `key` gives or raises; `begin` makes it when none is under way."""
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(begin(), name=f"code {key[:12]}")
            task.add_done_callback(functools.partial(self._end_one, key))
        return await asyncio.shield(task)

    def _end_one(self, key: str, task: asyncio.Task[T]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # told to those who wait; none of them may be left

    async def end(self) -> None:
        """Cancel all work, and wait until it has given back what it holds. Raises nothing."""
        if running := list(self._under_way.values()):
            for task in running:
                task.cancel()
            await asyncio.wait(running)
