"""What each request passes: who calls is known, whether they may is checked, and what came of it
is recorded, as a line in the daemon's log and as an entry in the audit log."""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web

from templated.api.callers import Caller, Callers
from templated.api.errors import ErrorAnswer, Handler
from templated.api.route import Route
from templated.errors import Forbidden
from templated.journal import now
from templated.model.access import Need, describe
from templated.model.api import AuditEntry
from templated.services.reports.audit import AuditLog

log = logging.getLogger("templated.api")
# Characters of what the caller wrote: entries stay small.
_LONGEST = 200


@dataclass
class _Passage:
    """One request on its way; without a route as long as none is found."""

    caller: Caller
    route: Route | None = None
    target: str = ""
    detail: str = ""


_PASSAGE: ContextVar[_Passage] = ContextVar("passage")


def note(*, target: str = "", detail: str = "") -> None:
    """Say what the request is about where its path does not. Nothing that can be a secret."""
    passage = _PASSAGE.get()
    passage.target, passage.detail = target, detail


def allowed(need: Need) -> bool:
    """Whether the caller may have what `need` stands for."""
    return _PASSAGE.get().caller.grant.allows(need)


def guarded(route: Route) -> Handler:
    """The route's handler behind a check: Forbidden when the caller lacks what it needs."""

    async def handler(request: web.Request) -> web.StreamResponse:
        passage = _PASSAGE.get()
        passage.route = route
        if not passage.caller.grant.allows(route.needs):
            raise _refusal(route, passage.caller)
        return await route.handler(request)

    return handler


def _refusal(route: Route, caller: Caller) -> Forbidden:
    return Forbidden(
        f"{route.name} needs {describe(route.needs)}; uid {caller.uid} has {caller.grant}",
        hint="who runs the daemon gives it by a rule in `access.roles` of its configuration",
    )


class Gate:
    """Records each request that changes something or reaches into a guest, also a refused one."""

    def __init__(self, callers: Callers, audit: AuditLog) -> None:
        self._callers = callers
        self._audit = audit

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note the caller, wait for the answer, and record how it came out once it is sent."""
        passage = _Passage(self._callers.of(request))
        _PASSAGE.set(passage)
        response = None
        try:
            response = await handler(request)
            return response
        finally:
            # Only then: to write the log would delay the answer, which a start waits for.
            asyncio.get_running_loop().call_soon(self._record, request, passage, response)

    def _record(
        self, request: web.Request, passage: _Passage, response: web.StreamResponse | None
    ) -> None:
        route, caller = passage.route, passage.caller
        status = 0 if response is None else response.status
        refused = isinstance(response, ErrorAnswer) and response.code == Forbidden.code
        recorded = refused or (route.recorded if route else request.method != "GET")
        if recorded:
            # Not decoded: a path has no line breaks then.
            path = request.rel_url.raw_path
            log.info("uid %s: %s %s: %d", caller.uid, request.method, path, status)
        if route and recorded:
            target = passage.target or next(iter(request.match_info.values()), "")
            self._audit.add(
                AuditEntry(
                    time=now(),
                    uid=caller.uid,
                    pid=caller.peer.pid if caller.peer else None,
                    role=caller.grant.role or "",
                    action=route.name,
                    target=target[:_LONGEST],
                    detail=passage.detail[:_LONGEST],
                    outcome=_outcome(response),
                    status=status,
                )
            )


def _outcome(response: web.StreamResponse | None) -> str:
    if response is None:
        return "cancelled"
    return response.code if isinstance(response, ErrorAnswer) else "ok"
