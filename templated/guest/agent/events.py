"""What goes between the host's requests and the Runtime API: orders, events, failures."""

from __future__ import annotations

from .wire import Refused, encode

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

FIELDS = {"request": 128, "arn": 512, "trace": 1024}
"""What goes into fields of HTTP, and how long each may be."""
LINE = "\r\n"
RUNTIMES = ("python", "provided")


def order_of(request: dict[str, Any]) -> dict[str, Any]:
    """What a runtime is told when it starts; Refused when the request does not say it."""
    runtime, handler, env = request["runtime"], request["handler"], request["env"]
    if runtime not in RUNTIMES or not isinstance(handler, str) or "\0" in handler:
        raise Refused("invalid", "a runtime or a handler that is none")
    for name, value in env.items():
        if not isinstance(value, str) or "\0" in value or "\0" in name or not name or "=" in name:
            raise Refused("invalid", "a variable of the environment that is none")
    return {"runtime": runtime, "handler": handler, "env": env}


def event_of(request: dict[str, Any], size: int) -> bytes:
    """The head of the answer to `next`, before a payload of `size` bytes.

    Refused when the request has not what belongs into it.
    """
    for name, longest in FIELDS.items():
        text = request[name]
        if len(text) > longest or not (text.isascii() and text.isprintable()):
            raise Refused("invalid", f"the request's field {name!r} is not printable, or too long")
    if not request["request"]:
        raise Refused("invalid", "a request without an id")
    trace = request["trace"]
    return (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Lambda-Runtime-Aws-Request-Id: {request['request']}\r\n"
        f"Lambda-Runtime-Deadline-Ms: {int(request['deadline'])}\r\n"
        f"Lambda-Runtime-Invoked-Function-Arn: {request['arn']}\r\n"
        f"{trace and f'Lambda-Runtime-Trace-Id: {trace}{LINE}'}"
        f"Content-Length: {size}\r\n\r\n"
    ).encode()


def failure(kind: str, message: str) -> bytes:
    """A failure as Lambda says it, in JSON."""
    return encode({"errorMessage": message, "errorType": kind, "stackTrace": []}).encode()


def exit_failure(how: str, number: str) -> bytes:
    """That the runtime ended, in request `number` if it is not empty."""
    why = "without providing a reason" if how == "exit status 0" else f"with error: {how}"
    head = f"RequestId: {number} Error: " if number else ""
    return failure("Runtime.ExitError", f"{head}Runtime exited {why}")
