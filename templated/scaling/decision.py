"""What the scaler tells: how many instances of a function there should be, and why."""

from __future__ import annotations

from typing import NamedTuple


class Decision(NamedTuple):
    """Holds until the next one for the same function."""

    key: str
    desired: int
    """Instances that the demand of the last seconds wants: those that should not be paused."""
    keep: int
    """Initialised instances to have, those included that serve. More should be started, or
    surplus ended; those beyond `desired` may be paused."""
    kind: str
    """What decides `keep`: `reactive`, `panic`, `cool-down`, `used` (within the minute), the name
    of a forecaster, `expected`, `min`, `max`, `budget`, `pressure` or `idle`."""
    reason: str
    """The same in words, as in `histogram: returns in 4 min`."""
    chance: float
    """Of the last instance that is kept: that the next minute needs it."""


class Failure(NamedTuple):
    """A forecaster that was left out for a level of a function, and why."""

    key: str
    forecaster: str
    error: str


class Round(NamedTuple):
    """What one round of the scaler brought."""

    decisions: list[Decision]
    """Of those functions alone for which something is other than before."""
    failures: list[Failure]
    short: float
    """What a GiB was worth that the budget refused: chance for each minute; 0 when it does for
    all."""
