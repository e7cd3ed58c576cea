"""How many lanes an egress should have, by what it carries. Pure: its caller has the clock."""

from __future__ import annotations

from collections import deque
from math import ceil

from templated.model.egress import EgressSpec
from templated.model.units import size_bytes

_FULL = 0.8
"""The part of its bandwidth above which a lane is to have another one beside it."""
_PORTS = 0.5
"""As much of the ports of a lane."""


def needed(spec: EgressSpec, rate: int, flows: int) -> int:
    """Lanes for so many bytes a second and so many flows, between the least and the most."""
    first, last = spec.ports(0)
    by_rate = ceil(rate / (_FULL * size_bytes(spec.bandwidth)))
    by_flows = ceil(flows / (_PORTS * (last - first + 1)))
    return min(max(by_rate, by_flows, spec.min), spec.max)


class Pace:
    """More lanes at once, fewer only once fewer have been enough for `quiet` seconds."""

    def __init__(self, quiet: float) -> None:
        self._quiet = quiet
        self._past: deque[tuple[float, int]] = deque()

    def wanted(self, now: float, need: int) -> int:
        """The most that was needed of late, with what is needed now."""
        while self._past and self._past[0][0] <= now - self._quiet:
            self._past.popleft()
        # What is not more than a later one never matters again.
        while self._past and self._past[-1][1] <= need:
            self._past.pop()
        self._past.append((now, need))
        return self._past[0][1]
