"""Errors as one JSON shape, and which HTTP status each code has."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from templated.errors import InvalidRequest, TemplatedError, Throttled
from templated.model.api import ErrorBody, ErrorInfo
from templated.model.mistakes import explained

log = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

STATUS = {
    "invalid": 400,
    "config": 400,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "busy": 429,
    "timeout": 504,
    "guest": 502,
    "identity": 502,
    "hypervisor": 502,
    "start_failed": 502,
    "build_failed": 502,
    "probe_failed": 502,
    "host": 503,
    "internal": 500,
}


class ErrorAnswer(web.Response):
    """An answer that says what went wrong; `code` is the error's."""

    def __init__(
        self, code: str, message: str, hint: str = "", status: int = 0, retry_after: float = 0
    ) -> None:
        body = ErrorBody(error=ErrorInfo(code=code, message=message, hint=hint))
        super().__init__(
            body=msgspec.json.encode(body),
            status=status or STATUS.get(code, 500),
            content_type="application/json",
        )
        self.code = code
        if retry_after:
            self.headers["Retry-After"] = str(math.ceil(retry_after))


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No request ends in a traceback or in a page of HTML."""
    try:
        return await handler(request)
    except TemplatedError as error:
        later = error.retry_after if isinstance(error, Throttled) else 0
        return ErrorAnswer(error.code, error.message, error.hint, retry_after=later)
    except web.HTTPException as error:
        code = {404: "not_found", 405: "invalid", 413: "invalid"}.get(error.status, "invalid")
        return ErrorAnswer(
            code,
            f"{request.method} {request.path}: {error.reason}",
            "see /v1/openapi.json",
            error.status,
        )
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return ErrorAnswer(
            "internal",
            f"{type(error).__name__}: {error}",
            "the daemon's log has the details; this is a defect",
        )


async def body_of(request: web.Request, kind: type[T]) -> T:
    """A request's JSON body; InvalidRequest names the field that is wrong."""
    content = await request.read()
    return decoded(content or b"{}", kind, "the request's body")


def decoded(content: bytes | str, kind: type[T], what: str) -> T:
    """JSON of a request; InvalidRequest names `what` is wrong, and the field."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        message, rule = explained(error)
        hint = rule or "see /v1/openapi.json"
        raise InvalidRequest(f"{what}: {message}", hint=hint) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{what} is not JSON: {error}") from error
    except RecursionError:
        raise InvalidRequest(f"{what} is nested too deeply") from None
