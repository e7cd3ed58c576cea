"""What a replay on VMs should come to: the daemon's own scaling over instances without VMs.

The rules of the crews (services/functions/starts.py) in a few lines: a request takes an instance
that rests; for each that waits one is begun, and that is a cold start; a round each second begins
instances ahead and ends those beyond. A start keeps a CPU busy, so that more of them than CPUs
take longer.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from templated.bench.scaling.requests import Request
from templated.scaling import Bounds, Policy, Scaler

_ROUND = 1.0


@dataclass
class Crew:
    """The instances of one function, and its requests."""

    key: str
    cold: int = 0
    """Instances that were begun for requests."""
    up: int = 0
    resting: int = 0
    starting: int = 0
    under_way: int = 0
    waiting: deque[float] = field(default_factory=deque)
    """How long each request takes that has no instance yet."""
    aim: int = 0

    @property
    def strength(self) -> int:
        """Instances, with those that come up."""
        return self.up + self.starting


class World:
    """One run. `crews` has what it came to."""

    def __init__(
        self, functions: int, policy: Policy, mib: float, start: float, starts: int
    ) -> None:
        """An instance takes `mib` MiB, and `start` seconds to come up, as long as no more than
        `starts` do."""
        self.crews = [Crew(str(number)) for number in range(functions)]
        self.most = 0
        """The most instances that there were at once."""
        self._start, self._starts = start, starts
        self._scaler = Scaler(policy)
        for crew in self.crews:
            self._scaler.add(crew.key, Bounds(mib=mib))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0

    def run(self, requests: list[Request]) -> None:
        """Have the requests come, and go on until the last is over."""
        for request in requests:
            crew = self.crews[request.function]
            self._at(request.at, lambda c=crew, s=request.seconds: self._came(c, s))  # type: ignore[misc]
        left = len(requests)
        self._at(_ROUND, self._round)
        while left:
            self._now, _, happens = heapq.heappop(self._events)
            before = sum(crew.under_way for crew in self.crews)
            happens()
            left -= max(0, before - sum(crew.under_way for crew in self.crews))
            self.most = max(self.most, sum(crew.strength for crew in self.crews))

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happens))

    def _tell(self, crew: Crew) -> None:
        self._scaler.under_way(crew.key, self._now, crew.under_way, len(crew.waiting))

    def _came(self, crew: Crew, seconds: float) -> None:
        crew.under_way += 1
        if crew.resting:
            crew.resting -= 1
            self._serve(crew, seconds)
        else:
            crew.waiting.append(seconds)
            self._attend(crew)
        self._tell(crew)

    def _serve(self, crew: Crew, seconds: float) -> None:
        self._at(self._now + seconds, lambda: self._went(crew))

    def _went(self, crew: Crew) -> None:
        crew.under_way -= 1
        self._offer(crew)
        self._tell(crew)

    def _offer(self, crew: Crew) -> None:
        if crew.waiting:
            self._serve(crew, crew.waiting.popleft())
        else:
            crew.resting += 1

    def _attend(self, crew: Crew) -> None:
        while crew.starting < min(len(crew.waiting), self._starts):
            crew.cold += 1
            self._begin(crew)

    def _begin(self, crew: Crew) -> None:
        crew.starting += 1
        took = self._start * max(1.0, self._starting / self._starts)
        self._at(self._now + took, lambda: self._came_up(crew, took))

    @property
    def _starting(self) -> int:
        return sum(crew.starting for crew in self.crews)

    def _came_up(self, crew: Crew, took: float) -> None:
        crew.starting -= 1
        crew.up += 1
        self._scaler.started(crew.key, took)
        self._offer(crew)
        self._attend(crew)
        self._grow()
        self._tell(crew)

    def _round(self) -> None:
        self._scaler.round(self._now)
        for crew in self.crews:
            crew.aim = self._scaler.decision(crew.key).keep
            spare = max(0, min(crew.up - crew.aim, crew.resting))
            crew.up -= spare
            crew.resting -= spare
        self._grow()
        self._at(self._now + _ROUND, self._round)

    def _grow(self) -> None:
        """Begin what is wanted ahead, that of which most is missing first."""
        while self._starting < self._starts:
            wanting = [crew for crew in self.crews if crew.strength < crew.aim]
            if not wanting:
                return
            self._begin(min(wanting, key=lambda crew: crew.strength / crew.aim))
