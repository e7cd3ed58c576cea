"""Follows a build: a live line on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from templated.cli import render
from templated.cli.failures import Failure
from templated.cli.options import Settings
from templated.client import requests

Event = dict[str, Any]
Sink = Callable[[Event], None]

# Lines of the guest's console, which a failed build ends with: they follow the error.
_CONSOLE = "console: "


def follow_build(settings: Settings, name: str, operation: str) -> None:
    """Show the events of a build until its end; raises the error that it failed with."""
    console: list[str] = []
    try:
        with _sink(settings) as show:
            end = _show_all(settings, operation, show, console)
    except KeyboardInterrupt:
        settings.note(
            f"the build of {name} goes on in the daemon; follow it again: "
            f"templated template build {name} --follow {operation}"
        )
        raise
    if end.get("state") != "done":
        raise _failure(end, name, console)


def _show_all(settings: Settings, operation: str, show: Sink, console: list[str]) -> Event:
    """Show every event and return the last one; lines of the guest's console go to `console`."""
    event: Event = {}
    for event in settings.client().json_lines(requests.operation_events(operation)):
        show(event)
        message = event.get("message", "")
        if event["type"] == "log" and message.startswith(_CONSOLE):
            console.append(message)
    return event


def _failure(end: Event, name: str, console: list[str]) -> Failure:
    error = end.get("error") or {}
    return Failure(
        error.get("code", "build_failed"),
        error.get("message", f"the build of {name} failed"),
        hint=error.get("hint", ""),
        details=tuple(console),
    )


@contextlib.contextmanager
def _sink(settings: Settings) -> Iterator[Sink]:
    """Where the events are shown: stdout for programs, stderr for people, nowhere with -q."""
    if not settings.table:
        yield lambda event: render.dump_item(event, settings)
    elif settings.quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _live() as show:
            yield show
    else:
        yield _plain


def _plain(event: Event) -> None:
    if line := _line(event):
        click.echo(line, err=True)


@contextlib.contextmanager
def _live() -> Iterator[Sink]:
    """A spinner with the step under way and the time so far; steps that ended stay above it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, no_color=not render.colours(sys.stderr), highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("waiting", total=None)
        phase = ""

        def show(event: Event) -> None:
            nonlocal phase
            if event["type"] == "phase" and event["state"] == "start":
                phase = event["name"]
                progress.update(task, description=escape(phase))
            elif event["type"] == "probe" and event["state"] == "start":
                progress.update(task, description=escape(f"{phase}: {event['name']}"))
            elif line := _line(event):
                console.print(line, markup=False, soft_wrap=True)

        yield show


def _line(event: Event) -> str:
    """The event as a line of text; empty for one that has nothing to say."""
    seconds = event.get("seconds")
    took = "" if seconds is None else f" in {seconds:.2f} s"
    name, state, message = (event.get(key, "") for key in ("name", "state", "message"))
    match event["type"], state:
        case "phase", "start":
            text = f"{name} ..."
        case "phase", _:
            text = f"{name} {state}{took}"
        case "probe", "start":
            text = ""
        case "probe", _:
            saw = f": {event['saw']}" if event.get("saw") else ""
            text = f"  probe {name} {state}{took}{saw}"
        case "log", _:
            text = "" if message.startswith(_CONSOLE) else f"  {message}"
        case _:
            text = ""
    indent = text[: len(text) - len(text.lstrip())]
    return indent + render.printable(text)
