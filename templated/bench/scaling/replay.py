"""Replays a trace minute by minute, under one rule for all who decide.

What is kept ready for a minute is decided before it. What a minute needs beyond that is a cold
start. Held in the minute are all that were kept ready, and those that started cold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from templated.bench.scaling.trace import Row, Trace
from templated.scaling import Bounds, Policy, Scaler

# A function was active in the last so many minutes: what the promise of no cold start is about.
_ACTIVE = 10
# Seconds within a minute from which, and until which, what it needs is under way.
_BEGIN, _END = 30.0, 45.0
# Each instance is this large where instances count and not their memory: a price is a chance then.
_UNIT = 1024.0


@dataclass(frozen=True)
class Outcome:
    """What one way to decide came to."""

    cold: int = 0
    """Cold starts."""
    held: int = 0
    """Instance-minutes."""
    gib: float = 0.0
    """The same by memory: GiB-minutes."""
    active: int = 0
    """Instances needed by functions that were invoked in the ten minutes before."""
    active_cold: int = 0
    """Those of them that started cold."""

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.cold + other.cold,
            self.held + other.held,
            self.gib + other.gib,
            self.active + other.active,
            self.active_cold + other.active_cold,
        )

    @property
    def warm(self) -> float:
        """The share of active functions' starts that found an instance, in per cent."""
        return 100.0 * (1 - self.active_cold / self.active) if self.active else 100.0


def total(outcomes: Iterable[Outcome]) -> Outcome:
    """The sum."""
    return sum(outcomes, Outcome())


class Tally:
    """Counts for one function, by the rule."""

    def __init__(self, row: Row) -> None:
        self._mib = row.mib
        self._cold = self._held = self._active = self._active_cold = 0
        self._last = -_ACTIVE - 1

    def minute(self, minute: int, ready: int, need: int) -> None:
        """So many were kept ready, so many were needed."""
        cold = max(0, need - ready)
        self._cold += cold
        self._held += max(ready, need)
        if need:
            if minute - self._last <= _ACTIVE:
                self._active += need
                self._active_cold += cold
            self._last = minute

    def outcome(self) -> Outcome:
        """The counts."""
        gib = self._held * self._mib / 1024
        return Outcome(self._cold, self._held, gib, self._active, self._active_cold)


class Keeper(Protocol):
    """Decides for one function, with what it saw so far."""

    def ready(self, minute: int) -> int:
        """How many instances are kept for this minute."""
        ...

    def saw(self, minute: int, need: int) -> None:
        """How many it needed."""
        ...


def replay(rows: Sequence[Row], keeper: Callable[[], Keeper]) -> list[Outcome]:
    """An outcome for each function, with a keeper of its own each."""
    outcomes = []
    for row in rows:
        tally, decides = Tally(row), keeper()
        for minute, need in enumerate(row.needs):
            tally.minute(minute, decides.ready(minute), need)
            decides.saw(minute, need)
        outcomes.append(tally.outcome())
    return outcomes


def replay_scaler(trace: Trace, policy: Policy, *, by_memory: bool = False) -> list[Outcome]:
    """An outcome for each function, as the daemon's own scaler decides for all of them."""
    scaler = Scaler(policy)
    for row in trace.rows:
        scaler.add(row.name, Bounds(mib=row.mib if by_memory else _UNIT))
    tallies = [Tally(row) for row in trace.rows]
    for minute in range(trace.minutes):
        begin = minute * 60.0
        scaler.round(begin)
        for row, tally in zip(trace.rows, tallies, strict=True):
            tally.minute(minute, scaler.decision(row.name).keep, row.needs[minute])
        needed = [row for row in trace.rows if row.needs[minute]]
        for row in needed:
            scaler.under_way(row.name, begin + _BEGIN, row.needs[minute])
        for row in needed:
            scaler.under_way(row.name, begin + _END, 0)
    return [tally.outcome() for tally in tallies]
