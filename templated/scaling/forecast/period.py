"""Timers: what happened one period ago happens again."""

from __future__ import annotations

from typing import Any, ClassVar

from templated.scaling.forecast.base import DAY, Forecast, Past, shrunk, usual

# Minutes. A timer with another period shows in the histogram of idle times, unless other
# requests come between.
PERIODS = (1, 5, 15, 60, DAY)
# What each trial leaves of those before.
_KEEP = 0.9


class Period:
    """Of the minutes one period after a need, how many were needed too? The best period counts."""

    name: ClassVar[str] = "period"
    __slots__ = ("_hits", "_trials")

    def __init__(self) -> None:
        self._hits = [0.0] * len(PERIODS)
        self._trials = [0.0] * len(PERIODS)

    def _best(self, past: Past) -> tuple[Forecast, int]:
        best, period = Forecast(usual(past.gap), 0.0), 0
        for at, minutes in enumerate(PERIODS):
            if past.bits >> (minutes - 1) & 1 and self._trials[at]:
                found = shrunk(self._hits[at], self._trials[at], past.gap)
                if found.chance > best.chance:
                    best, period = found, minutes
        return best, period

    def forecast(self, past: Past) -> Forecast:
        return self._best(past)[0]

    def learn(self, past: Past, needed: bool) -> None:
        for at, minutes in enumerate(PERIODS):
            if past.bits >> (minutes - 1) & 1:
                self._hits[at] = self._hits[at] * _KEEP + needed
                self._trials[at] = self._trials[at] * _KEEP + 1

    def skip(self, past: Past, minutes: int) -> None:
        """What was not seen teaches nothing."""

    def why(self, past: Past) -> str:
        period = self._best(past)[1]
        known = {0: "no period", 60: "period of an hour", DAY: "period of a day"}
        return known.get(period, f"period of {period} min")

    def saved(self) -> dict[str, Any]:
        return {"hits": self._hits, "trials": self._trials}

    def load(self, data: dict[str, Any], past: Past) -> None:
        self._hits = [float(hits) for hits in data["hits"]]
        self._trials = [float(trials) for trials in data["trials"]]
