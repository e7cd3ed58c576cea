"""A sequence of events that any number of readers follow, each at its own pace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """Keeps the last items (all with `kept` None) and hands them and new ones to followers.

    A follower that does not read loses the oldest items, so that the daemon's memory stays bounded.
    """

    def __init__(self, kept: int | None = None) -> None:
        self._items: deque[T] = deque(maxlen=kept)
        self._added = 0
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, item: T) -> None:
        """Append an item and wake the followers."""
        self._items.append(item)
        self._added += 1
        self._wake()

    def close(self) -> None:
        """End all followers, also later ones, after the items that are kept. Idempotent."""
        self._closed = True
        self._wake()

    def items(self) -> list[T]:
        """The items that are still kept, oldest first."""
        return list(self._items)

    async def follow(self) -> AsyncIterator[T]:
        """The items that are still kept, then new ones, until closed. Raises nothing."""
        position = 0
        while True:
            while position < self._added:
                gone = self._added - len(self._items)
                position = max(position, gone)
                item = self._items[position - gone]
                position += 1
                yield item
            if self._closed:
                return
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
