"""Demand against instances as a picture of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_COLUMNS = 60
_ROWS = 8
USED, SPARE, LACKING = "#", ".", "!"


def plot(demand: Sequence[int], ready: Sequence[int], hours: int) -> Iterator[str]:
    """Lines of the last hours; both are by minute, the last one is now.

    `#`: a request and an instance, `.`: an instance without one, `!`: a request that had to wait.
    """
    minutes = hours * 60
    asked = _columns(demand[-minutes:])
    there = _columns(ready[-minutes:])
    highest = max(*asked, *there, 1)
    rows = min(_ROWS, highest)
    for row in range(rows, 0, -1):
        level = highest * row / rows
        least = highest * (row - 1) / rows
        label = f"{level:g}" if row == rows or rows == highest else ""
        line = "".join(map(_cell, asked, there, [least] * len(asked)))
        yield f"{label:>5} |{line}".rstrip()
    begin = f"-{minutes} min"
    yield f"{0:>5} +{'-' * _COLUMNS}"
    yield f"       {begin}{'now':>{_COLUMNS - len(begin)}}"
    legend = {USED: "requests at once", SPARE: "instances beyond", LACKING: "requests beyond them"}
    yield "       " + "   ".join(f"{mark} {about}" for mark, about in legend.items())


def _columns(values: Sequence[int]) -> list[int]:
    """The most of each part of the time."""
    width = max(1, len(values) // _COLUMNS)
    return [max(values[at : at + width]) for at in range(0, len(values), width)]


def _cell(asked: int, there: int, least: float) -> str:
    if asked > least:
        return USED if there > least else LACKING
    return SPARE if there > least else " "
