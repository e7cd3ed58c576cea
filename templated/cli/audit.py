"""`audit`: who changed what."""

from __future__ import annotations

import re
from typing import Any

import click

from templated.cli import render
from templated.cli.options import Settings, command
from templated.client import requests

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

EXAMPLES = """
templated audit --since 1h
templated audit --user alice -n 20
templated audit -o json | jq 'select(.outcome == "forbidden")'
"""


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", value or "")
    if value is not None and found is None:
        raise click.BadParameter(f"{value!r} is not a time such as 30m, 12h or 7d")
    return None if found is None else int(found[1]) * _UNITS[found[2]]


@command("audit", examples=EXAMPLES)
@click.option(
    "--since", metavar="AGE", callback=_seconds, help="Only of the last 90s, 30m, 1h or 7d."
)
@click.option("--user", metavar="USER", help="Only of this user, by name or uid, or of a key.")
@click.option(
    "-n", "--lines", type=click.IntRange(0, 100_000), help="Only the last LINES. Default: 1000."
)
@click.pass_obj
def audit(settings: Settings, since: int | None, user: str | None, lines: int | None) -> None:
    """Print who changed what.

    Each request that changed something or reached into a guest, also a refused one: when,
    the caller's user and process, what it was about, and how it came out. Of a command in a
    clone only the program's name is kept. Requests to the gateway have a key in place of a user.
    Needs the role admin.

    With -o json each entry is one line.
    """
    entries = settings.client().json_lines(requests.audit(lines, since=since, user=user))
    if settings.table:
        rows = [_row(entry) for entry in entries]
        render.table(["TIME", "USER", "PID", "ACTION", "TARGET", "DETAIL", "OUTCOME"], rows)
        return
    for entry in entries:
        render.dump_item(entry, settings)


def _row(entry: dict[str, Any]) -> list[object]:
    outcome = entry["outcome"]
    if entry["left_out"]:
        outcome += f" ({entry['left_out']} more before)"
    user = entry["user"] or entry["key"] or entry["uid"]
    names = ("action", "target", "detail")
    return [entry["time"], user, entry["pid"], *(entry[name] for name in names), outcome]
