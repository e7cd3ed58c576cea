"""Turns every failure of a command into lines on stderr and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys

import click

from templated.cli import exit_codes
from templated.cli.options import Settings
from templated.cli.render import colours, dumps, printable
from templated.errors import TemplatedError


class Failure(TemplatedError):
    """A failure of a command other than an error of the daemon; `code` decides the exit code."""

    def __init__(
        self, code: str, message: str, *, hint: str = "", details: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.details = details
        """Lines that people read after the error, such as the end of a console log."""


def exit_code(error: BaseException, settings: Settings) -> int:
    """Report `error` and return the code to exit with. Does not raise."""
    try:
        code = _dispatch(error, settings)
        sys.stdout.flush()
        return code
    except OSError as broken:
        # The reader of stdout or stderr is gone, or its disk is full: what is still buffered
        # would fail once more when the interpreter flushes it at its end.
        _discard_output()
        pipe = isinstance(broken, BrokenPipeError)
        return exit_codes.BROKEN_PIPE if pipe else exit_codes.FAILED


def _dispatch(error: BaseException, settings: Settings) -> int:
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        if sys.stderr.isatty():
            click.echo(err=True)  # the shell's prompt would follow the terminal's ^C
        return exit_codes.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        raise error
    if os.environ.get("TEMPLATED_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    # click before 8.2 has no such error: it prints the help and exits with 0.
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(str(error), err=True)
        return exit_codes.USAGE
    return report(_as_templated(error), settings)


def report(error: TemplatedError, settings: Settings) -> int:
    """Print one error to stderr and return its exit code."""
    message, hint = printable(error.message), printable(error.hint)
    if settings.output == "json":
        body = {"code": error.code, "message": error.message, "hint": error.hint}
        click.echo(dumps({"error": body}, indent=None), err=True)
        return exit_codes.for_error(error.code)
    label = click.style("error:", fg="red", bold=True) if colours(sys.stderr) else "error:"
    click.echo(f"templated: {label} {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    for line in getattr(error, "details", ()):
        click.echo(f"  {printable(line)}", err=True)
    return exit_codes.for_error(error.code)


def _as_templated(error: BaseException) -> TemplatedError:
    if isinstance(error, TemplatedError):
        return error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "templated"
        return Failure("invalid", _sentence(error), hint=f"{command} --help")
    if isinstance(error, click.ClickException):
        return Failure("failed", _sentence(error))
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return Failure("failed", f"{name}{error.strerror or error}")
    return Failure(
        "internal",
        f"{type(error).__name__}: {error}",
        hint="this is a defect; run it again with TEMPLATED_DEBUG=1 and report what it prints",
    )


def _sentence(error: click.ClickException) -> str:
    """click's message in the manner of all others: no capital, no full stop."""
    text = " ".join(error.format_message().split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _discard_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
