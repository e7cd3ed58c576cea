"""The hybrid histogram policy of "Serverless in the Wild" (Shahrad et al., ATC'20).

A histogram of idle times in minutes, over four hours. While it is representative (its bins'
coefficient of variation is at least 2), an instance goes after use, comes back at the head of the
histogram, and stays until its tail, each with a margin of 10 %; otherwise it stays for a fixed
time. Times beyond the histogram would be forecast by ARIMA, which matters for functions that are
invoked less than six times a day; they keep the fixed time here. Each of several instances has a
histogram of its own, which is more than the paper has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_RANGE, _VARIATION, _MARGIN = 240, 2.0, 0.1


class Setting(NamedTuple):
    """What is swept."""

    fixed: int
    """Minutes to keep what has no representative histogram; four hours in the paper."""
    head: float
    """The share of idle times before an instance is back; 0.05 in the paper."""
    tail: float
    """The share of idle times after which it goes; 0.99 in the paper."""


class _Histogram:
    """The idle times of one instance."""

    def __init__(self) -> None:
        self.last = 0
        self._counts = [0] * _RANGE
        self._inside = self._outside = self._squares = 0
        self._window: tuple[int, int] | None = None
        self._fresh = False

    def used(self, minute: int) -> None:
        """It ends an idle time."""
        idle, self.last = minute - self.last - 1, minute
        if idle >= _RANGE:
            self._outside += 1
        else:
            self._squares += 2 * self._counts[idle] + 1
            self._counts[idle] += 1
            self._inside += 1
        self._fresh = True

    def window(self, head: float, tail: float) -> tuple[int, int] | None:
        """Idle minutes after which it is back, and goes; None while it is not representative."""
        if self._fresh:
            self._fresh, self._window = False, None
            if self._representative():
                first = math.floor(self._quantile(head) * (1 - _MARGIN))
                last = math.ceil((self._quantile(tail) + 1) * (1 + _MARGIN))
                self._window = first, last
        return self._window

    def _representative(self) -> bool:
        if not self._inside or self._outside > self._inside:
            return False
        mean = self._inside / _RANGE
        return math.sqrt(self._squares / _RANGE - mean * mean) >= _VARIATION * mean

    def _quantile(self, share: float) -> int:
        reached = 0
        for idle, count in enumerate(self._counts):
            reached += count
            if count and reached >= share * self._inside:
                return idle
        return _RANGE - 1


class Hybrid:
    """One function's."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._instances: list[_Histogram] = []

    def ready(self, minute: int) -> int:
        """Up to the last instance that is kept: who serves second needs the first."""
        for count in range(len(self._instances), 0, -1):
            if self._keeps(self._instances[count - 1], minute):
                return count
        return 0

    def _keeps(self, instance: _Histogram, minute: int) -> bool:
        fixed, head, tail = self._setting
        idle = minute - instance.last - 1
        window = instance.window(head, tail)
        if window is None:
            return idle < fixed
        return window[0] <= idle <= window[1]

    def saw(self, minute: int, need: int) -> None:
        for instance in self._instances[:need]:
            instance.used(minute)
        for _ in range(len(self._instances), need):
            self._instances.append(_Histogram())
            self._instances[-1].last = minute
