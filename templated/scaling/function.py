"""What the scaler knows of one function's version, and what that asks for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from templated.scaling.budget import PROMISED, SERVING, Claim
from templated.scaling.demand import Demand
from templated.scaling.forecast.level import Stopwatch
from templated.scaling.forecast.levels import Levels, Makers
from templated.scaling.policy import Bounds, Policy
from templated.scaling.reactive import Desired, Reactive

_MINUTE = 60.0
_GIB = 1024.0
# A hole in time: minutes beyond which nobody watched, so that they are no sign of idleness.
_UNSEEN = 5
# Chances of instances that no forecast is about: used since the minute began; wanted by demand.
_USED, _DEMANDED = 0.5, 0.9
_EXPECTED = 32
# Seconds at either end of a minute, and how many returns there in a row are too many.
_EDGE, _EDGES = 10.0, 3


class Expected(NamedTuple):
    """Requests that somebody knows to come."""

    requests: int
    until: float
    chance: float
    why: str


class Function:
    """Not the scaler's interface: `Scaler` alone uses it. Times are of its steady clock."""

    __slots__ = (
        "_claims",
        "_edge",
        "_foreseen",
        "_opened",
        "_policy",
        "_promised",
        "_unbounded",
        "_why",
        "bounds",
        "demand",
        "desired",
        "expected",
        "key",
        "levels",
        "peak",
        "phase",
        "reactive",
        "wanted",
    )

    def __init__(self, key: str, bounds: Bounds, policy: Policy, makers: Makers) -> None:
        self.key, self.bounds, self._policy = key, bounds, policy
        self.demand = Demand()
        self.reactive = Reactive(policy)
        self.levels = Levels(makers)
        self.phase: float | None = None
        """Where its minutes begin. The first request sets it half a minute before itself: timers
        then come in the middle of a minute, and functions take turns in being forecast."""
        self.peak = 0
        """Most requests at once in the open minute."""
        self.expected: list[Expected] = []
        self.desired = Desired(0, "idle")
        self.wanted = 0
        """Instances that it is worth to keep, before the budget."""
        self._opened = 0
        self._foreseen = 0
        self._edge = 0
        self._promised = self._unbounded = 0
        self._claims: list[Claim] | None = None
        # Asked for each second, told by many objects: so it is kept for the minute.
        self._why: tuple[str, str] | None = None

    def change(self, now: float, level: int, waiting: int) -> None:
        """So many requests are under way from now on."""
        if self.phase is None:
            if not level:
                return
            self.phase, self._opened = now - _MINUTE / 2, 0
        if level and not self.peak and self.levels.idle:
            self._returned((now - self.phase) % _MINUTE)
        self.demand.change(now, level, waiting)
        self.peak = max(self.peak, level)

    def _returned(self, offset: float) -> None:
        """A first request came so far into its minute. Those that keep coming where two minutes
        meet would be expected now in the one, now in the other: then the minutes move."""
        self._edge = self._edge + 1 if not _EDGE <= offset <= _MINUTE - _EDGE else 0
        if self._edge >= _EDGES and self.phase is not None:
            self.phase += _MINUTE / 2
            self._edge = 0

    def expect(self, count: int, until: float, chance: float, why: str) -> None:
        """`count` requests come beside those that are under way or expected."""
        ahead = max((e.requests for e in self.expected), default=0)
        total = max(self.demand.level, ahead) + count
        self.expected = [*self.expected, Expected(total, until, chance, why)][-_EXPECTED:]

    def roll(self, now: float, stopwatch: Stopwatch | None = None) -> bool:
        """Close the minutes that are over; whether there was one."""
        if self.phase is None:
            return False
        current = math.floor((now - self.phase) / _MINUTE)
        passed = current - self._opened
        if passed <= 0:
            return False
        self._opened = current
        self.levels.close(self.peak, stopwatch)
        self.peak = self.demand.level
        if passed > _UNSEEN:
            self.levels.skip(passed - 1)
        else:
            for _ in range(passed - 1):
                self.levels.close(self.peak, stopwatch)
        self._foresee()
        return True

    def _foresee(self) -> None:
        """Up to where instances are worth their memory. It falls by half of the way each minute,
        since all instances of a burst look alike, and should not end together."""
        pays = max(
            (upto for upto, chance in self.levels.chances() if self._pays(chance)), default=0
        )
        self._why = None
        self._foreseen = max(pays, self._foreseen - max(1, (self._foreseen - pays + 1) // 2))

    @property
    def closes(self) -> float:
        """When its open minute is over."""
        return math.inf if self.phase is None else self.phase + (self._opened + 1) * _MINUTE

    @property
    def lively(self) -> bool:
        """It has to be looked at each second."""
        return bool(self.demand.level or self.expected or not self.reactive.calm)

    def evaluate(self, now: float) -> None:
        """Set `desired` and `wanted`."""
        self.demand.settle(now)
        self.desired = self.reactive.round(self.demand, now)
        self._promised = 0
        if self.expected:
            self.expected = [e for e in self.expected if e.until > now]
            paying = (e.requests for e in self.expected if self._pays(e.chance))
            self._promised = max(paying, default=0)
        self._unbounded = max(self.desired.instances, self.peak, self._foreseen, self._promised)
        self.wanted = self.bounds.within(self._unbounded)
        self._claims = None

    def _worth(self, chance: float) -> float:
        return chance * _GIB / self.bounds.mib

    def _pays(self, chance: float) -> bool:
        return self._worth(chance) >= self._policy.price

    def claims(self) -> list[Claim]:
        """What it wants, piece by piece, and what each is worth; as of the last `evaluate`."""
        if self._claims is None:
            self._claims = self._claimed()
        return self._claims

    def _claimed(self) -> list[Claim]:
        sure = min(self.demand.level, self.wanted)
        least = max(sure, self.bounds.least)
        found = []
        if sure:
            found.append(Claim(SERVING, self.key, 1, sure, self.bounds.mib))
        if least > sure:
            found.append(Claim(PROMISED, self.key, sure + 1, least - sure, self.bounds.mib))
        if self.wanted > least:
            found += self._open_claims(least)
        return found

    def _open_claims(self, above: int) -> list[Claim]:
        """Those for the instances above so many, cut where the chance changes."""
        steps = [*self.levels.chances(), (self.peak, _USED), (self.desired.instances, _DEMANDED)]
        steps += [(e.requests, e.chance) for e in self.expected]
        found = []
        for upto in sorted({min(upto, self.wanted) for upto, _ in steps}):
            if upto > above:
                chance = max(chance for end, chance in steps if end >= upto)
                found.append(
                    Claim(-self._worth(chance), self.key, above + 1, upto - above, self.bounds.mib)
                )
                above = upto
        return found

    def reason(self, keep: int) -> tuple[str, str]:
        """What decides that so many are kept, and that in words. `keep` is below `wanted` when the
        budget is short."""
        if keep < self.wanted:
            return "budget", "budget"
        if self.bounds.most is not None and keep == self.bounds.most < self._unbounded:
            return "max", "max"
        if not keep:
            return "idle", "idle"
        if keep > self._unbounded:
            return "min", "min"
        if keep == self.desired.instances:
            return self.desired.reason, self.desired.reason
        if keep == self._promised:
            return "expected", next(e.why for e in self.expected if e.requests == keep)
        if keep == self._foreseen:
            if self._why is None:
                self._why = self.levels.why(keep)
            return self._why
        return "used", "used within the minute"

    def chance(self, count: int) -> float:
        """That the next minute needs instance number `count`."""
        return next((chance for upto, chance in self.levels.chances() if upto >= count), 0.0)

    def saved(self) -> dict[str, Any]:
        """For `load`."""
        return {
            "phase": self.phase,
            "opened": self._opened,
            "peak": self.peak,
            "demand": self.demand.saved(),
            "levels": self.levels.saved(),
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave."""
        self.phase = None if data["phase"] is None else float(data["phase"])
        self._opened, self.peak = int(data["opened"]), int(data["peak"])
        self.demand.load(data["demand"])
        self.levels.load(data["levels"])
        self._foresee()
