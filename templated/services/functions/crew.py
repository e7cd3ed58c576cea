"""The instances of one version, and the requests that wait for one of them."""

from __future__ import annotations

import asyncio
from collections import deque

from templated.model.function import Version
from templated.model.units import seconds
from templated.services.functions.instance import Instance
from templated.services.reports.function_metrics import VersionMetrics

Waiter = asyncio.Future[Instance]


class Crew:
    """What the router knows of one version. It is of one value of `$LATEST`: a deploy makes
    another one, and this one then serves only what waits for it already."""

    def __init__(self, version: Version, metrics: VersionMetrics) -> None:
        self.version = version
        self.timeout = seconds(version.settings.timeout)
        self.metrics = metrics
        self.resting: list[Instance] = []
        """The one that was used last is the last."""
        self.waiting: deque[Waiter] = deque()
        self.starting = 0
        """Instances that come up, for a request that waits or waited."""
        self.running = 0
        """Requests that are under way."""
        self.retired = False
        """No more requests come."""

    def waiter(self) -> Waiter | None:
        """The request that has waited longest, which no longer waits then."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                return waiter
        return None

    def refuse(self, error: Exception) -> None:
        """Nobody who waits gets an instance: all get the error."""
        while waiter := self.waiter():
            waiter.set_exception(error)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not (self.waiting or self.starting or self.running)
