"""What a forecaster is: it says how likely the next minute needs an instance, and how sure it is.

Each looks at one level of one function: at the minutes in which at least so many requests were
under way at once. Minutes are closed one after the other, and each is a yes or a no.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

# Minutes that are remembered one by one: a day, and the minute a day before the next one.
DAY = 1440
_MASK = (1 << (DAY + 1)) - 1


class Forecast(NamedTuple):
    """What one forecaster says of the next minute."""

    chance: float
    """That it needs the instance."""
    sure: float
    """From 0, knows nothing, to 1."""


class Past:
    """The closed minutes of one level, as all its forecasters read them."""

    __slots__ = ("before", "bits", "gap")

    def __init__(self) -> None:
        self.bits = 1
        """A day of minutes, the last one in the lowest bit: whether they needed the instance."""
        self.gap = 1
        """How many minutes after the last need the next minute is."""
        self.before = 0
        """The gap that ended with the last need; 0 when there was no other."""

    def close(self, needed: bool) -> None:
        """A minute is over."""
        self.bits = (self.bits << 1 | needed) & _MASK
        if needed:
            self.before, self.gap = self.gap, 1
        else:
            self.gap += 1

    def skip(self, minutes: int) -> None:
        """Nothing is known of so many minutes; they count as idle."""
        self.bits = (self.bits << min(minutes, DAY + 1)) & _MASK
        self.gap += minutes


class Forecaster(Protocol):
    """One way to look at the past. `forecast` is asked about a minute, then `learn` is told it."""

    name: ClassVar[str]

    def forecast(self, past: Past) -> Forecast:
        """What the next minute needs."""
        ...

    def learn(self, past: Past, needed: bool) -> None:
        """What it did need. `past` still ends before it."""
        ...

    def skip(self, past: Past, minutes: int) -> None:
        """Nothing is known of so many minutes."""
        ...

    def why(self, past: Past) -> str:
        """The forecast in words."""
        ...

    def saved(self) -> dict[str, Any]:
        """For `load`."""
        ...

    def load(self, data: dict[str, Any], past: Past) -> None:
        """Take over what `saved` gave."""
        ...


def usual(gap: int) -> float:
    """The chance that a function returns after `gap` minutes, when nothing else is known of it.

    Idle times have no typical length: the longer one has lasted, the longer it goes on.
    """
    return 1 / (gap + 1.5)


def shrunk(hits: float, trials: float, gap: int) -> Forecast:
    """The share of hits, pulled towards what is usual while there are few trials."""
    chance = (hits + _PRIOR * usual(gap)) / (trials + _PRIOR)
    return Forecast(chance, trials / (trials + _DOUBT))


# So many trials of a made-up function that does what is usual.
_PRIOR = 0.5
# With so many trials a forecaster is half sure.
_DOUBT = 2.0
