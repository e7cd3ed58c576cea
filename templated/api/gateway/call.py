"""One request to the gateway on its way to the operation that it asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from templated.api.gateway.errors import Refused, wrong
from templated.api.gateway.keys import Key
from templated.api.gateway.names import Place, Target
from templated.api.gateway.views import Views
from templated.model.access import Role
from templated.model.config import Config
from templated.model.mistakes import explained
from templated.services.functions.functions import Functions

T = TypeVar("T")
# Bytes from which work on a body goes to a thread.
LARGE = 1 << 18
_PAGE = 50


@dataclass(frozen=True)
class Desk:
    """What operations work with."""

    config: Config
    functions: Functions
    place: Place
    views: Views


@dataclass
class Call:
    """A request whose signature was checked. `names` are those in its path, decoded."""

    desk: Desk
    key: Key
    names: tuple[str, ...]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    about: str = ""
    """What it is about, for the audit log."""
    detail: str = ""
    """The same: what it asks for, but nothing that can be a secret."""
    id: str = ""
    """The id of the request, when the operation gives it one."""
    _target: Target | None = field(default=None, repr=False)

    @property
    def target(self) -> Target:
        """The function of the path, with the qualifier of the query. Raises Refused."""
        if self._target is None:
            self._target = self.desk.place.target(self.names[0], self.query.get("Qualifier"))
            self.about = self.about or self._target.name
        return self._target

    @property
    def alone(self) -> str:
        """The name of a function, of all of it: only `$LATEST` may be named beside it."""
        target = self.target
        if target.qualifier not in (None, "$LATEST"):
            raise wrong("FunctionName: this is about the function, not about a version of it")
        return target.name

    @property
    def admin(self) -> bool:
        """Whether values of environments may be shown."""
        return self.key.role is Role.ADMIN

    async def decode(self, kind: type[T]) -> T:
        """The body as JSON. Raises Refused, naming the field that is wrong."""
        if len(self.body) > LARGE:
            return await asyncio.to_thread(_decoded, self.body, kind)
        return _decoded(self.body, kind)


@dataclass(frozen=True)
class Operation:
    """One operation of Lambda's API: its name, its place, and who may call it."""

    name: str
    method: str
    path: str
    handler: Callable[[Call], Awaitable[web.Response]]
    needs: Role
    limit: int = 1 << 20
    """Bytes that its body may have."""
    action: str = ""
    """What IAM calls it; by default its name."""

    @property
    def changes(self) -> bool:
        """Whether it is in the audit log, also when it succeeds."""
        return self.needs is Role.ADMIN


def json_answer(value: Any, status: int = 200) -> web.Response:
    """An answer whose body is `value` as JSON."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def page(call: Call, items: list[T], mark: Callable[[T], str]) -> tuple[list[T], str | None]:
    """The page of `items` that a request asks for, and the mark of the next one.

    A mark names the last item of a page, so an item that goes meanwhile moves no other: `items`
    are in the order of their marks. Raises Refused.
    """
    wanted = call.query.get("MaxItems")
    if wanted is not None and not (wanted.isdecimal() and 1 <= int(wanted[:6]) <= 10_000):
        raise wrong("MaxItems has to be between 1 and 10000")
    marker = call.query.get("Marker")
    start = 0 if not marker else sum(mark(item) <= marker for item in items)
    end = start + min(int(wanted[:6]) if wanted else _PAGE, _PAGE)
    return items[start:end], mark(items[end - 1]) if end < len(items) else None


def paged(key: str, items: list[Any], mark: str | None) -> web.Response:
    """A page as an answer."""
    return json_answer({key: items} | ({"NextMarker": mark} if mark else {}))


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise wrong(": ".join(filter(None, explained(error)))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused("SerializationException", f"the request is not JSON: {error}") from None
    except RecursionError:
        raise Refused("SerializationException", "the request is nested too deeply") from None
