"""Reads traces: how many instances each function needs at once, minute by minute."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from templated.errors import InvalidRequest

# The format of ours, and that of the Azure Functions trace of 2019, before their minutes.
_NEEDS = ("app", "memory_mb")
_AZURE = ("HashOwner", "HashApp", "HashFunction", "Trigger")
# A trace of invocations says nothing of memory.
_MIB = 128.0
_MOST = 1_000_000
_HINT = "the formats are in `templated bench scaling --help`"


@dataclass(frozen=True)
class Row:
    """One function."""

    name: str
    mib: float
    """What an instance of it takes."""
    needs: tuple[int, ...]
    """How many instances it needs at once, in each minute."""


@dataclass(frozen=True)
class Trace:
    """Functions over the same minutes."""

    name: str
    rows: tuple[Row, ...]

    @property
    def minutes(self) -> int:
        """The length."""
        return len(self.rows[0].needs)

    @property
    def needed(self) -> int:
        """Instance-minutes that are needed, no more."""
        return sum(sum(row.needs) for row in self.rows)

    @property
    def needed_gib(self) -> float:
        """The same by memory: GiB-minutes."""
        return sum(sum(row.needs) * row.mib for row in self.rows) / 1024


def read(path: Path, *, duration: float = 1.0, first: int | None = None) -> Trace:
    """The trace in a file, or its `first` functions. Invocations of the Azure format become needs
    by an average `duration` in seconds, as if they came evenly. InvalidRequest names the line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = tuple(_rows(path.name, csv.reader(file, strict=True), duration, first))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path.name} is no CSV: {error}", hint=_HINT) from None
    if not rows:
        raise InvalidRequest(f"{path.name} has no functions", hint=_HINT)
    return Trace(path.name, rows)


def _rows(
    name: str, lines: Iterator[list[str]], duration: float, first: int | None
) -> Iterator[Row]:
    header = next(lines, [])
    azure = tuple(header[: len(_AZURE)]) == _AZURE
    fixed = len(_AZURE if azure else _NEEDS)
    if not azure and tuple(header[:fixed]) != _NEEDS:
        raise InvalidRequest(f"{name}:1: the header is of no known format", hint=_HINT)
    _check_minutes(name, header[fixed:], azure)
    seen: set[str] = set()
    for number, line in enumerate(lines, 2):
        if first is not None and len(seen) >= first:
            return
        place = f"{name}:{number}"
        if len(line) != len(header):
            raise InvalidRequest(f"{place}: {len(line)} fields instead of {len(header)}")
        key = "/".join(line[:3]) if azure else line[0]
        if not key or key in seen:
            raise InvalidRequest(f"{place}: {key!r} is {'there twice' if key else 'no name'}")
        seen.add(key)
        needs = [_count(place, at, text) for at, text in enumerate(line[fixed:], 1)]
        if azure:
            needs = [math.ceil(count * duration / 60) for count in needs]
        yield Row(key, _MIB if azure else _mib(place, line[1]), tuple(needs))


def _check_minutes(name: str, titles: list[str], azure: bool) -> None:
    """Each minute follows the one before."""
    if not titles:
        raise InvalidRequest(f"{name}:1: the header names no minutes", hint=_HINT)
    for minute, title in enumerate(titles, 1):
        expected = str(minute) if azure else f"m{minute:04d}"
        if title != expected:
            raise InvalidRequest(f"{name}:1: a gap: {title!r} stands where {expected} should")


def _count(place: str, minute: int, text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= _MOST:
        return int(text)
    what = "empty" if not text.strip() else f"{text[:20]!r}"
    if text.startswith("-") and text[1:].isdecimal():
        what = f"negative: {text[:20]}"
    raise InvalidRequest(
        f"{place}: minute {minute} is {what}", hint=f"a whole number from 0 to {_MOST}"
    )


def _mib(place: str, text: str) -> float:
    try:
        mib = float(text)
    except ValueError:
        mib = math.nan
    if not 0 < mib < math.inf:
        raise InvalidRequest(f"{place}: memory_mb is {text[:20]!r}", hint="a number above 0")
    return mib
