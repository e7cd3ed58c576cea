"""Others that decide: fixed keep-alive, Knative, a clamp with spare instances, and an oracle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from templated.bench.scaling.replay import Outcome
from templated.bench.scaling.trace import Row


class Fixed:
    """Keeps each instance for so many minutes after its last use; the last used serve first."""

    def __init__(self, minutes: int) -> None:
        self._minutes = minutes
        # The minute of the last use of each instance; those in front were used last.
        self._used: list[int] = []

    def ready(self, minute: int) -> int:
        while self._used and minute - self._used[-1] > self._minutes:
            self._used.pop()
        return len(self._used)

    def saw(self, minute: int, need: int) -> None:
        self._used[:need] = [minute] * need


class Knative:
    """Its autoscaler, but for the window, in minutes: by default one.

    One request at a time each. Its target is a use of 70 %, which would keep two where one is
    needed; here it is 100 %, in its favour. The panic window is a tenth of the stable one, as far
    as minutes are that fine; in a panic nothing shrinks.
    """

    def __init__(self, window: int) -> None:
        self._window, self._short = window, max(1, window // 10)
        self._needs: deque[int] = deque([0] * window, maxlen=window)
        self._ready = 0
        self._until = -1

    def ready(self, minute: int) -> int:
        stable = math.ceil(sum(self._needs) / self._window)
        short = math.ceil(sum(list(self._needs)[-self._short :]) / self._short)
        if short >= 2 * max(1, self._ready):
            self._until = minute + self._window
        panic = minute < self._until
        self._ready = max(self._ready, short, stable) if panic else stable
        return self._ready

    def saw(self, minute: int, need: int) -> None:
        self._needs.append(need)


class Clamp:
    """What the last minutes needed at most and one in reserve, clamped to what was ever needed."""

    def __init__(self, minutes: int, spare: int = 1) -> None:
        self._spare = spare
        self._needs: deque[int] = deque(maxlen=minutes)
        self._most = 0

    def ready(self, minute: int) -> int:
        most = max(self._needs, default=0)
        return min(self._most, most + self._spare) if most else 0

    def saw(self, minute: int, need: int) -> None:
        self._needs.append(need)
        self._most = max(self._most, need)


def oracle(rows: Sequence[Row]) -> list[tuple[int, Outcome]]:
    """Knows when each instance is needed next, and ends it or keeps it until then; starts nothing
    ahead, or it would have no cold start and hold nothing in vain. It keeps those with the
    shortest idle times: for each limit to them, in minutes, the sum over all functions."""
    gaps: dict[int, int] = {}
    needed = cold = 0
    for row in rows:
        used: list[int] = []
        needed += sum(row.needs)
        for minute, need in enumerate(row.needs):
            for last in used[:need]:
                gaps[minute - last - 1] = gaps.get(minute - last - 1, 0) + 1
            cold += max(0, need - len(used))
            used[:need] = [minute] * need
    cold += sum(gaps.values())
    points = []
    held = needed
    for gap in sorted(gaps):
        cold -= gaps[gap]
        held += gap * gaps[gap]
        points.append((gap, Outcome(cold, held)))
    return points
