"""`invoke`: one request of a function."""

from __future__ import annotations

import base64
import sys
from typing import Any

import click

from templated.cli import render
from templated.cli.completion import function_names
from templated.cli.failures import Failure
from templated.cli.options import Settings, command
from templated.client import requests
from templated.errors import InvalidRequest
from templated.model.names import check_function_name, check_qualifier
from templated.model.socket import LOG_HEADER

EXAMPLES = """
templated invoke hello
templated invoke hello --payload '{"a": 1}'
templated invoke hello:live --payload @request.json --tail
echo '{"a": 1}' | templated invoke hello:3 --payload - -o json
templated invoke hello --event      # later, and at least once
"""


@command("invoke", examples=EXAMPLES)
@click.argument("name", metavar="NAME[:VERSION|ALIAS]", shell_complete=function_names)
@click.option("--payload", metavar="JSON|-|@FILE", help="The request; - reads stdin. Default: {}.")
@click.option("--event", is_flag=True, help="Do not wait: the daemon runs it later.")
@click.option("--tail", is_flag=True, help="Print the end of the function's log on stderr.")
@click.pass_obj
def invoke(settings: Settings, name: str, payload: str | None, event: bool, tail: bool) -> None:
    """Run a request of a function, and print what it returns.

    With -o json the answer has the version, the instance and the time of each phase, too. When
    the function fails, what it says of that is the output, and the exit code is 1.
    """
    function, colon, given = name.partition(":")
    check_function_name(function)
    qualifier = check_qualifier(given) if colon else None
    content = _payload(payload)
    if event:
        _queue(settings, requests.queue_event(function, content, qualifier=qualifier))
        return
    request = requests.invoke_function(function, content, qualifier=qualifier, tail=tail)
    with settings.client().open(request) as answer:
        view = answer.json()
        log = base64.b64decode(answer.header(LOG_HEADER))
    if log:
        _print_log(log)
    if settings.table:
        click.echo(render.dumps(view["payload"], indent=None))
    else:
        render.dump(view, settings)
    if view["error"] is not None:
        sys.stdout.flush()
        raise Failure(
            "function_failed",
            f"{function} failed: {_reason(view)}",
            hint=f"see: templated function logs {function}",
        )


def _payload(given: str | None) -> bytes:
    if given is None:
        return b"{}"
    if given == "-":
        return sys.stdin.buffer.read()
    if given.startswith("@"):
        return _file(given[1:])
    return given.encode(errors="surrogateescape")


def _file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidRequest(
            f"--payload: cannot read {path or 'a file without a name'}: {error.strerror}",
            hint="as in: --payload @request.json",
        ) from error


def _queue(settings: Settings, request: requests.Request[Any]) -> None:
    accepted = settings.client().json(request)
    if settings.table:
        click.echo(accepted["id"])
    else:
        render.dump(accepted, settings)


def _print_log(log: bytes) -> None:
    from templated.cli.watch import harmless

    text = harmless(log, sys.stderr)
    sys.stderr.buffer.write(text if text.endswith(b"\n") else text + b"\n")
    sys.stderr.flush()


def _reason(view: dict[str, Any]) -> str:
    """What the function said of its failure, in one line."""
    payload = view["payload"]
    if not isinstance(payload, dict) or "errorMessage" not in payload:
        return str(view["error"])
    kind = payload.get("errorType")
    message = str(payload["errorMessage"])
    return f"{kind}: {message}" if kind else message
