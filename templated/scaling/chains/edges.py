"""One edge of a call chain: what one function's runs have led to in another."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

REMEMBERED = 16
"""Runs of the caller that an edge remembers: what a function no longer does is out after these."""
# Of the spread of the lags seen, this much is added at both ends: the next is outside of the
# extremes of 16 in one case of eight.
_MARGIN, _LEAST_MARGIN = 0.25, 0.005
# Quantile of the normal distribution for the lower bound of a share: one-sided 90 %.
_Z = 1.28
# Starts that timing alone gives to an edge: of lags so much shorter and longer than the usual one,
# and, since short ones vary more, so many seconds beside that.
_SHORTER, _LONGER, _OFF = 0.4, 2.0, 0.05
# An edge that is that rare is none, once enough runs have been seen.
_RARE, _ENOUGH = 0.1, 10


class Outcome(NamedTuple):
    """What one run of the caller led to: lags are in seconds after its handler began."""

    first: float
    last: float
    most: int
    """How many ran at once."""


@dataclass(eq=False)
class Edge:
    """That `caller` calls `callee`, or that it is followed by it."""

    caller: str
    callee: str
    traced: bool
    """It is known from requests that said who made them; otherwise from timing alone."""
    seen: float
    """When it was last confirmed."""

    def __post_init__(self) -> None:
        self._outcomes: deque[Outcome | None] = deque(maxlen=REMEMBERED)
        self.share = 0.0
        """Of the caller's runs, how many led to it."""
        self.sure = 0.0
        """A lower bound of that share: 3 of 3 runs are less sure than 16 of 16."""
        self.first = self.last = self.typical = 0.0
        """Lags in seconds: the earliest and the latest to expect, and the usual one."""
        self.count = 0
        """The most that ran at once for one run of the caller."""

    @property
    def outcomes(self) -> Sequence[Outcome | None]:
        """Of the last runs, oldest first; None: it was not called."""
        return tuple(self._outcomes)

    @property
    def rare(self) -> bool:
        """Whether it is hardly ever taken."""
        return len(self._outcomes) >= _ENOUGH and self.share < _RARE

    def ran(self, *outcomes: Outcome | None) -> None:
        """Runs of the caller are over."""
        self._outcomes.extend(outcomes)
        hits = [outcome for outcome in self._outcomes if outcome]
        if not hits:
            self.share = self.sure = 0.0
            return
        runs = len(self._outcomes)
        self.share, self.sure = len(hits) / runs, _lower(len(hits), runs)
        first, last = min(hit.first for hit in hits), max(hit.last for hit in hits)
        margin = _LEAST_MARGIN + _MARGIN * (last - first)
        self.first, self.last = max(first - margin, 0.0), last + margin
        self.typical = sorted(hit.first for hit in hits)[len(hits) // 2]
        self.count = max(hit.most for hit in hits)

    def fits(self, lag: float) -> bool:
        """Whether a start that nobody is known to have made may be one of this edge.

        Measured by the usual lag, not by the extremes: those would drift apart.
        """
        return _SHORTER * self.typical - _OFF <= lag <= _LONGER * self.typical + _OFF

    def by_chance(self, pause: float | None) -> bool:
        """Whether a callee that arrives every `pause` seconds would seem to follow as often."""
        if self.traced or not pause:
            return False
        span = (_LONGER - _SHORTER) * self.typical + 2 * _OFF
        return self.sure < -math.expm1(-span / pause)


def at_once(lags: Sequence[float], took: float | None) -> int:
    """How many of the starts at `lags` ran at once, when each takes `took` seconds."""
    if took is None:
        return len(lags)
    most = begin = 0
    lags = sorted(lags)
    for end, lag in enumerate(lags):
        while lag - lags[begin] > took:
            begin += 1
        most = max(most, end - begin + 1)
    return most


def _lower(hits: int, runs: int) -> float:
    """Wilson's lower bound of a share."""
    share, z2 = hits / runs, _Z * _Z
    spread = _Z * math.sqrt(share * (1 - share) / runs + z2 / (4 * runs * runs))
    return (share + z2 / (2 * runs) - spread) / (1 + z2 / runs)
