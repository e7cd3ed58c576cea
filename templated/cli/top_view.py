"""Draws a frame of `templated top`: tables one below the other, or side by side where they fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from templated.cli.figures import Frame
from templated.cli.function_figures import FunctionFigures
from templated.cli.render import details, milliseconds, printable

_TWO_COLUMNS = 130
"""Characters from which on the tables stand side by side."""
_FUNCTIONS = 12
"""Lines for functions; -o json has all of them."""
_LEAST = 10
"""Characters that a column has at least that is cut for the others."""
_GAP = 2
_SLOW_MS = 100.0
_PRESSED = 0.1


def draw(frame: Frame, width: int) -> RenderableType:
    """The frame for a terminal of that many characters; longer lines end in an ellipsis."""
    left = [_starts(frame), _phases(frame)]
    functions = _functions(frame, width)
    right = [_pools(frame), _clones(frame), _biggest(frame)]
    events = [_events(frame, width)] if frame.events else []
    if width < _TWO_COLUMNS:
        return Group(*_spaced([*_head(frame), functions, *left, *right, *events]))
    columns = Table.grid(padding=(0, 4, 0, 0), expand=True)
    columns.add_column(ratio=1)
    columns.add_column(ratio=1)
    columns.add_row(Group(*_spaced(left)), Group(*_spaced(right)))
    return Group(*_spaced([*_head(frame), functions, columns, *events]))


def _spaced(parts: Iterable[RenderableType | None]) -> list[RenderableType]:
    """The parts that are there, with an empty line before each table."""
    found: list[RenderableType] = []
    for part in parts:
        if part is not None:
            found.extend([part] if isinstance(part, Text) or not found else [Text(), part])
    return found


def _head(frame: Frame) -> list[Text]:
    count = sum(start.count for start in frame.starts)
    failed = sum(failure["count"] for failure in frame.failures)
    did = f"{count} starts and {failed} failures in {_duration(frame.window_s)}"
    lines = [
        f"templated {printable(frame.version)}, up {_duration(frame.uptime_s)}   {did}",
        f"starts under way: {frame.starts_in_progress}, at once: {frame.starts_limit}"
        + _pressure(frame),
        "   ".join(_space(frame)),
    ]
    reasons = (f"{printable(f['template'])} {f['reason']} {f['count']}" for f in frame.failures)
    if failed:
        lines.append("failures: " + ", ".join(reasons))
    if frame.refill_blocked:
        lines.append("pools are not refilled, the host lacks: " + ", ".join(frame.refill_blocked))
    alarm = ("failures", "pools are")
    return [
        Text(line, "red" if line.startswith(alarm) else "", no_wrap=True, overflow="ellipsis")
        for line in lines
        if line
    ]


def _pressure(frame: Frame) -> str:
    some = {p["resource"]: p["ratio"] for p in frame.pressure if p["kind"] == "some"}
    shown = (f"{name} {ratio:.0%}{'!' * (ratio > _PRESSED)}" for name, ratio in some.items())
    return f"   pressure: {', '.join(shown)}" if some else ""


def _space(frame: Frame) -> list[str]:
    found = []
    if len(frame.memory) == 2:
        free, size = frame.memory["available_bytes"], frame.memory["size_bytes"]
        found.append(f"memory: {_bytes(free)} of {_bytes(size)} available")
    for place in frame.filesystems:
        free, size = place["free_bytes"], place["size_bytes"]
        found.append(f"{place['place']}: {_bytes(free)} of {_bytes(size)} free")
    return found


def _starts(frame: Frame) -> Table:
    rows = [
        (
            start.template,
            start.path,
            f"{start.per_second:.2f}",
            milliseconds(start.p50_ms),
            Text(milliseconds(start.p99_ms), _slow(start.p99_ms)),
            str(start.count),
        )
        for start in frame.starts
    ]
    return _table(("STARTS OF", "PATH", "PER S", "P50", "P99", "COUNT"), rows)


def _phases(frame: Frame) -> Table | None:
    """A line per path: p50 and p99 of each phase."""
    seen = [p for p in frame.phases if p.p50_ms is not None]
    names = list(dict.fromkeys(p.phase for p in seen))
    cells = {(p.template, p.path, p.phase): f"{p.p50_ms:.1f} {p.p99_ms:.1f}" for p in seen}
    paths = sorted({(p.template, p.path) for p in seen})
    rows = [(*path, *(cells.get((*path, name), "") for name in names)) for path in paths]
    return _table(("P50 P99 IN MS", "PATH", *map(str.upper, names)), rows) if rows else None


def _functions(frame: Frame, width: int) -> Table | None:
    """The busiest, with what their instances do now."""
    rows = [
        (
            f.function,
            f"{f.per_second:.2f}",
            milliseconds(f.p50_ms),
            milliseconds(f.p99_ms),
            str(f.count),
            Text(str(f.failed), "red" if f.failed else ""),
            str(f.cold_starts),
            Text(str(f.throttles), "yellow" if f.throttles else ""),
            ", ".join(_instances(f)),
        )
        for f in frame.functions[:_FUNCTIONS]
    ]
    numbers = ("PER S", "P50", "P99", "COUNT", "FAILED", "COLD", "REFUSED")
    headers = ("REQUESTS OF", *numbers, "INSTANCES")
    return _table(headers, _fitting(headers, rows, width)) if rows else None


def _instances(figures: FunctionFigures) -> Iterator[str]:
    for state, count in sorted(figures.instances.items()):
        yield f"{count} {state}"
    if figures.aim:
        yield f"aim {figures.aim}"
    if figures.failing:
        yield f"{figures.failing} starts failed in a row"


def _pools(frame: Frame) -> Table | None:
    rows = [
        (
            pool["template"],
            *(
                Text(f"{tier['ready']}/{tier['target']}", _short(tier["ready"], tier["target"]))
                for tier in (pool["standby"], pool["warm"])
            ),
            pool.get("problem") or "",
        )
        for pool in frame.pools
    ]
    return _table(("POOLS OF", "STANDBY", "WARM", "PROBLEM"), rows) if rows else None


def _clones(frame: Frame) -> Table:
    rows = [(c["template"], c["state"], str(c["count"])) for c in frame.clones if c["count"]]
    return _table(("CLONES OF", "STATE", "COUNT"), rows)


def _biggest(frame: Frame) -> Table | None:
    rows = [
        (c.name, c.template, str(c.pid), _bytes(c.memory_bytes), f"{c.cpu_ratio:.1%}")
        for c in frame.biggest
    ]
    return _table(("BIGGEST", "TEMPLATE", "PID", "OWN MEMORY", "CPU"), rows) if rows else None


def _events(frame: Frame, width: int) -> Table:
    rows = [(e["time"], e["type"], e["subject"], details(e)) for e in frame.events]
    headers = ("EVENTS", "TYPE", "SUBJECT", "DETAILS")
    return _table(headers, _fitting(headers, rows, width))


Row = Sequence[str | Text]


def _fitting(headers: Sequence[str], rows: Sequence[Row], width: int) -> Iterator[Row]:
    """The rows with their last column cut, so that the others need not be."""
    columns = range(len(headers) - 1)
    taken = sum(max(len(row[c]) for row in (headers, *rows)) + _GAP for c in columns)
    room = max(width - taken, _LEAST)
    for *first, last in rows:
        yield (*first, last if len(last) <= room else f"{last[: room - 1]}…")


def _table(headers: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        drawn.add_column(header, no_wrap=True, overflow="ellipsis")
    for row in rows:
        drawn.add_row(*(c if isinstance(c, Text) else Text(printable(c)) for c in row))
    return drawn


def _slow(value: float | None) -> str:
    return "red" if value is not None and value > _SLOW_MS else ""


def _short(ready: int, target: int) -> str:
    return "yellow" if ready < target else ""


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
