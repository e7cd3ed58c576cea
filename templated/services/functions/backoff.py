"""Waiting after failures: longer each time, and never everybody at the same moment."""

from __future__ import annotations

import asyncio
import math
import random as randomness
from collections.abc import Callable
from dataclasses import dataclass

# Beyond this many failures in a row the wait has long been the longest.
_DOUBLINGS = 30


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The first wait and the longest one, in seconds; `random` draws from 0 to 1."""

    first: float = 1.0
    longest: float = 30.0
    random: Callable[[], float] = randomness.random


class Backoff:
    """Failures in a row of one thing, and until when it is not tried again."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._last = -math.inf
        self.failures = 0
        self.until = -math.inf
        """By the loop's clock."""
        self.error: BaseException | None = None
        """What the last failure was."""

    def failed(self, began: float, error: BaseException) -> bool:
        """Something that began then has failed. Whether it counts: of those that ran side by
        side one does, or else a burst would be followed by the longest wait."""
        self.error = error
        if began < self._last:
            return False
        self._last = _now()
        self.failures += 1
        wait = self._pace.first * 2.0 ** min(self.failures - 1, _DOUBLINGS)
        # Between a half and all of it.
        self.until = self._last + min(wait, self._pace.longest) * (1 + self._pace.random()) / 2
        return True

    def succeeded(self) -> None:
        """It works again."""
        self.failures = 0
        self.until = -math.inf
        self.error = None

    @property
    def wait(self) -> float:
        """Seconds until it is tried again; 0 when it may be now."""
        return max(0.0, self.until - _now()) if self.failures else 0.0


def _now() -> float:
    return asyncio.get_running_loop().time()
