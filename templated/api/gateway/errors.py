"""Errors as Lambda tells them: a type in a header, a message as JSON, a status of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from aiohttp import web

from templated.errors import (
    Busy,
    Conflict,
    InvalidRequest,
    NotFound,
    TemplatedError,
    Throttled,
    one_line,
)

TYPE_HEADER = "x-amzn-ErrorType"
# As Lambda's model has it: the message of these begins with a capital.
_CAPITAL = {"ResourceNotFoundException", "ServiceException"}
_REASONS = {
    "concurrency": "ConcurrentInvocationLimitExceeded",
    "reserved": "ReservedFunctionConcurrentInvocationLimitExceeded",
    "max": "ReservedFunctionConcurrentInvocationLimitExceeded",
    "queue": "FunctionInvocationRateLimitExceeded",
}
_BUSY = "ConcurrentInvocationLimitExceeded"


class Refused(Exception):
    """An answer that is an error: its type as Lambda names it, its status, what to add to it."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        status: int = 400,
        headers: Mapping[str, str] = {},
        more: Mapping[str, str] = {},
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = one_line(message)
        self.status = status
        self.headers = headers
        self.more = more
        self.close = close
        """Whether the connection ends with it: the rest of the request was not read."""


def wrong(message: str) -> Refused:
    """What a request asks for cannot be; the message names the field."""
    return Refused("InvalidParameterValueException", message)


def translated(error: TemplatedError) -> Refused:
    """An error of ours as the one of Lambda that is nearest; the hint goes into its message."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    match error:
        case Busy():
            return _throttled(error, message)
        case NotFound():
            return Refused("ResourceNotFoundException", message, status=404)
        case Conflict():
            return Refused("ResourceConflictException", message, status=409)
        case InvalidRequest():
            return wrong(message)
    return Refused("ServiceException", message, status=500)


def _throttled(error: Busy, message: str) -> Refused:
    own = isinstance(error, Throttled)
    later = max(1, math.ceil(error.retry_after)) if isinstance(error, Throttled) else 1
    reason = _REASONS.get(error.reason, _BUSY) if isinstance(error, Throttled) else _BUSY
    return Refused(
        "TooManyRequestsException",
        message if own else f"too much at once: {message}",
        status=429,
        headers={"Retry-After": str(later)},
        more={"Reason": reason},
    )


def answer(refused: Refused) -> web.Response:
    """The error as a response."""
    key = "Message" if refused.kind in _CAPITAL else "message"
    fault = "User" if refused.status < 500 else "Service"
    response = web.Response(
        body=msgspec.json.encode({"Type": fault, key: refused.message, **refused.more}),
        status=refused.status,
        content_type="application/json",
        headers={TYPE_HEADER: refused.kind, **refused.headers},
    )
    if refused.close:
        response.force_close()
    return response
