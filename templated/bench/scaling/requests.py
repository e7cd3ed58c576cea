"""The requests that a part of a trace is made of, at a speed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from templated.bench.scaling.trace import Row, Trace
from templated.errors import InvalidRequest

# Parts of a minute: what it needs is under way for so long, and begins so late at most. A function
# has its own moment, the same in each minute, as what a timer calls.
_LASTS, _LATEST = 0.25, 0.6


class Request(NamedTuple):
    """One request. Seconds count from the begin."""

    at: float
    function: int
    """Which row of the trace."""
    seconds: float
    """How long it takes."""


def part(trace: Trace, begin: int, minutes: int) -> tuple[Row, ...]:
    """The rows with these minutes only. InvalidRequest when the trace has not all of them, or
    nothing happens in them."""
    if begin + minutes > trace.minutes:
        raise InvalidRequest(
            f"{trace.name} has {trace.minutes} minutes: {minutes} from minute {begin} go beyond",
            hint="see --begin and --minutes",
        )
    rows = tuple(replace(row, needs=row.needs[begin : begin + minutes]) for row in trace.rows)
    if not any(any(row.needs) for row in rows):
        raise InvalidRequest(
            f"nothing is asked of {len(rows)} functions in these {minutes} minutes of {trace.name}",
            hint="see --begin, --minutes and --functions",
        )
    return rows


def requests(rows: tuple[Row, ...], speed: float) -> list[Request]:
    """All that the rows need, in order. What a minute needs comes at the same moment."""
    minute = 60.0 / speed
    found = []
    for number, row in enumerate(rows):
        phase = random.Random(row.name).uniform(0.0, _LATEST)  # noqa: S311  # no secret
        for index, need in enumerate(row.needs):
            at = (index + phase) * minute
            found += [Request(at, number, minute * _LASTS)] * need
    return sorted(found)
