"""How many requests of a version are under way, and were: finely now, coarsely long ago."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from templated.scaling.ring import Ring

# Seconds in a slot and slots that are kept: one minute and a bit, three hours, a week.
SECOND, MINUTE, HOUR = 1.0, 60.0, 3600.0
_KEPT = {SECOND: 64, MINUTE: 180, HOUR: 168}
_STARTS = 16
# Minutes that are counted of a time in which nobody looked: a day.
_LONGEST = 1440
BUSY = 600.0
"""Seconds: the time constant of `Demand.busy`, and so the most that it can be."""


class History:
    """What was, by slots of one width."""

    __slots__ = ("arrivals", "load", "peak", "waiting", "width")

    def __init__(self, width: float) -> None:
        slots = _KEPT[width]
        self.width = width
        self.load = Ring(slots)
        """The integral of the requests under way: request-seconds."""
        self.waiting = Ring(slots)
        """The same for those of them that waited for an instance."""
        self.peak = Ring(slots)
        """The most that were under way at once."""
        self.arrivals = Ring(slots)

    def add(self, at: float, minute: Minute) -> None:
        """What a minute, or a part of it, brought that began at `at`."""
        slot = math.floor(at / self.width)
        self.load.add(slot, minute.load)
        self.waiting.add(slot, minute.waiting)
        self.peak.raise_to(slot, minute.peak)
        self.arrivals.add(slot, minute.arrivals)

    def saved(self) -> dict[str, Any]:
        """For `load_from`."""
        return {name: getattr(self, name).saved() for name in _RINGS}

    def load_from(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave."""
        for name in _RINGS:
            getattr(self, name).load(data[name])


_RINGS = ("load", "waiting", "peak", "arrivals")


class Minute:
    """What is counted until the minute is over: requests cost no more than this."""

    __slots__ = ("arrivals", "load", "peak", "waiting")

    def __init__(self, peak: int) -> None:
        self.load = self.waiting = 0.0
        self.arrivals = 0
        self.peak = peak


class Demand:
    """The demand of one version. Times are seconds of a clock that only goes forward."""

    __slots__ = (
        "_at",
        "_busy",
        "_minute",
        "_number",
        "hours",
        "level",
        "minutes",
        "seconds",
        "starts",
        "waiting",
    )

    def __init__(self) -> None:
        self.level = 0
        """Requests under way now, those included that wait for an instance."""
        self.waiting = 0
        """Those that wait."""
        self.seconds = Ring(_KEPT[SECOND])
        self.minutes = History(MINUTE)
        """Without the minute that is still open, as `hours`; see `flush`."""
        self.hours = History(HOUR)
        self.starts: deque[float] = deque(maxlen=_STARTS)
        self._at = -math.inf
        self._busy = 0.0
        self._number = 0
        self._minute = Minute(0)

    def change(self, now: float, level: int, waiting: int = 0) -> None:
        """From `now` on `level` requests are under way; a rise is so many arrivals."""
        self.settle(now)
        if level > self.level:
            self._minute.arrivals += level - self.level
            if level > self._minute.peak:
                self._minute.peak = level
        self.level, self.waiting = level, waiting

    def settle(self, now: float) -> None:
        """Count what passed since the last change."""
        start, self._at = self._at, now
        number = int(now // MINUTE)
        if start == -math.inf:
            self._number = number
        elif now > start:
            keep = math.exp((start - now) / BUSY)
            self._busy *= keep
            if self.level:
                self._busy += BUSY * (1 - keep)
                self._by_seconds(start, now)
            if number != self._number:
                start = self._close(start, number)
            if self.level:
                self._minute.load += self.level * (now - start)
                self._minute.waiting += self.waiting * (now - start)

    def _close(self, start: float, number: int) -> float:
        """Minutes are over, and number `number` began; when it did, or `start` if that is later."""
        while self._number < number:
            if self.level:
                over = (self._number + 1) * MINUTE
                seconds = over - max(start, over - MINUTE)
                self._minute.load += self.level * seconds
                self._minute.waiting += self.waiting * seconds
            self.flush()
            following = self._number + 1
            self._number = max(following, number - _LONGEST) if self.level else number
        return max(start, number * MINUTE)

    def flush(self) -> None:
        """Write what the open minute has so far to `minutes` and `hours`."""
        if self._minute.peak:
            begin = self._number * MINUTE
            self.minutes.add(begin, self._minute)
            self.hours.add(begin, self._minute)
            self._minute = Minute(self.level)

    def _by_seconds(self, start: float, end: float) -> None:
        first, last = math.floor(start), math.floor(end)
        if first == last:  # the usual case, on the path of every request
            self.seconds.add(first, self.level * (end - start))
            return
        for slot in range(max(first, last - self.seconds.slots + 1), last + 1):
            self.seconds.add(slot, self.level * (min(end, slot + 1) - max(start, slot)))

    def mean(self, now: float, window: int) -> float:
        """Requests under way, on average over the last `window` seconds, the present one included.

        `settle` must have been called for `now`.
        """
        second = math.floor(now)
        return self.seconds.total(second - window + 1, second) / (window - 1 + now - second)

    @property
    def busy(self) -> float:
        """Seconds with requests under way, of which those long ago count little: at most 600."""
        return self._busy

    @property
    def start_time(self) -> float:
        """The median of the last starts in seconds; 0 when there was none."""
        return statistics.median(self.starts) if self.starts else 0.0

    def saved(self) -> dict[str, Any]:
        """What is worth keeping over a restart. Requests that are under way end with the daemon."""
        self.flush()
        return {
            "at": self._at if math.isfinite(self._at) else None,
            "busy": self._busy,
            "minutes": self.minutes.saved(),
            "hours": self.hours.saved(),
            "starts": list(self.starts),
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave."""
        self._at = -math.inf if data["at"] is None else float(data["at"])
        self._number = 0 if data["at"] is None else int(self._at // MINUTE)
        self._busy = float(data["busy"])
        self.minutes.load_from(data["minutes"])
        self.hours.load_from(data["hours"])
        self.starts.extend(data["starts"])
