"""Bodies of requests: bounded each, and all together, before anybody is known to have sent them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator

from aiohttp import web

from templated.api.gateway.call import LARGE
from templated.api.gateway.errors import Refused
from templated.errors import Timeout
from templated.timing import within

# Bytes of all bodies that are held at once.
_TOGETHER = 256 << 20
# Seconds that a body may take, and seconds for each MiB of it beside them.
_PATIENCE, _PER_MIB = 30.0, 2.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Bodies:
    """Reads bodies, and holds them to a bound."""

    def __init__(self, together: int = _TOGETHER, patience: float = _PATIENCE) -> None:
        self._left = together
        self._patience = patience

    @contextlib.contextmanager
    def room(self, request: web.BaseRequest, limit: int, what: str) -> Iterator[None]:
        """Take the room that a request's body may need. Raises Refused when it is too large, or
        when others have the room."""
        size = request.content_length
        if size is None:
            # In chunks, or none: it can become as large as it may be.
            size = limit if request.body_exists else 0
        if size > limit:
            raise too_large(limit, what)
        if size > self._left:
            raise Refused(
                "TooManyRequestsException",
                "Too many large requests at once.",
                status=429,
                headers={"Retry-After": "1"},
                more={"Reason": "CallerRateLimitExceeded"},
                close=True,
            )
        self._left -= size
        try:
            yield
        finally:
            self._left += size

    async def read(self, request: web.BaseRequest, limit: int, what: str) -> bytes:
        """The body. Raises Refused when it is too large or does not come."""
        if not request.body_exists:
            return b""
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(_CONTINUE)
        bound = self._patience + _PER_MIB * (limit >> 20)
        try:
            async with within(bound, "the request's body"):
                return await _all(request, limit, what)
        except Timeout as error:
            raise Refused(
                "RequestTimeoutException", error.message, status=408, close=True
            ) from None


async def _all(request: web.BaseRequest, limit: int, what: str) -> bytes:
    parts, size = [], 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > limit:
            raise too_large(limit, what)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def digest_of(body: bytes) -> str:
    """Its SHA-256, in hex."""
    if len(body) > LARGE:
        return await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())
    return hashlib.sha256(body).hexdigest()


def too_large(limit: int, what: str) -> Refused:
    """A request is larger than it may be."""
    kind = "RequestTooLargeException" if what == "Invoke" else "RequestEntityTooLargeException"
    return Refused(
        kind,
        f"Request must be smaller than {limit} bytes for the {what} operation",
        status=413,
        close=True,
    )
