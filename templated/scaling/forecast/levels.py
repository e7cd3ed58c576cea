"""The forecasts of one function: one for each number of instances, more coarsely for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from templated.scaling.forecast.base import Forecaster
from templated.scaling.forecast.level import Level, Stopwatch, forecasters
from templated.scaling.forecast.trend import Trend

Makers = Callable[[int, Trend], list[Forecaster]]
# Up to here each instance has a forecast of its own; above, groups grow with their place.
_SINGLE, _GROWTH = 8, 8
# A function's levels end here: 80 forecasts.
_MOST = 10_000


def following(first: int) -> int:
    """Where the level after the one that begins at `first` begins."""
    return first + max(1, first // _GROWTH) if first >= _SINGLE else first + 1


class Levels:
    """What each of a function's instances is needed for, as far as was ever needed."""

    __slots__ = ("_makers", "_trend", "highest", "levels")

    def __init__(self, makers: Makers = forecasters) -> None:
        self._makers = makers
        self._trend = Trend()
        self.levels: list[Level] = []
        self.highest = 0
        """The most requests that were ever under way at once."""

    def close(self, peak: int, stopwatch: Stopwatch | None = None) -> None:
        """A minute is over, in which at most `peak` requests were under way at once."""
        self._trend.close(peak)
        for level in self.levels:
            level.close(peak >= level.first, stopwatch)
        self._extend(peak)

    def _extend(self, peak: int) -> None:
        """Levels that are needed for the first time."""
        self.highest = max(self.highest, peak)
        first = following(self.levels[-1].first) if self.levels else 1
        while first <= min(peak, _MOST):
            level = Level(first, self._makers(first, self._trend))
            level.forecast()
            self.levels.append(level)
            first = following(first)

    @property
    def idle(self) -> bool:
        """The last minute needed nothing, but one before did."""
        return bool(self.levels) and self.levels[0].past.gap > 1

    def skip(self, minutes: int) -> None:
        """Nothing is known of so many minutes."""
        self._trend.skip(minutes)
        for level in self.levels:
            level.skip(minutes)

    def chances(self) -> list[tuple[int, float]]:
        """Groups of instances, from the first on: how many there are up to and with the group, and
        the chance that the next minute needs it. It never rises on the way: who needs the fifth
        instance needs the fourth."""
        found = []
        chance, upto = 0.0, self.highest
        for level in reversed(self.levels):
            chance = max(chance, level.chance)
            found.append((upto, chance))
            upto = level.first - 1
        found.reverse()
        return found

    def why(self, count: int) -> tuple[str, str]:
        """Which forecaster speaks for the instance number `count`, and what it says."""
        for level in reversed(self.levels):
            if level.first <= count:
                return level.why
        return "", ""

    def failed(self) -> list[tuple[str, str]]:
        """Forecasters that were left out since the last call, and why."""
        found = []
        for level in self.levels:
            found += level.failed
            level.failed = []
        return found

    def saved(self) -> dict[str, Any]:
        """For `load`."""
        return {
            "highest": self.highest,
            "trend": self._trend.saved(),
            "levels": [level.saved() for level in self.levels],
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave."""
        self.highest = int(data["highest"])
        self._trend.load(data["trend"])
        for row in data["levels"]:
            level = Level(int(row["first"]), self._makers(int(row["first"]), self._trend))
            level.load(row)
            self.levels.append(level)
