"""What followed when the minutes before looked as they do now."""

from __future__ import annotations

from typing import Any, ClassVar

from templated.scaling.forecast.base import Forecast, Past, shrunk

# Situations that are remembered, and what each time in a situation leaves of those before.
_SITUATIONS, _KEEP = 256, 0.97
_BITS = 0xFF
_NEVER = (0.0, 0.0)


class Situations:
    """For each situation: how often the next minute needed the instance, and how often not."""

    name: ClassVar[str] = ""
    __slots__ = ("_seen",)

    def __init__(self) -> None:
        # The situation that came up last is the last.
        self._seen: dict[int, tuple[float, float]] = {}

    def now(self, past: Past) -> int:
        """The number of the present situation."""
        raise NotImplementedError

    def forecast(self, past: Past) -> Forecast:
        hits, trials = self._seen.get(self.now(past), _NEVER)
        return shrunk(hits, trials, past.gap)

    def learn(self, past: Past, needed: bool) -> None:
        now = self.now(past)
        hits, trials = self._seen.pop(now, _NEVER)
        self._seen[now] = (hits * _KEEP + needed, trials * _KEEP + 1)
        if len(self._seen) > _SITUATIONS:
            del self._seen[next(iter(self._seen))]

    def skip(self, past: Past, minutes: int) -> None:
        """What was not seen teaches nothing."""

    def why(self, past: Past) -> str:
        raise NotImplementedError

    def saved(self) -> dict[str, Any]:
        return {"seen": [[now, *counts] for now, counts in self._seen.items()]}

    def load(self, data: dict[str, Any], past: Past) -> None:
        self._seen = {int(now): (float(hits), float(trials)) for now, hits, trials in data["seen"]}


class Rhythm(Situations):
    """Idle times that depend on the one before, as when a function runs twice each hour."""

    name: ClassVar[str] = "rhythm"
    __slots__ = ()

    def now(self, past: Past) -> int:
        return min(past.before, 200) << 16 | min(past.gap, 0xFFFF)

    def why(self, past: Past) -> str:
        return f"rhythm: {past.gap} min after one of {past.before} min"


class Pattern(Situations):
    """Which of the last eight minutes needed the instance."""

    name: ClassVar[str] = "pattern"
    __slots__ = ()

    def now(self, past: Past) -> int:
        return past.bits & _BITS

    def why(self, past: Past) -> str:
        return f"pattern: {(past.bits & _BITS).bit_count()} of the last 8 min"
