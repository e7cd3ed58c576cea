"""Prints data: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import click

from templated.cli.options import Settings

_STATE_COLOURS = {
    "running": "green",
    "ready": "green",
    "PASS": "green",
    "starting": "yellow",
    "building": "yellow",
    "removing": "yellow",
    "WARN": "yellow",
    "failed": "red",
    "dead": "red",
    "FAIL": "red",
}


def colours(stream: IO[str]) -> bool:
    """Only a terminal gets colours, and none when NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def printable(text: object) -> str:
    """`text` on one line, without the control characters a guest could steer a terminal with."""
    shown = " ".join(str(text).split())
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "?" for c in shown)


def dumps(data: Any, indent: int | None = 2) -> str:
    """JSON as it is printed: keys in the daemon's order."""
    return json.dumps(data, indent=indent, ensure_ascii=False)


def dump(data: Any, settings: Settings) -> None:
    """Print data for programs, as `-o` says."""
    if settings.output == "json":
        click.echo(dumps(data))
        return
    import yaml

    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


def dump_item(data: Any, settings: Settings) -> None:
    """Print one item of a stream at once: a line of JSON, or a YAML document."""
    if settings.output == "json":
        click.echo(dumps(data, indent=None))
    else:
        click.echo("---")
        dump(data, settings)
    sys.stdout.flush()


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print an aligned table on stdout: drawn by rich on a terminal, otherwise plain text.

    Plain text needs no import of rich, and every row stays on one line however long it is.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(headers, cells)
        return
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    for row in (headers, *cells):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def listing(
    settings: Settings,
    items: list[dict[str, Any]],
    headers: Sequence[str],
    row: Callable[[dict[str, Any]], Sequence[object]],
    *,
    name: str = "name",
) -> None:
    """Print what `ls` has found as `-o` says: a table with a `row` of each, only the names with
    -q, or all of it for programs."""
    if not settings.table:
        dump(items, settings)
    elif settings.quiet:
        for item in items:
            click.echo(item[name])
    else:
        table(headers, map(row, items))


def _rich_table(headers: Sequence[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        drawn.add_column(header, overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell, style=_STATE_COLOURS.get(cell, "")) for cell in row))
    Console(no_color=not colours(sys.stdout), highlight=False).print(drawn)


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Print `name: value` lines with the values aligned."""
    shown = [(name, _cell(value)) for name, value in pairs]
    width = max(len(name) for name, _ in shown) + 1
    for name, value in shown:
        click.echo(f"{name + ':':{width}} {state(value)}")


def state(value: str) -> str:
    """`value` in the colour of the state it names."""
    colour = _STATE_COLOURS.get(value)
    return click.style(value, fg=colour) if colour and colours(sys.stdout) else value


def milliseconds(value: float | None) -> str:
    """A duration for a table; "-" when it is not known."""
    return "-" if value is None else f"{value:.1f} ms"


def size(count: float) -> str:
    """A number of bytes, in the largest unit that leaves a number from 1."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def phases(timings: dict[str, float]) -> str:
    """The phases of a start on one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in timings.items())


def details(event: Mapping[str, Any]) -> str:
    """What an event says beside its subject: `path=direct`, `versions=1:0.9,2:0.1`."""
    pairs = (event.get("details") or {}).items()
    return " ".join(f"{key}={_detail(value)}" for key, value in pairs)


def _detail(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{part}" for key, part in value.items())
    return str(value)


def age(created: str) -> str:
    """How long ago an RFC 3339 time was, in its largest unit; "-" when it cannot be read."""
    from datetime import UTC, datetime

    try:
        passed = datetime.now(UTC) - datetime.fromisoformat(created)
    except (ValueError, TypeError):
        return "-"
    seconds = max(0, int(passed.total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else printable(value)
