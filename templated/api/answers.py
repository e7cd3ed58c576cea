"""What handlers share: where the services are, parameters of the query, and ways to answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from templated.errors import InvalidRequest
from templated.services.daemon import Services

SERVICES = web.AppKey("services", Services)
NDJSON = "application/x-ndjson"
T = TypeVar("T")


def json_answer(value: Any, status: int = 200) -> web.Response:
    """An answer whose body is `value` as JSON."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def each(items: list[T]) -> AsyncIterator[T]:
    """The items, one after the other."""
    for item in items:
        yield item


async def lines(items: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Each item as a line of JSON."""
    async with contextlib.aclosing(items):  # type: ignore[type-var]
        async for item in items:
            yield msgspec.json.encode(item) + b"\n"


async def stream(
    request: web.Request, chunks: AsyncIterator[bytes], content_type: str
) -> web.StreamResponse:
    """Send chunks as they come; a client that goes away ends the source."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    try:
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            await response.prepare(request)
            async for chunk in chunks:
                await response.write(chunk)
            await response.write_eof()
    except ConnectionError:
        pass  # the client has gone
    return response


def flag(request: web.Request, name: str) -> bool:
    """Whether a parameter of the query says yes."""
    return request.query.get(name, "") in ("true", "1", "yes")


def number(request: web.Request, name: str, default: int, most: int = 100_000) -> int:
    """A number of the query. Raises InvalidRequest."""
    try:
        value = int(request.query.get(name, default))
    except ValueError:
        raise InvalidRequest(f"{name} is not a number") from None
    if not 0 <= value <= most:
        raise InvalidRequest(f"{name} must be between 0 and {most}")
    return value
