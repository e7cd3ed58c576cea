"""`top`: how fast clones start, functions, the pools, and the use of the host's memory and CPU."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from templated.cli import render
from templated.cli.options import Settings, command

if TYPE_CHECKING:
    from rich.console import Console

    from templated.cli.figures import Watcher

# Of output that is not a terminal's.
_PLAIN_WIDTH = 120

EXAMPLES = """
templated top
templated top --interval 10
templated top --once -o json | jq .starts
"""


@command("top", examples=EXAMPLES)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    metavar="SECONDS",
    help="Time between two frames. Default: 2.",
)
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.pass_obj
def top(settings: Settings, interval: float, once: bool) -> None:
    """Watch functions, starts, pools, clones and the host until Ctrl-C.

    The first frame counts from the daemon's start, each further one from the frame before.

    Where the output is no terminal, frames follow each other. With -o json each is one line.
    """
    from templated.cli.figures import Watcher

    watcher = Watcher(settings.client())
    if once:
        _print(settings, watcher)
        return
    try:
        if settings.table and sys.stdout.isatty():
            _live(watcher, interval)
        while True:
            _print_next(settings, watcher)
            time.sleep(interval)
    except KeyboardInterrupt:
        return  # the way to end it


def _live(watcher: Watcher, interval: float) -> None:
    """Draw on the terminal's other screen, which goes away with the last frame."""
    from rich.live import Live

    from templated.cli.top_view import draw

    console = _console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(draw(watcher.look(), console.width), refresh=True)
            time.sleep(interval)


def _print(settings: Settings, watcher: Watcher) -> None:
    frame = watcher.look()
    if not settings.table:
        render.dump(asdict(frame), settings)
        return
    from templated.cli.top_view import draw

    console = _console()
    console.print(draw(frame, console.width))


def _print_next(settings: Settings, watcher: Watcher) -> None:
    if settings.table:
        _print(settings, watcher)
        click.echo()
        sys.stdout.flush()
    else:
        render.dump_item(asdict(watcher.look()), settings)


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, no_color=not render.colours(sys.stdout), highlight=False)
