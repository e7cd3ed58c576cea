"""Long work that a request starts but does not wait for: users can follow it and look it up."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from templated.errors import NotFound, TemplatedError
from templated.journal import now
from templated.model.api import (
    OPERATION_TRANSITIONS,
    ErrorInfo,
    Operation,
    OperationEvent,
    OperationState,
)
from templated.model.lifecycle import move
from templated.services.reports.feed import Feed
from templated.services.tasks import Tasks

log = logging.getLogger(__name__)
_KEPT = 100


class Progress:
    """Where a piece of long work reports its steps."""

    def __init__(self) -> None:
        self._feed: Feed[OperationEvent] = Feed()

    def phase(self, name: str, state: str, seconds: float | None = None) -> None:
        """A phase begins ("start") or has ended ("done", with its seconds)."""
        self._feed.add(
            OperationEvent(time=now(), type="phase", name=name, state=state, seconds=seconds)
        )

    def probe(self, name: str, state: str, seconds: float | None, saw: str) -> None:
        """A probe begins, has passed, or has failed."""
        event = OperationEvent(
            time=now(), type="probe", name=name, state=state, seconds=seconds, saw=saw
        )
        self._feed.add(event)

    def log(self, message: str) -> None:
        """A line for people."""
        self._feed.add(OperationEvent(time=now(), type="log", message=message))

    def end(
        self,
        state: OperationState,
        error: ErrorInfo | None,
        result: dict[str, Any] | None,
    ) -> None:
        """The last event."""
        event = OperationEvent(
            time=now(), type="end", state=state.value, error=error, result=result
        )
        self._feed.add(event)
        self._feed.close()

    @property
    def events(self) -> list[OperationEvent]:
        """All events so far."""
        return self._feed.items()

    def follow(self) -> AsyncIterator[OperationEvent]:
        """All events from the beginning, until the last one."""
        return self._feed.follow()


Work = Callable[[Progress], Awaitable[dict[str, Any]]]


class Operations:
    """Runs long work in the background and remembers the latest operations."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._known: dict[str, tuple[Operation, Progress]] = {}

    def start(self, kind: str, target: str, work: Work) -> Operation:
        """Begin; the answer names the operation to follow."""
        operation = Operation(
            id=secrets.token_hex(6),
            kind=kind,
            target=target,
            state=OperationState.RUNNING,
            started=now(),
        )
        progress = Progress()
        self._known[operation.id] = (operation, progress)
        self._forget()
        self._tasks.spawn(self._run(operation, progress, work), f"{kind} {target}")
        return operation

    def get(self, operation_id: str) -> tuple[Operation, Progress]:
        """An operation and its events; NotFound when it is not (or no longer) known."""
        try:
            return self._known[operation_id]
        except KeyError:
            raise NotFound(f"there is no operation {operation_id}") from None

    async def _run(self, operation: Operation, progress: Progress, work: Work) -> None:
        try:
            result = await work(progress)
        except TemplatedError as error:
            info = ErrorInfo(code=error.code, message=error.message, hint=error.hint)
            self._end(operation, progress, OperationState.FAILED, error=info)
        except asyncio.CancelledError:
            info = ErrorInfo(code="cancelled", message="the daemon was stopped")
            self._end(operation, progress, OperationState.FAILED, error=info)
            raise
        except Exception as error:
            log.exception("%s %s failed", operation.kind, operation.target)
            info = ErrorInfo(
                code="internal",
                message=f"{type(error).__name__}: {error}",
                hint="the daemon's log has the details; this is a defect",
            )
            self._end(operation, progress, OperationState.FAILED, error=info)
        else:
            self._end(operation, progress, OperationState.DONE, result=result)

    def _end(
        self,
        operation: Operation,
        progress: Progress,
        state: OperationState,
        *,
        error: ErrorInfo | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        what = f"operation {operation.id}"
        state = move(OPERATION_TRANSITIONS, operation.state, state, what)
        ended = msgspec.structs.replace(operation, state=state, error=error, result=result)
        self._known[operation.id] = (ended, progress)
        progress.end(state, error, result)

    def _forget(self) -> None:
        ended = [i for i, (o, _) in self._known.items() if o.state is not OperationState.RUNNING]
        for operation_id in ended[: max(0, len(self._known) - _KEPT)]:
            del self._known[operation_id]
