"""A clock that only goes forward, made of one that may jump."""

from __future__ import annotations

import math

# What lies further ahead is a clock that was set, or a daemon that was down for long: the days
# beyond it are left out whole, so that the time of the day stays right.
_LEAP = 86400.0
# A step back as small is waited out: the clock stands still. After a longer one it goes on.
_SLACK = 60.0


class SteadyClock:
    """Seconds that never go back, and never ahead by more than a day at once."""

    __slots__ = ("_last", "_shift")

    def __init__(self) -> None:
        self._shift = 0.0
        self._last: float | None = None

    def read(self, now: float) -> float:
        """What the clock shows when the caller's shows `now`. ValueError for what is no number."""
        if not math.isfinite(now):
            raise ValueError(f"{now} is no time")
        here = now + self._shift
        last = self._last
        if last is not None:
            if last - _SLACK <= here < last:
                return last
            if here < last:
                here = last
            elif here > last + _LEAP:
                here = last + (here - last) % _LEAP
            self._shift = here - now
        self._last = here
        return here

    def saved(self) -> dict[str, float]:
        """For `load`."""
        return {"shift": self._shift} | ({} if self._last is None else {"last": self._last})

    def load(self, data: dict[str, float]) -> None:
        """Go on from where `saved` was called, on the same kind of clock."""
        self._shift, self._last = float(data["shift"]), data.get("last")
