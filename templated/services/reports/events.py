"""Events of clones, templates and functions, for `templated events`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import Counter

from templated.journal import now
from templated.model.api import Event
from templated.services.reports.feed import Feed

_KEPT = 1000


class EventBus:
    """Keeps the last events and hands new ones to followers; see Feed."""

    def __init__(self, counter: Counter | None = None) -> None:
        self._counter = counter
        self._feed: Feed[Event] = Feed(_KEPT)

    def emit(self, type: str, subject: str, **details: Any) -> Event:
        """Record an event and pass it on."""
        event = Event(time=now(), type=type, subject=subject, details=details)
        if self._counter is not None:
            self._counter.labels(type).inc()
        self._feed.add(event)
        return event

    def recent(self) -> list[Event]:
        """The events that are still kept, oldest first."""
        return self._feed.items()

    def follow(self) -> AsyncIterator[Event]:
        """The events that are still kept and those from now on, until the bus is closed."""
        return self._feed.follow()

    def close(self) -> None:
        """End all followers; later ones end after the events that are kept. Idempotent."""
        self._feed.close()
