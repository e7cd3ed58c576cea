"""`logs` and `events`: the output of guests and the events of the daemon, followed on request."""

from __future__ import annotations

import re
import sys
from typing import IO, Any

import click

from templated.cli import render
from templated.cli.completion import clone_names
from templated.cli.options import Settings, command
from templated.client import requests
from templated.model.names import check_clone_name

# Escape sequences, and control characters other than tab and newline, in one byte or in UTF-8.
_CONTROL = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]?|[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]"
)

LOGS_EXAMPLES = """
templated logs fn-123
templated logs fn-123 -n 20 -f
"""


@command("logs", examples=LOGS_EXAMPLES)
@click.argument("name", shell_complete=clone_names)
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last LINES lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new output until Ctrl-C.")
@click.pass_obj
def logs(settings: Settings, name: str, lines: int | None, follow: bool) -> None:
    """Print the serial console of a clone.

    On a terminal, control characters are left out: the guest must not steer it.
    """
    print_text(settings, requests.logs(check_clone_name(name), lines, follow))


def print_text(settings: Settings, request: requests.Stream[bytes]) -> None:
    """Print text of a guest as it comes; on a terminal without control characters."""
    with settings.client().open(request) as answer:
        for chunk in answer.chunks():
            sys.stdout.buffer.write(harmless(chunk, sys.stdout))
            sys.stdout.buffer.flush()


def harmless(text: bytes, stream: IO[str]) -> bytes:
    """`text`, for a terminal without what could steer it."""
    return _CONTROL.sub(b"", text) if stream.isatty() else text


EVENTS_EXAMPLES = """
templated events
templated events --no-follow -o json | jq 'select(.type == "clone.dead")'
"""


@command("events", examples=EVENTS_EXAMPLES)
@click.option(
    "-f", "--follow/--no-follow", default=True, help="Go on until Ctrl-C. Default: --follow."
)
@click.pass_obj
def events(settings: Settings, follow: bool) -> None:
    """Print what happens to clones, templates and functions.

    The last events first, then new ones as they come.

    With -o json each event is one line.
    """
    for event in settings.client().json_lines(requests.events(follow)):
        if settings.table:
            click.echo(_line(event))
            sys.stdout.flush()
        else:
            render.dump_item(event, settings)
    if follow:
        settings.note("the daemon ended the stream")


def _line(event: dict[str, Any]) -> str:
    about = render.details(event)
    return render.printable(f"{event['time']}  {event['type']:20} {event['subject']:20} {about}")
