"""Records who changed what: a line in the daemon's log, and an entry in the audit log."""

from __future__ import annotations

import logging

from aiohttp import web

from templated.api.callers import CALLER, ROUTE, Caller, Callers
from templated.api.errors import ERROR_CODE, Handler
from templated.api.route import Route
from templated.journal import now
from templated.model.api import AuditEntry
from templated.services.reports.audit import AuditLog

log = logging.getLogger("templated.api")
_TARGET = "templated.target"
_DETAIL = "templated.detail"
# Characters of what the caller wrote: entries stay small.
_LONGEST = 200


def note(request: web.Request, *, target: str = "", detail: str = "") -> None:
    """Say what a request is about where its path does not. Nothing that can be a secret."""
    request[_TARGET], request[_DETAIL] = target, detail


class Recorder:
    """Records each request that changes something or reaches into a guest, also a refused one."""

    def __init__(self, callers: Callers, audit: AuditLog) -> None:
        self._callers = callers
        self._audit = audit

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note the caller, wait for the answer, and record how it came out."""
        caller = request[CALLER] = self._callers.of(request)
        status = 0
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            route: Route | None = request.get(ROUTE)
            if route.recorded if route else request.method != "GET":
                # Not decoded: a path has no line breaks then.
                path = request.rel_url.raw_path
                log.info("uid %s: %s %s: %d", caller.uid, request.method, path, status)
            if route and route.recorded:
                self._audit.add(_entry(request, route, caller, status))


def _entry(request: web.Request, route: Route, caller: Caller, status: int) -> AuditEntry:
    """`status` is 0 for a request that was given up, as when the daemon ends."""
    target = request.get(_TARGET) or next(iter(request.match_info.values()), "")
    outcome = request.get(ERROR_CODE, "ok") if status else "cancelled"
    return AuditEntry(
        time=now(),
        uid=caller.uid,
        pid=caller.peer.pid if caller.peer else None,
        role=caller.grant.role or "",
        action=route.name,
        target=target[:_LONGEST],
        detail=request.get(_DETAIL, "")[:_LONGEST],
        outcome=outcome,
        status=status,
    )
