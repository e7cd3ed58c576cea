"""The forecast for one level of a function: its forecasters, weighed by how they did lately."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from templated.scaling.forecast.base import Forecast, Forecaster, Past, usual
from templated.scaling.forecast.histogram import Histogram, Usual
from templated.scaling.forecast.pattern import Pattern, Rhythm
from templated.scaling.forecast.period import Period
from templated.scaling.forecast.trend import Rate, Trend, TrendAt

Stopwatch = Callable[[], float]
# What each minute leaves of the losses before it.
_KEEP = 0.98
# No forecaster is believed further than this, so that a surprise costs it only so much.
_LEAST = 0.001
# What one that is not sure at all still counts: it may be the only one.
_UNSURE = 1e-9
# Seconds: a forecaster that takes as long is as bad as one that raises.
_SLOW = 0.05


def forecasters(level: int, trend: Trend) -> list[Forecaster]:
    """Those for one level of a function with this trend."""
    return [
        Histogram(),
        Rhythm(),
        Pattern(),
        Period(),
        Rate(),
        TrendAt(trend, level),
        Usual(),
    ]


class _Member:
    """A forecaster, what it said last, and how wrong it was lately."""

    __slots__ = ("forecaster", "loss", "said", "weight")

    def __init__(self, forecaster: Forecaster) -> None:
        self.forecaster = forecaster
        self.loss = 0.0
        """Its logarithmic losses, those long ago counting less."""
        self.said = Forecast(0.0, 0.0)
        self.weight = 0.0


class Level:
    """Whether the next minute needs the instances from the `first` one on, up to the next level.

    Each forecaster's chance counts by how sure it is and by what it has predicted: after a minute
    it is charged the logarithm of the chance that it gave to what happened, and its weight is
    the exponential of what it owes. This is Bayes' rule for which of them is right, but for
    forgetting.
    """

    __slots__ = ("_members", "chance", "failed", "first", "past")

    def __init__(self, first: int, members: Sequence[Forecaster]) -> None:
        self.first = first
        self.past = Past()
        self.chance = 0.0
        """That the next minute needs it."""
        self.failed: list[tuple[str, str]] = []
        """Forecasters that were left out since this was last emptied, and why."""
        self._members = [_Member(forecaster) for forecaster in members]

    def close(self, needed: bool, stopwatch: Stopwatch | None = None) -> None:
        """A minute is over: learn from it, and forecast the next one."""
        began = stopwatch() if stopwatch else 0.0
        for member in tuple(self._members):
            given = member.said.chance if needed else 1 - member.said.chance
            member.loss = member.loss * _KEEP - math.log(max(given, _LEAST))
            try:
                member.forecaster.learn(self.past, needed)
            except Exception as error:
                self._leave_out(member, error)
        self.past.close(needed)
        self.forecast()
        # Whether it was one of them, or the host was, shows when they are asked again.
        if stopwatch and stopwatch() - began > _SLOW:
            self._leave_out_slow(stopwatch)

    def forecast(self) -> None:
        """Set `chance` for the next minute."""
        for member in tuple(self._members):
            try:
                member.said = said = member.forecaster.forecast(self.past)
                if not (0 <= said.chance <= 1 and 0 <= said.sure <= 1):
                    raise ValueError(f"{said} are no chances")
            except Exception as error:
                self._leave_out(member, error)
        self._weigh()

    def _weigh(self) -> None:
        if not self._members:
            self.chance = usual(self.past.gap)
            return
        least = min([member.loss for member in self._members])
        weighed = total = 0.0
        for member in self._members:
            said = member.said
            member.weight = weight = (said.sure + _UNSURE) * math.exp(least - member.loss)
            weighed += weight * said.chance
            total += weight
        self.chance = weighed / total

    def skip(self, minutes: int) -> None:
        """Nothing is known of so many minutes."""
        for member in tuple(self._members):
            try:
                member.forecaster.skip(self.past, minutes)
            except Exception as error:
                self._leave_out(member, error)
        self.past.skip(minutes)
        self.forecast()

    @property
    def why(self) -> tuple[str, str]:
        """The name of the forecaster that says most of the chance, and its forecast in words."""
        if not self._members:
            return Usual.name, Usual().why(self.past)
        best = max(self._members, key=lambda member: member.weight * member.said.chance)
        return best.forecaster.name, best.forecaster.why(self.past)

    def _leave_out(self, member: _Member, error: Exception) -> None:
        self._members.remove(member)
        self.failed.append((member.forecaster.name, f"{type(error).__name__}: {error}"))

    def _leave_out_slow(self, stopwatch: Stopwatch) -> None:
        for member in tuple(self._members):
            began = stopwatch()
            member.forecaster.forecast(self.past)
            took = stopwatch() - began
            if took > _SLOW:
                self._leave_out(member, TimeoutError(f"took {took:.3f} s"))
        self._weigh()

    def saved(self) -> dict[str, Any]:
        """For `load`."""
        return {
            "first": self.first,
            "bits": hex(self.past.bits),
            "gap": self.past.gap,
            "before": self.past.before,
            "members": [
                {"name": m.forecaster.name, "loss": m.loss, **m.forecaster.saved()}
                for m in self._members
            ],
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over what `saved` gave; a forecaster that it does not have begins anew."""
        self.past.bits = int(data["bits"], 16)
        self.past.gap, self.past.before = int(data["gap"]), int(data["before"])
        rows = {row["name"]: row for row in data["members"]}
        for member in self._members:
            if row := rows.get(member.forecaster.name):
                member.loss = float(row["loss"])
                member.forecaster.load(row, self.past)
        self.forecast()
