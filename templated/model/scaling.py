"""What scaling tells of a function's version."""

from __future__ import annotations

from msgspec import Struct


class ScaleView(Struct, frozen=True, kw_only=True):
    """How many instances of a version there should be, and why."""

    function: str
    version: str
    requests: int
    """Under way now, those included that wait."""
    waiting: int
    """Of them, those that wait for an instance."""
    mean: float
    """Requests under way, on average over the last minute."""
    forecast: float
    """The most requests at once that the next minute is expected to have."""
    desired: int
    """Instances that the demand of the last seconds wants; those beyond may be paused."""
    kept: int
    """Initialised instances that there should be, those included that serve."""
    ready: int
    """Those that there are."""
    starting: int
    kind: str
    """What decides `kept`: reactive, panic, cool-down, used, the name of a forecaster, expected,
    min, max, budget, pressure or idle."""
    reason: str
    """The same in words."""


class CallView(Struct, frozen=True, kw_only=True):
    """That runs of one function lead to requests of another."""

    caller: str
    callee: str
    traced: bool
    """It is known from trace ids; otherwise from timing."""
    share: float
    """Of the last runs of the caller, those that led to it."""
    probability: float
    """A lower bound of that share: 3 of 3 runs are less sure than 16 of 16."""
    runs: int
    """How many runs of the caller that is of, at most 16."""
    lag_s: float
    """The usual time from when the caller begins to the request."""
    earliest_s: float
    latest_s: float
    fan_out: int
    """The most requests at once for one run of the caller."""
    seen_s: float
    """How long ago it was confirmed last."""


class ScaleHistory(Struct, frozen=True, kw_only=True):
    """The last minutes of a version, the oldest first. Instances are counted since the daemon's
    start, requests are known from before."""

    mean: tuple[float, ...]
    """Requests under way, on average over each minute."""
    peak: tuple[int, ...]
    """The most that were under way at once."""
    arrivals: tuple[int, ...]
    ready: tuple[int, ...]
    """The most instances that were there at once."""


class ScaleDetail(Struct, frozen=True, kw_only=True):
    """All that scaling knows of a version."""

    now: ScaleView
    min: int
    """Instances that are kept in any case."""
    max: int | None
    """Instances that there may be; None: it has no bound of its own."""
    instance_mib: float
    """What one more instance takes of memory."""
    start_s: float
    """What a start takes, usually; 0: none was seen."""
    forecast: str
    """What is said of its first instance, in words."""
    short_of: tuple[str, ...]
    """What the host is short of, so that nothing grows."""
    calls: tuple[CallView, ...]
    """From the function and to it."""
    history: ScaleHistory
