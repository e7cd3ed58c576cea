"""How long a function stays away: a histogram of its idle times."""

from __future__ import annotations

from typing import Any, ClassVar

from templated.scaling.forecast.base import DAY, Forecast, Past, shrunk, usual

# Idle times of different lengths that are counted; and of any, before old ones fade.
_LENGTHS, _COUNTED = 240, 4096


class Histogram:
    """Of all times that the function stayed away so long, how many ended now?"""

    name: ClassVar[str] = "histogram"
    __slots__ = ("_counts", "_left", "_total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0
        self._left = 0
        """Idle times that were at least as long as the present one is."""

    def forecast(self, past: Past) -> Forecast:
        return shrunk(self._counts.get(past.gap, 0), self._left, past.gap)

    def learn(self, past: Past, needed: bool) -> None:
        if not needed:
            self._left -= self._counts.get(past.gap, 0)
            return
        if past.gap <= DAY:
            self._counts[past.gap] = self._counts.get(past.gap, 0) + 1
            self._total += 1
            if len(self._counts) > _LENGTHS or self._total > _COUNTED:
                self._fade()
        self._left = self._total

    def skip(self, past: Past, minutes: int) -> None:
        over = past.gap + minutes
        self._left -= sum(n for gap, n in self._counts.items() if past.gap <= gap < over)

    def why(self, past: Past) -> str:
        ahead = [(count, -gap) for gap, count in self._counts.items() if gap >= past.gap]
        if not ahead:
            return "histogram: never away so long"
        minutes = -max(ahead)[1] - past.gap
        return f"histogram: returns in {minutes} min" if minutes else "histogram: returns now"

    def _fade(self) -> None:
        """Halve all counts: what happened once goes, from the rarest on."""
        self._counts = {gap: count // 2 for gap, count in self._counts.items() if count > 1}
        self._total = sum(self._counts.values())

    def saved(self) -> dict[str, Any]:
        return {"counts": {str(gap): count for gap, count in self._counts.items()}}

    def load(self, data: dict[str, Any], past: Past) -> None:
        self._counts = {int(gap): int(count) for gap, count in data["counts"].items()}
        self._total = sum(self._counts.values())
        self._left = sum(count for gap, count in self._counts.items() if gap >= past.gap)


class Usual:
    """What functions do of which nothing is known: the longer away, the less likely to return."""

    name: ClassVar[str] = "usual"
    __slots__ = ()

    def forecast(self, past: Past) -> Forecast:
        return Forecast(usual(past.gap), 0.5)

    def learn(self, past: Past, needed: bool) -> None:
        """It never does."""

    def skip(self, past: Past, minutes: int) -> None:
        """As `learn`."""

    def why(self, past: Past) -> str:
        return f"used {past.gap} min ago"

    def saved(self) -> dict[str, Any]:
        return {}

    def load(self, data: dict[str, Any], past: Past) -> None:
        """There is nothing to take over."""
