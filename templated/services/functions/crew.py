"""The instances of one version, and the requests that wait for one of them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from templated.model.function import Version, named
from templated.model.units import seconds
from templated.services.functions.backoff import Backoff, Pace
from templated.services.functions.instance import InitError, Instance
from templated.services.reports.function_metrics import VersionMetrics

Waiter = asyncio.Future[Instance]
DRIVEN = "scaling"
"""The aim of what scales: while a crew has it, its instances do not end by themselves."""
KEPT = "kept"
"""The aim of what users have set: these instances never end for others."""


class Crew:
    """What the router knows of one version. It is of one value of `$LATEST`: a deploy makes
    another one, and this one then serves only what waits for it already."""

    def __init__(self, version: Version, metrics: VersionMetrics, pace: Pace) -> None:
        self.version = version
        self.key = named(version)
        self.timeout = seconds(version.settings.timeout)
        self.metrics = metrics
        self.members: set[Instance] = set()
        """Those that have come up and do not end."""
        self.resting: list[Instance] = []
        """The one that was used last is the last."""
        self.waiting: deque[Waiter] = deque()
        self.starting = 0
        """Instances that come up."""
        self.running = 0
        """Requests that are under way."""
        self.retired = False
        """No more requests come."""
        self.aims: dict[str, int] = {}
        """How many instances there should be, by who wants that; the most counts."""
        self.broken = Backoff(pace)
        """The function's own failures: its init, or what ends its VM meanwhile."""
        self.hindered = Backoff(pace)
        """What else keeps instances from being there ahead of requests."""
        self.retry: asyncio.TimerHandle | None = None
        self.news = asyncio.Event()
        """Set, and replaced by another one, whenever its instances change."""

    def tell(self) -> None:
        """Its instances have changed, or a start of one has failed."""
        news, self.news = self.news, asyncio.Event()
        news.set()

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

    @property
    def strength(self) -> int:
        """Its instances, with those that come up."""
        return len(self.members) + self.starting

    @property
    def aim(self) -> int:
        """How many instances there should be; 0 when nobody has said."""
        return 0 if self.retired else max(self.aims.values(), default=0)

    @property
    def kept(self) -> int:
        """How many of them never end for others."""
        return 0 if self.retired else self.aims.get(KEPT, 0)

    @property
    def pause(self) -> float:
        """Seconds in which no instance is begun ahead of requests, after failures."""
        return max(self.broken.wait, self.hindered.wait)

    @property
    def problem(self) -> str:
        """How the last instance failed; empty once one works."""
        error = self.broken.error or self.hindered.error
        return "" if error is None else reason(error)

    def may_end(self) -> bool:
        """Whether an instance may end because no request has come for long."""
        return DRIVEN not in self.aims and len(self.members) > self.aim


def reason(error: BaseException) -> str:
    """Why there is no instance, in words."""
    if isinstance(error, InitError) and error.why:
        return f"its init fails: {error.why}"
    return str(error) or type(error).__name__


class Tallies(Protocol):
    """Counts the requests of crews, on their way: at once, and without raising anything."""

    def came(self, crew: Crew) -> None:
        """One more is under way; it has an instance, or waits for one, a moment later."""

    def began(self, crew: Crew) -> None:
        """One has an instance; once more when that ended before it had begun."""

    def went(self, crew: Crew) -> None:
        """One is over, however."""
