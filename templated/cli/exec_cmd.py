"""`exec`: a command in a clone, its output as it comes and its exit code as our own."""

from __future__ import annotations

import base64
import select
import sys
from typing import Any

import click

from templated.cli import exit_codes
from templated.cli.completion import clone_names
from templated.cli.failures import Failure
from templated.cli.options import Command, Settings
from templated.client import requests
from templated.errors import InvalidRequest
from templated.model.names import check_clone_name

# The API takes stdin inside a JSON body of at most 1 MiB, in base64.
_MAX_STDIN = 700 * 1024
_STDIN_PATIENCE = 2.0


class _Exec(Command):
    """Leaves everything from the guest's command on to the guest.

    Options are ours up to the first word after NAME, so that `exec fn-1 ls -o` runs `ls -o`
    whether or not `--` stands before it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `--` in front of the guest's command, then parse as usual."""
        options = [p for p in self.params if isinstance(p, click.Option) and not p.is_flag]
        take_value = {name for option in options for name in option.opts}
        position, named = 0, False
        while position < len(args):
            word = args[position]
            if word == "--":
                break
            if word.startswith("-") and word != "-":
                position += 2 if word in take_value else 1
            elif named:
                args = [*args[:position], "--", *args[position:]]
                break
            else:
                named, position = True, position + 1
        return super().parse_args(ctx, args)


EXAMPLES = """
templated exec fn-123 -- uname -a
templated exec fn-123 --env MODE=test --timeout 5 -- /opt/handler --once
templated exec fn-123 -- sh -c 'cat > /tmp/in' < input.json
"""


@click.command("exec", cls=_Exec, examples=EXAMPLES)
@click.argument("name", shell_complete=clone_names)
@click.argument("command", metavar="[--] CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="End the command after this long.",
)
@click.option("--env", multiple=True, metavar="K=V", help="Set a variable; may be repeated.")
@click.option("-n", "--no-stdin", is_flag=True, help="Give the command no stdin.")
@click.pass_obj
@click.pass_context
def exec_(
    context: click.Context,
    settings: Settings,
    name: str,
    command: tuple[str, ...],
    timeout: float,
    env: tuple[str, ...],
    no_stdin: bool,
) -> None:
    """Run a command in a clone and exit with its exit code.

    Its stdout and stderr are passed on as they come, unchanged. When stdin is not a terminal it
    is read to its end first, at most 700 KiB, and passed to the command; use -n in loops and
    under cron. The exit code is 128+N after signal N, 124 after --timeout and 127 when there
    is no such command.
    """
    environment = _environment(env)
    check_clone_name(name)
    stdin = b"" if no_stdin else _stdin(settings)
    request = requests.exec_in_clone(name, command, stdin=stdin, timeout=timeout, env=environment)
    for frame in settings.client().json_lines(request):
        _pass_on(frame)
        if frame.get("done"):
            context.exit(_exit_code(frame, command[0], settings))


def _environment(assignments: tuple[str, ...]) -> dict[str, str]:
    for text in assignments:
        if "=" not in text or text.startswith("="):
            raise InvalidRequest(f"--env {text}: it has to be K=V", hint="as in --env MODE=test")
    return dict(text.split("=", 1) for text in assignments)


def _stdin(settings: Settings) -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    if not select.select([sys.stdin], [], [], _STDIN_PATIENCE)[0]:
        settings.note("reading stdin to its end; -n passes none")
    data = sys.stdin.buffer.read(_MAX_STDIN + 1)
    if len(data) > _MAX_STDIN:
        raise InvalidRequest(
            f"stdin has more than {_MAX_STDIN // 1024} KiB",
            hint="copy it into the clone first: templated cp FILE NAME:/tmp/FILE",
        )
    return data


def _pass_on(frame: dict[str, Any]) -> None:
    stream = {"stdout": sys.stdout, "stderr": sys.stderr}.get(frame.get("stream", ""))
    if stream is not None:
        stream.buffer.write(base64.b64decode(frame.get("data", "")))
        stream.buffer.flush()


def _exit_code(frame: dict[str, Any], command: str, settings: Settings) -> int:
    """The code to exit with, after a word on stderr when the command did not end by itself."""
    code, signal, error = (frame.get(key) for key in ("exit_code", "signal", "error"))
    if frame.get("timed_out"):
        settings.note(f"templated: {command} was ended at its time limit (--timeout)")
        return exit_codes.EXEC_TIMEOUT
    if error == "not_found":
        settings.note(f"templated: {command}: there is no such command in the guest")
        return exit_codes.EXEC_NOT_FOUND
    if signal is not None:
        return 128 + int(signal)
    if code is None:
        raise Failure("guest", f"{command}: {error or 'how it ended is not known'}")
    if error:
        settings.note(f"templated: {command}: {error.replace('_', ' ')}")
    return int(code)
