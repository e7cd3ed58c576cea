"""Who seems to call whom, by timing alone.

Where nothing says who called a function, those that began shortly before are suspects, each with a
histogram of lags (a cross-correlogram). An unrelated function is as likely at one lag as at any
other, so that the rest of the histogram tells what chance makes of a peak: how busy the two are
need not be known.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass

REACH = 20.0
"""The longest lag that is looked at, in seconds."""
# Bins of lags grow by this factor, the first is 5 ms: a lag of 5 s is as stable as one of 50 ms
# when both vary by a tenth.
_FIRST, _FACTOR = 0.005, 1.4
_EDGES = [0.0, _FIRST]
while _EDGES[-1] * _FACTOR < REACH:
    _EDGES.append(_EDGES[-1] * _FACTOR)
_EDGES.append(REACH)
_BINS = len(_EDGES) - 1
_BIN = [bytes((at,)) for at in range(_BINS)]
# A peak is at most so many bins wide: its longest lag is 2.7 times its shortest.
_WIDEST = 3
# Windows with a hit before anything is believed, and the share of them that a peak needs: what
# follows less often is not worth an instance.
_FEWEST, _SHARE = 4, 0.4
# How unlikely chance must be, as the logarithm of its odds: e**-16 is one in nine million, since
# each pair is looked at again with every start.
_SURPRISE = 16.0
# Hits of one window that count: more there cannot be, unless its clock is set back again and again.
_MOST = 255
# Windows that are remembered; after which one with few hits is let off.
_KEPT, _TRIAL, _HOPELESS = 32, 5, 0.4


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

    __slots__ = ("_counts", "_first", "_windows")

    def __init__(self, window: int) -> None:
        self._first = window
        self._counts = array("H", bytes(2 * _BINS))
        # The bins that were hit in each window with a hit, the oldest first.
        self._windows: dict[int, bytes] = {}

    def hit(self, lag: float, window: int) -> Peak | None:
        """Count a start, `lag` seconds (0 to `REACH`) into the open window; the peak if one stands
        out there now."""
        self._forget(window)
        counts, at = self._counts, min(bisect_right(_EDGES, lag), _BINS) - 1
        hits = self._windows.get(window, b"")
        if len(hits) >= _MOST:
            return None
        self._windows[window] = hits + _BIN[at]
        counts[at] += 1
        least = max(_FEWEST, _SHARE * self._seen(window))
        # What is near may be all of a peak.
        if sum(counts[max(at - _WIDEST + 1, 0) : at + _WIDEST]) < least:
            return None
        return self._peak(at, window, least)

    def hopeless(self, window: int) -> bool:
        """Whether it has had its time, and follows too seldom."""
        self._forget(window)
        seen = self._seen(window)
        return seen >= _TRIAL and len(self._windows) < _HOPELESS * seen

    def _forget(self, window: int) -> None:
        windows = self._windows
        while windows and (oldest := next(iter(windows))) <= window - _KEPT:
            for at in windows.pop(oldest):
                self._counts[at] -= 1

    def _seen(self, window: int) -> int:
        return min(window - self._first + 1, _KEPT)

    def _peak(self, at: int, window: int, least: float) -> Peak | None:
        """The most surprising peak of those that have the bin `at`."""
        counts, best, most = self._counts, None, _SURPRISE
        total, seen = sum(counts), self._seen(window)
        for width in range(1, _WIDEST + 1):
            for first in range(max(at - width + 1, 0), min(at, _BINS - width) + 1):
                inside = sum(counts[first : first + width])
                begin, end = _EDGES[first], _EDGES[first + width]
                if _surprise(inside, total - inside, (end - begin) / REACH) < most:
                    continue
                # Once more with each window counting once, however many there were in it.
                found = self._found(first, first + width)
                surprise = _surprise(found, total - inside, (end - begin) / REACH)
                if found >= least and surprise >= most:
                    best, most = Peak(begin, end, found, seen), surprise
        return best

    def _found(self, first: int, last: int) -> int:
        return sum(1 for hits in self._windows.values() if any(first <= at < last for at in hits))


def _surprise(inside: int, outside: int, part: float) -> float:
    """How unlikely so many hits are inside of a part of the histogram, had each hit fallen
    anywhere (Chernoff's bound on the tail of a binomial, as a logarithm)."""
    total = inside + outside
    share = inside / total
    if share <= part:
        return 0.0
    rest = outside * math.log((1 - share) / (1 - part)) if outside else 0.0
    return inside * math.log(share / part) + rest
