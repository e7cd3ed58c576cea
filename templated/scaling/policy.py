"""The settings of scaling, and the bounds of one function."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """How much is kept ready. The defaults suit a host where memory is not short. ValueError for
    what can't be."""

    stable: int = 60
    """Seconds whose mean demand is followed."""
    panic: int = 6
    """Seconds whose mean demand is followed instead while that is more; when it is double of what
    there is, nothing shrinks for a while."""
    buffer_share: float = 0.2
    """Instances in reserve, as a share of the demand, rounded: below three none."""
    buffer_floor: int = 0
    """Instances in reserve of a function with demand, at least."""
    cool_down: float = 300.0
    """Seconds before surplus goes, for a function that was busy all the time; less for others."""
    price: float = 0.16
    """What a GiB kept for a minute has to earn: the chance to avoid a cold start. 0.16 keeps an
    instance of 128 MiB while its chance to be needed within the next minute is above 2 %."""
    memory: float | None = None
    """MiB that all that is kept may take; None: no bound."""

    def __post_init__(self) -> None:
        if not 2 <= self.panic <= self.stable <= 60:
            raise ValueError(f"windows of {self.panic} and {self.stable} s: 2 to 60, short first")
        rest = (self.buffer_share, self.buffer_floor, self.cool_down, self.price, self.memory or 0)
        if not all(number >= 0 for number in rest):
            raise ValueError("a buffer, a time, a price or memory below 0")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What was set for one function. ValueError for what can't be."""

    mib: float
    """What one more instance takes of the host's memory."""
    least: int = 0
    """Instances that are always there: provisioned concurrency."""
    most: int | None = None
    """Instances that are there at once, at most: reserved concurrency."""

    def __post_init__(self) -> None:
        if not self.mib > 0:
            raise ValueError(f"an instance of {self.mib:g} MiB")
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise ValueError(f"at least {self.least} and at most {self.most} instances")

    def within(self, count: int) -> int:
        """The nearest number that the bounds allow."""
        wanted = max(self.least, count)
        return wanted if self.most is None else min(self.most, wanted)
