"""Busy functions: how much there was lately, and whether it grows."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from templated.scaling.forecast.base import Forecast, Past

_HOUR = 60


class Rate:
    """The share of the last hour's minutes that needed the instance."""

    name: ClassVar[str] = "rate"
    __slots__ = ("_rate",)

    def __init__(self) -> None:
        self._rate = 1 / _HOUR  # a level is known from its first need on

    def forecast(self, past: Past) -> Forecast:
        return Forecast(self._rate, 0.5)

    def learn(self, past: Past, needed: bool) -> None:
        self._rate += (needed - self._rate) / _HOUR

    def skip(self, past: Past, minutes: int) -> None:
        self._rate *= (1 - 1 / _HOUR) ** minutes

    def why(self, past: Past) -> str:
        return f"rate: needed in {self._rate:.0%} of the last hour's minutes"

    def saved(self) -> dict[str, Any]:
        return {"rate": self._rate}

    def load(self, data: dict[str, Any], past: Past) -> None:
        self._rate = float(data["rate"])


# Of what the last minute was off, so much is taken into the level, the slope and the spread.
_LEVEL, _SLOPE, _SPREAD = 0.3, 0.05, 0.1


class Trend:
    """The most requests under way in a minute, smoothed with a slope (Holt), and how far off that
    was. One for a function; each level asks it through a `TrendAt`."""

    __slots__ = ("_level", "_slope", "_variance", "minutes")

    def __init__(self) -> None:
        self.minutes = 0
        self._level = self._slope = 0.0
        self._variance = 1.0

    def close(self, peak: int) -> None:
        """A minute is over."""
        self.minutes += 1
        off = peak - self.expected
        self._variance += _SPREAD * (off * off - self._variance)
        self._level = self.expected + _LEVEL * off
        self._slope += _SLOPE * off

    def skip(self, minutes: int) -> None:
        """Nothing is known of so many minutes: they count as idle."""
        for _ in range(min(minutes, 30)):
            self.close(0)

    @property
    def expected(self) -> float:
        """Requests under way at once in the next minute."""
        return max(0.0, self._level + self._slope)

    def chance(self, level: int) -> float:
        """That the next minute has at least so many at once, if what it is off is normal."""
        off = (level - 0.5 - self.expected) / math.sqrt(2 * self._variance + 1e-6)
        return 0.5 * math.erfc(off)

    def saved(self) -> dict[str, float]:
        """For `load`."""
        return {
            "minutes": self.minutes,
            "level": self._level,
            "slope": self._slope,
            "variance": self._variance,
        }

    def load(self, data: dict[str, float]) -> None:
        """Take over what `saved` gave."""
        self.minutes = int(data["minutes"])
        self._level, self._slope = float(data["level"]), float(data["slope"])
        self._variance = float(data["variance"])


class TrendAt:
    """What the function's trend says of one level."""

    name: ClassVar[str] = "trend"
    __slots__ = ("_level", "_trend")

    def __init__(self, trend: Trend, level: int) -> None:
        self._trend, self._level = trend, level

    def forecast(self, past: Past) -> Forecast:
        return Forecast(self._trend.chance(self._level), min(0.5, self._trend.minutes / 20))

    def learn(self, past: Past, needed: bool) -> None:
        """The function's trend is told once for all levels."""

    def skip(self, past: Past, minutes: int) -> None:
        """As `learn`."""

    def why(self, past: Past) -> str:
        return f"trend: {self._trend.expected:.1f} at once in the next minute"

    def saved(self) -> dict[str, Any]:
        return {}

    def load(self, data: dict[str, Any], past: Past) -> None:
        """It keeps nothing."""
