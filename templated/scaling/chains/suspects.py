"""Who seems to call whom, by timing alone.

Where nothing says who called a function, those that began shortly before are suspects, each with a
histogram of lags (a cross-correlogram). An unrelated function starts as often at one lag as at any
other, so that the rest of the histogram tells what chance makes of a peak: how busy the two are
need not be known.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

REACH = 10.0
"""The longest lag that is looked at, in seconds."""
# Bins of lags grow by this factor, the first is 5 ms: a lag of 5 s is as stable as one of 50 ms
# when both vary by a tenth.
_FIRST, _FACTOR = 0.005, 1.4
_EDGES = [0.0, _FIRST]
while _EDGES[-1] * _FACTOR < REACH:
    _EDGES.append(_EDGES[-1] * _FACTOR)
_EDGES.append(REACH)
_BINS = len(_EDGES) - 1
# A peak is at most so many bins wide: its longest lag is 2.7 times its shortest.
_WIDEST = 3
_FEWEST = 4
"""Windows with a hit before anything is believed."""
_SHARE = 0.4
"""Of the windows that a peak needs; what follows less often is not worth an instance."""
# How unlikely chance must be, as the logarithm of its odds: e**-16 is one in nine million, since
# each pair is looked at again with every start.
_SURPRISE = 16.0
# Windows that a peak is looked for in; after which the past of the counts is halved; after which
# one with few hits is let off.
_KEPT, _HALVE, _TRIAL, _HOPELESS = 32, 64, 8, 0.25
# Spans of lags that a function is in by chance in half of all windows tell nothing.
_COMMON = 0.5


@dataclass(frozen=True)
class Peak:
    """Lags, in seconds, at which one function follows another more often than chance has it."""

    first: float
    last: float
    found: int
    """Windows in which it was there."""
    seen: int
    """Of so many."""


class Suspect:
    """How often one function began at each lag after another, over the other's windows.

    A window is the `REACH` seconds after a start of the other; they do not overlap. They are
    numbered from 1 by whom they belong to.
    """

    __slots__ = ("_counted", "_counts", "_first", "_windows")

    def __init__(self, window: int) -> None:
        self._first = window
        self._counts = bytearray(_BINS)
        self._counted = window - 1
        # Of each window with a hit, the bins that were hit, as bits: a burst counts once.
        self._windows: dict[int, int] = {}

    def hit(self, lag: float, window: int) -> Peak | None:
        """Count a start, `lag` seconds (0 to `REACH`) into the open window; the peak if one stands
        out there now."""
        at = min(bisect_right(_EDGES, lag), _BINS) - 1
        if window - self._counted >= _HALVE or self._counts[at] == 255:
            self._counted += (window - self._counted) // 2
            self._counts = bytearray(count // 2 for count in self._counts)
        self._counts[at] += 1
        windows = self._windows
        while windows and (oldest := next(iter(windows))) <= window - _KEPT:
            del windows[oldest]
        windows[window] = windows.get(window, 0) | 1 << at
        return self._peak(at, window) if len(windows) >= _FEWEST else None

    def hopeless(self, window: int) -> bool:
        """Whether it has had its time, and follows too seldom."""
        seen = min(window - self._first + 1, _KEPT)
        hits = sum(1 for number in self._windows if number > window - _KEPT)
        return seen >= _TRIAL and hits < _HOPELESS * seen

    def _peak(self, at: int, window: int) -> Peak | None:
        """The most surprising peak of those that have the bin `at`."""
        counts, best, most = self._counts, None, _SURPRISE
        total, counted = sum(counts), window - self._counted
        seen = min(window - self._first + 1, _KEPT)
        for width in range(1, _WIDEST + 1):
            for first in range(max(at - width + 1, 0), min(at, _BINS - width) + 1):
                begin, end = _EDGES[first], _EDGES[first + width]
                others = total - sum(counts[first : first + width])
                chance = _chance(others, end - begin, counted)
                if chance > _COMMON:
                    continue
                bits = ((1 << width) - 1) << first
                found = sum(1 for hits in self._windows.values() if hits & bits)
                share = found / seen
                if found < _FEWEST or share < _SHARE:
                    continue
                surprise = seen * _divergence(share, chance)
                if surprise >= most:
                    best, most = Peak(begin, end, found, seen), surprise
        return best


def _chance(others: int, span: float, windows: int) -> float:
    """How likely a hit in a span of lags is, going by the hits in all others; with one more of
    them, so that none seen is not none possible."""
    return -math.expm1(-(others + 1) * span / (windows * (REACH - span)))


def _divergence(share: float, chance: float) -> float:
    """What one window adds to the surprise (Chernoff's bound on the tail of a binomial)."""
    if share <= chance:
        return 0.0
    if share >= 1:
        return -math.log(chance)
    return share * math.log(share / chance) + (1 - share) * math.log((1 - share) / (1 - chance))
