"""What happened, for `templated events` and for whoever follows an operation."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from msgspec import Struct
from prometheus_client import Counter

from templated.journal import now

_KEPT = 1000
_BACKLOG = 1000


class Event(Struct, frozen=True, kw_only=True):
    """One thing that happened."""

    time: str
    type: str
    """What, as `clone.running`, `generation.active`."""
    subject: str
    """The name of the clone or template."""
    details: dict[str, Any] = {}


class EventBus:
    """Keeps the last events and hands new ones to followers.

    A follower that does not read loses the oldest events, never the daemon its memory.
    """

    def __init__(self, counter: Counter | None = None) -> None:
        self._counter = counter
        self._recent: deque[Event] = deque(maxlen=_KEPT)
        self._followers: set[asyncio.Queue[Event | None]] = set()
        self._closed = False

    def emit(self, type: str, subject: str, **details: Any) -> Event:
        """Record an event and pass it on."""
        event = Event(time=now(), type=type, subject=subject, details=details)
        self._recent.append(event)
        if self._counter is not None:
            self._counter.labels(type).inc()
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        return event

    def recent(self) -> list[Event]:
        """The events that are still kept, oldest first."""
        return list(self._recent)

    async def follow(self) -> AsyncIterator[Event]:
        """The events that are still kept and those from now on, until the bus is closed."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_KEPT + _BACKLOG)
        for event in self._recent:
            queue.put_nowait(event)
        self._followers.add(queue)
        if self._closed:
            queue.put_nowait(None)
        try:
            while (following := await queue.get()) is not None:
                yield following
        finally:
            self._followers.discard(queue)

    def close(self) -> None:
        """End all followers, and those who come later once they have what is kept. Idempotent."""
        self._closed = True
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
