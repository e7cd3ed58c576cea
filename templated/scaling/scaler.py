"""The entry: fed with what happens and the time, it tells how many instances there should be."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

from templated.scaling.budget import Claim, share
from templated.scaling.clock import SteadyClock
from templated.scaling.decision import Decision, Failure, Round
from templated.scaling.demand import Demand
from templated.scaling.forecast.level import Stopwatch, forecasters
from templated.scaling.forecast.levels import Makers
from templated.scaling.function import Function
from templated.scaling.policy import Bounds, Policy

_FORMAT = 1


class Scaler:
    """Decides for all functions' versions. Knows no clock: each call says what time it is.

    Times are seconds since any point, the same after a restart if what was saved is to be used
    (the time of the day). They may jump. Keys are any names, one for each version. A key that
    was never added, or was removed, raises KeyError.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        makers: Makers = forecasters,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """`stopwatch` gives seconds; with one, a forecaster that takes 50 ms is left out."""
        self.policy = policy or Policy()
        self._makers, self._stopwatch = makers, stopwatch
        self._clock = SteadyClock()
        self._functions: dict[str, Function] = {}
        self._decisions: dict[str, Decision] = {}
        # Those to look at in the next round; a dict keeps them in order.
        self._lively: dict[str, None] = {}
        # When minutes are over: one entry for each function that has minutes.
        self._closing: list[tuple[float, str]] = []
        self._asked = 0.0
        self._short = False
        self._pressed = False

    def __contains__(self, key: str) -> bool:
        return key in self._functions

    def add(self, key: str, bounds: Bounds) -> None:
        """Take on a version, or change its bounds."""
        if found := self._functions.get(key):
            self._asked -= found.wanted * found.bounds.mib
            found.bounds = bounds
            self._asked += found.wanted * bounds.mib
        else:
            self._functions[key] = Function(key, bounds, self.policy, self._makers)
            self._decisions[key] = Decision(key, 0, 0, "idle", "idle", 0.0)
        self._lively[key] = None

    def remove(self, key: str) -> None:
        """Forget a version."""
        gone = self._functions.pop(key)
        self._asked -= gone.wanted * gone.bounds.mib
        del self._decisions[key]
        self._lively.pop(key, None)

    def under_way(self, key: str, now: float, requests: int, waiting: int = 0) -> None:
        """So many requests of the version are under way from now on, of which some wait for an
        instance. To be called at each change. ValueError for a number below 0."""
        if requests < 0 or waiting < 0:
            raise ValueError(f"{requests} requests under way, {waiting} of them waiting")
        function = self._functions[key]
        now = self._clock.read(now)
        fresh = function.phase is None
        function.roll(now, self._stopwatch)
        function.change(now, requests, waiting)
        if fresh and function.phase is not None:
            heapq.heappush(self._closing, (function.closes, key))
        self._lively[key] = None

    def started(self, key: str, seconds: float) -> None:
        """An instance came up in so many seconds."""
        self._functions[key].demand.starts.append(seconds)

    def expect(
        self, key: str, now: float, count: int, until: float, why: str, chance: float = 1.0
    ) -> None:
        """So many requests more than now come before `until`, with this chance."""
        here = self._clock.read(now)
        self._functions[key].expect(count, here + (until - now), chance, why)
        self._lively[key] = None

    def foresee(
        self, key: str, now: float, count: int, until: float, why: str, chance: float = 1.0
    ) -> None:
        """As `expect`, in place of all that was expected before: to be called whenever that
        changes. None are expected any more with a `count` of 0."""
        self._functions[key].expected = []
        if count:
            self.expect(key, now, count, until, why, chance)

    def round(self, now: float, *, growth: bool = True) -> Round:
        """Decide; once a second, or as seldom as once a minute. Without `growth` nothing rises but
        for requests that are under way: the host is short of something."""
        now = self._clock.read(now)
        due = self._due(now)
        for key in due:
            self._evaluate(self._functions[key], now)
        bound = self.policy.memory
        kept: dict[str, int] | None = None
        short = 0.0
        if bound is not None and (self._short or self._asked > bound):
            claims: Iterable[Claim] = (c for f in self._functions.values() for c in f.claims())
            kept, short = share(claims, bound)
            self._short = self._asked > bound
            moved = (key for key, keep in kept.items() if keep != self._decisions[key].keep)
            due = list(dict.fromkeys((*due, *moved)))
        if growth and self._pressed:
            due = list(self._functions)
        self._pressed = not growth
        changed = [d for key in due if (d := self._decide(key, kept, growth)) is not None]
        failures = [
            Failure(key, *failure)
            for key in due
            for failure in self._functions[key].levels.failed()
        ]
        return Round(changed, failures, short)

    def _due(self, now: float) -> list[str]:
        """Those with something going on, or with a minute that is over."""
        while self._closing and self._closing[0][0] <= now:
            key = heapq.heappop(self._closing)[1]
            if function := self._functions.get(key):
                function.roll(now, self._stopwatch)
                heapq.heappush(self._closing, (function.closes, key))
                self._lively[key] = None
        return list(self._lively)

    def _evaluate(self, function: Function, now: float) -> None:
        self._asked -= function.wanted * function.bounds.mib
        function.evaluate(now)
        self._asked += function.wanted * function.bounds.mib
        if not function.lively:
            del self._lively[function.key]

    def _decide(self, key: str, kept: dict[str, int] | None, growth: bool) -> Decision | None:
        """The new decision, or None when nothing is other than before."""
        function, before = self._functions[key], self._decisions[key]
        keep = function.wanted if kept is None else kept.get(key, 0)
        held = False
        if not growth:
            most = max(before.keep, function.demand.level)
            keep, held = min(keep, most), keep > most
        desired = min(keep, max(function.desired.instances, function.bounds.least))
        kind, reason = ("pressure", "pressure") if held else function.reason(keep)
        if (desired, keep, reason) == (before.desired, before.keep, before.reason):
            return None
        decision = Decision(key, desired, keep, kind, reason, function.chance(keep))
        self._decisions[key] = decision
        return decision

    def decision(self, key: str) -> Decision:
        """The one that holds."""
        return self._decisions[key]

    def demand(self, key: str) -> Demand:
        """What was seen of a version: to read, not to change."""
        found = self._functions[key].demand
        found.flush()
        return found

    def bounds(self, key: str) -> Bounds:
        """Those of a version."""
        return self._functions[key].bounds

    def mean(self, key: str, now: float) -> float:
        """Requests under way, on average over the stable window."""
        demand = self._functions[key].demand
        now = self._clock.read(now)
        demand.settle(now)
        return demand.mean(now, self.policy.stable)

    def forecast(self, key: str) -> tuple[float, str]:
        """The most requests at once that the next minute is expected to have, on average over what
        may come; and what is said of the first instance, in words."""
        levels, last, mean = self._functions[key].levels, 0, 0.0
        for upto, chance in levels.chances():
            mean += (upto - last) * chance
            last = upto
        return mean, levels.why(1)[1]

    def saved(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """All that was learned, or that of some versions, as plain data: 2 to 30 KB each as JSON.

        Saving some at a time spreads the work; `load` takes each part.
        """
        chosen = self._functions if keys is None else keys
        return {
            "format": _FORMAT,
            "clock": self._clock.saved(),
            "functions": {key: self._functions[key].saved() for key in chosen},
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave for those versions that were added already. To be called
        before anything happens to them. ValueError for data that is not that: the version it is
        about, and those after it, begin anew."""
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}")
            self._clock.load(data["clock"])
            for key, row in data["functions"].items():
                if key in self._functions:
                    bounds = self._functions[key].bounds
                    function = Function(key, bounds, self.policy, self._makers)
                    function.load(row)
                    self._functions[key] = function
                    if function.phase is not None:
                        heapq.heappush(self._closing, (function.closes, key))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no saved scaling: {error!r}") from None
