"""What a benchmark does just now, on stderr."""

from __future__ import annotations

import sys
import time

import click

from templated.cli.options import Settings

# A report on a host that is busy with the run itself; a person may want a sign of life.
_SILENCE = 5.0


class ProgressLine:
    """Show progress on stderr: one line that changes on a terminal, otherwise a line at times."""

    def __init__(self, settings: Settings) -> None:
        self._quiet = settings.quiet
        self._live = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._quiet:
            return
        if self._live:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
        elif time.monotonic() - self._last > _SILENCE:
            self._last = time.monotonic()
            click.echo(text, err=True)

    def end(self) -> None:
        """Leave no half a line."""
        if self._live and not self._quiet:
            click.echo("\r\x1b[K", nl=False, err=True)
