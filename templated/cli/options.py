"""The parts that all commands share: global options, and a Command that shows its examples."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from templated.client import Client


class Settings:
    """The values of the global options; one object for the whole run."""

    def __init__(self) -> None:
        self.socket: str | None = None
        self.output = "table"
        self.quiet = False

    @property
    def table(self) -> bool:
        """Output is for people, not for programs."""
        return self.output == "table"

    def client(self, timeout: float | None = None) -> Client:
        """The API on the chosen socket. Connects only with the first request."""
        from templated.client import Client

        return Client(self.socket, timeout=timeout)

    def note(self, text: str) -> None:
        """Tell the user something that is not data: on stderr, and not with -q."""
        if not self.quiet:
            click.echo(text, err=True)


class GlobalOption(click.Option):
    """An option that every command has; help shows these in a section of their own."""


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    # Only what is given counts: `templated -o json ls` must not be undone by the default of
    # the same option on `ls`.
    settings = context.ensure_object(Settings)
    if value and parameter.name:
        setattr(settings, parameter.name, value)


def global_options() -> list[click.Parameter]:
    """New instances of the options that are accepted before and after a command's name."""
    shared: dict[str, Any] = {"expose_value": False, "callback": _store}
    return [
        GlobalOption(
            ["--socket"],
            metavar="PATH",
            help="The daemon's socket. Default: $TEMPLATED_SOCKET, or the usual place.",
            **shared,
        ),
        GlobalOption(
            ["-o", "--output"],
            type=click.Choice(["table", "json", "yaml"]),
            help="How to print data. Default: table.",
            **shared,
        ),
        GlobalOption(
            ["-q", "--quiet"],
            is_flag=True,
            help="No progress and no notes; tables become a list of names.",
            **shared,
        ),
    ]


class _Shared(click.Command):
    """Adds the global options and an Examples section to a command or a group."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = textwrap.dedent(examples).strip()
        self.params.extend(global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first, then those that all commands have."""
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)
        own: list[tuple[str, str]] = []
        everywhere: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            # Newer click lists arguments here too, which the docstrings explain.
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                (everywhere if isinstance(parameter, GlobalOption) else own).append(record)
        for title, records in (("Options", own), ("Global options", everywhere)):
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, line by line as they are written."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n" + textwrap.indent(self.examples, "  ") + "\n")


class Command(_Shared):
    """A command with `examples` and the global options."""


class Group(_Shared, click.Group):
    """A group whose commands are `Command`s."""

    command_class = Command
    group_class = type


def command(name: str, *, examples: str, **attributes: Any) -> Callable[..., Command]:
    """Decorator: make a Command named `name`; the docstring is its help."""
    made = click.command(name, cls=Command, examples=examples, **attributes)
    return cast("Callable[..., Command]", made)
