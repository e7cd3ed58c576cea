"""The root of the command tree, and the place where every failure becomes an exit code."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

import click

from templated import __version__
from templated.cli.options import Group, Settings

# Where each command lives. A module is imported when its command runs, or for the list of
# commands in `templated --help`.
COMMANDS = {
    "clone": "templated.cli.clones:clone",
    "ls": "templated.cli.clones:ls",
    "show": "templated.cli.clones:show",
    "rm": "templated.cli.clones:rm",
    "exec": "templated.cli.exec_cmd:exec_",
    "cp": "templated.cli.cp:cp",
    "logs": "templated.cli.watch:logs",
    "events": "templated.cli.watch:events",
    "audit": "templated.cli.audit:audit",
    "top": "templated.cli.top:top",
    "function": "templated.cli.functions:function",
    "invoke": "templated.cli.invoke:invoke",
    "scale": "templated.cli.scaling:scale",
    "code": "templated.cli.code:code",
    "template": "templated.cli.templates:template",
    "pool": "templated.cli.pools:pool",
    "egress": "templated.cli.egress:egress",
    "forwarder": "templated.cli.forwarder:forwarder",
    "net": "templated.cli.net:net",
    "image": "templated.cli.images:image",
    "serve": "templated.cli.serve:serve",
    "doctor": "templated.cli.doctor_cmd:doctor",
    "info": "templated.cli.info:info",
    "bench": "templated.bench.cli:bench",
    "completion": "templated.cli.completion:completion",
    "version": "templated.cli.info:version",
}

EXAMPLES = """
templated template build python-fn
templated clone fn-123
templated ls
templated exec fn-123 -- uname -a
templated rm fn-123
"""


class Root(Group):
    """The command `templated`: finds its commands in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, those for every day first."""
        return [name for name in COMMANDS if name != "bench" or _has_bench()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command; None when there is none."""
        if cmd_name not in COMMANDS or (cmd_name == "bench" and not _has_bench()):
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found


def _has_bench() -> bool:
    """The benchmarks can be left out of an installation."""
    try:
        return importlib.util.find_spec("templated.bench.cli") is not None
    except ModuleNotFoundError:
        return False


@click.group(cls=Root, examples=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="templated", message="%(prog)s %(version)s")
def root() -> None:
    """Virtual machines that start the way processes fork.

    A template is a base VM that was booted, checked and frozen once. A clone is a copy of it
    that starts in a fraction of a second, with a MAC, an IP address and a host name of its own.
    """


def _open_closed_streams() -> None:
    """Started with `>&-`, Python has None there; nothing below wants to know."""
    # The type stubs do not know that None is allowed.
    streams: tuple[object, object] = (sys.stdout, sys.stderr)
    if streams[0] is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if streams[1] is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing is ever raised to the caller."""
    settings = Settings()
    _open_closed_streams()
    try:
        if os.environ.get("_TEMPLATED_COMPLETE"):
            root.main(prog_name="templated", obj=settings)
        given = list(sys.argv[1:] if arguments is None else arguments)
        with root.make_context("templated", given, obj=settings) as context:
            root.invoke(context)
        sys.stdout.flush()
        return 0
    # Everything: also what click raises to exit, and Ctrl-C at any moment.
    except BaseException as error:
        from templated.cli.failures import exit_code

        return exit_code(error, settings)
