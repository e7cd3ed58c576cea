"""What came of requests: in the daemon's log and in the audit log."""

from __future__ import annotations

import logging

from templated.api.gateway.call import Call, Operation
from templated.api.gateway.errors import Refused
from templated.api.gateway.keys import Key
from templated.journal import now
from templated.model.api import AuditEntry
from templated.services.reports.audit import AuditLog

log = logging.getLogger("templated.api.gateway")
# Characters of what the caller wrote: entries stay small.
_LONGEST = 200
_OUTCOMES = {
    400: "invalid",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    412: "conflict",
    429: "busy",
}


class Recorder:
    """Records changes, and what was refused for want of a key or of a role.

    Invocations have their metrics and the function's log: in the audit log they would push out
    what it is for.
    """

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    def stranger(self, operation: Operation) -> None:
        """A request that no key of ours has signed."""
        self._add(operation, None, "", "", "forbidden", 403)

    def answered(self, operation: Operation, call: Call, refused: Refused | None) -> None:
        """A request of a key."""
        forbidden = refused is not None and refused.status == 403
        if not operation.changes and not forbidden:
            return
        status = 200 if refused is None else refused.status
        outcome = "ok" if refused is None else _OUTCOMES.get(refused.status, "internal")
        log.info("key %s: %s %r: %d", call.key.id, operation.name, call.about[:_LONGEST], status)
        self._add(operation, call.key, call.about, call.detail, outcome, status)

    def _add(
        self,
        operation: Operation,
        key: Key | None,
        target: str,
        detail: str,
        outcome: str,
        status: int,
    ) -> None:
        self._audit.add(
            AuditEntry(
                time=now(),
                uid=None,
                pid=None,
                key=key.id if key else "",
                role=key.role if key else "",
                action=operation.name,
                target=target[:_LONGEST],
                detail=detail[:_LONGEST],
                outcome=outcome,
                status=status,
            )
        )
