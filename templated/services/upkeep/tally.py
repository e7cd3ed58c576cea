"""Counts the requests under way of each version, for the scaler."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from templated.scaling import Scaler
from templated.services.functions.crew import Crew


class Tally:
    """Told by the router (`Router.tallies`). A request is counted at once, and the scaler is told
    just after it has gone on."""

    def __init__(
        self, scaler: Scaler, clock: Callable[[], float], note: Callable[[str], object]
    ) -> None:
        """`note` is told of each version that has a request."""
        self._scaler, self._clock, self._note = scaler, clock, note
        self._under_way: Counter[str] = Counter()
        self._waiting: set[str] = set()
        """Versions of which requests wait, as far as the scaler knows."""
        self.asked: dict[str, str] = {}
        """By function, the version that was asked for last."""

    def came(self, crew: Crew) -> None:
        """A request is under way."""
        self._under_way[crew.key] += 1
        self.asked[crew.version.function] = crew.key
        self._tell_soon(crew)

    def began(self, crew: Crew) -> None:
        """A request has an instance."""
        if crew.key in self._waiting:
            self._tell_soon(crew)

    def went(self, crew: Crew) -> None:
        """A request is over."""
        self._under_way[crew.key] -= 1
        self._tell_soon(crew)
        if not self._under_way[crew.key]:
            del self._under_way[crew.key]

    def _tell_soon(self, crew: Crew) -> None:
        level, now = self._under_way[crew.key], self._clock()
        asyncio.get_running_loop().call_soon(self._tell, crew, level, now)

    def _tell(self, crew: Crew, level: int, now: float) -> None:
        key, waiting = crew.key, min(level, len(crew.waiting))
        self._waiting.discard(key)
        if key not in self._scaler:  # it is gone, and what is left of its requests runs on
            return
        if waiting:
            self._waiting.add(key)
        self._scaler.under_way(key, now, level, waiting)
        self._note(key)
