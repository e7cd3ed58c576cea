"""Asynchronous events: accepted into the journal, and run at least once, whatever happens.

An event whose function fails is tried twice more, later and later; then it is a dead letter, which
is kept for people to see. What is not the function's fault, such as a bound that is reached, is
tried until the event is too old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from templated.errors import (
    Busy,
    HostError,
    HypervisorError,
    InvalidRequest,
    NotFound,
    StartError,
    TemplatedError,
    Throttled,
    Timeout,
)
from templated.journal import EventRow
from templated.model.function import LATEST, EventState, EventView, InvokeView
from templated.services.functions.parts import Versions
from templated.services.functions.payloads import checked
from templated.services.functions.traces import MAX_HEADER
from templated.services.reports.events import EventBus

log = logging.getLogger(__name__)
MAX_EVENT = 1 << 20
"""Bytes of an event's payload: all that wait lie in the journal."""
_SHOWN = 4096
_LONGEST_WAIT = 60.0
# The journal refuses: the next try, in seconds.
_PAUSE = 1.0
_RUNNING_AT_MOST = 10_000
# Headers with trace ids that are kept, in memory alone: who made an event matters for seconds.
_TRACES = 4096
_NOT_ITS_FAULT = (Busy, StartError, HostError, HypervisorError, Timeout)


@dataclass(frozen=True, kw_only=True)
class EventLimits:
    """How many events there may be, and when they are tried again; times in seconds."""

    parallel: int = 16
    """Events that run at once."""
    waiting: int = 1000
    """Events of one function that are accepted and not done."""
    kept: int = 100
    """Dead letters of one function."""
    retries: tuple[float, ...] = (60.0, 120.0)
    """Before each further try of a function that failed."""
    pause: float = 1.0
    """Before the next try of an event that could not run; twice as long each time."""
    longest_pause: float = 300.0
    longest: float = 6 * 3600.0
    """The age at which an event is given up."""


class EventRows(Protocol):
    """The journal's part of events."""

    async def add_event(self, row: EventRow) -> None:
        """Write an event."""

    async def due_events(self, at: float, limit: int = 100) -> list[EventRow]:
        """The queued events that are due."""

    async def next_due(self) -> float | None:
        """When the next queued one is."""

    async def event_state(
        self,
        event_id: str,
        state: EventState,
        *,
        attempts: int | None = None,
        due: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Write a state, and what else is not None."""

    async def drop_event(self, event_id: str) -> None:
        """Forget an event."""

    async def events(
        self, function: str | None = None, *, state: EventState | None = None, limit: int = 1000
    ) -> list[EventRow]:
        """The oldest events."""

    async def event_counts(self) -> dict[str, dict[EventState, int]]:
        """How many each function has, by state."""


class Answered(Protocol):
    """What a request gave."""

    @property
    def view(self) -> InvokeView:
        """The answer."""


class Runs(Protocol):
    """Runs requests: the router."""

    async def invoke(
        self,
        name: str,
        qualifier: str | None,
        payload: bytes,
        *,
        trace: str = "",
        request: str | None = None,
    ) -> Answered:
        """Run one request."""


class EventQueue:
    """The events of all functions."""

    def __init__(
        self,
        rows: EventRows,
        versions: Versions,
        router: Runs,
        events: EventBus,
        limits: EventLimits = EventLimits(),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._versions = versions
        self._router = router
        self._events = events
        self._limits = limits
        self._clock = clock
        self._changed = asyncio.Event()
        self._waiting: Counter[str] = Counter()
        self._pauses: dict[str, float] = {}
        self._traces: dict[str, str] = {}
        self._closing = False
        self._tries: set[asyncio.Task[None]] = set()
        self._unwritten: set[str] = set()
        """Events whose try has ended, which the journal did not take: they are tried again."""

    async def open(self) -> None:
        """Queue again what an earlier daemon has not ended. Raises HostError."""
        for row in await self._rows.events(state=EventState.RUNNING, limit=_RUNNING_AT_MOST):
            await self._rows.event_state(row.id, EventState.QUEUED, due=self._clock())
        for function, states in (await self._rows.event_counts()).items():
            self._waiting[function] = states.get(EventState.QUEUED, 0)

    async def enqueue(
        self, name: str, qualifier: str | None, payload: bytes, *, trace: str = ""
    ) -> str:
        """Accept an event: once this returns its id, it is not lost. `trace` is the header that
        came with it.

        Raises NotFound, InvalidRequest, Throttled, or HostError when the journal cannot be
        written; leaves nothing then.
        """
        payload = await checked(payload)
        if len(payload) > MAX_EVENT:
            raise InvalidRequest(
                f"the payload of an event has at most {MAX_EVENT} bytes, this one {len(payload)}",
                hint="hand over large data by a place where the function finds it",
            )
        self._versions.resolve(name, qualifier)
        if self._waiting[name] >= self._limits.waiting:
            raise Throttled(
                f"{self._waiting[name]} events of function {name} wait already",
                reason="queue",
                hint=f"see: templated function events {name}",
            )
        row = EventRow(
            id=str(uuid.uuid4()),
            function=name,
            qualifier=qualifier or LATEST,
            payload=payload,
            created=_shown(self._clock()),
            due=self._clock(),
        )
        self._waiting[name] += 1
        if 0 < len(trace) <= MAX_HEADER:
            self._traces[row.id] = trace
            if len(self._traces) > _TRACES:
                del self._traces[next(iter(self._traces))]
        try:
            await self._rows.add_event(row)
        except TemplatedError:
            self._done(name)
            self._forget(row)
            raise
        self._changed.set()
        return row.id

    async def run(self) -> None:
        """Run what is due, until closed or cancelled."""
        try:
            while not self._closed():
                self._changed.clear()
                try:
                    due = await self._begin()
                except HostError as error:
                    log.warning("cannot run events: %s", error.message)
                    due = self._clock() + _PAUSE
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(due - self._clock(), _LONGEST_WAIT)):
                        await self._changed.wait()
        finally:
            await self.close()

    async def close(self) -> None:
        """Begin nothing more, and leave what runs to the next daemon, which runs it again.

        To be called before the router is closed: else its failures would be the events'. Raises
        nothing.
        """
        self._closing = True
        self._changed.set()
        tries = set(self._tries)
        for task in tries:
            task.cancel()
        if tries:
            await asyncio.wait(tries)

    async def _begin(self) -> float:
        """Begin what is due, as much as may run at once; returns when to look again."""
        later = self._clock() + _LONGEST_WAIT
        for event in list(self._unwritten):
            due = self._clock() + _PAUSE
            await self._rows.event_state(event, EventState.QUEUED, due=due)
            self._unwritten.discard(event)
        free = self._limits.parallel - len(self._tries)
        if free <= 0 or self._closed():
            return later
        for row in await self._rows.due_events(self._clock(), free):
            await self._rows.event_state(row.id, EventState.RUNNING)
            if self._closed():
                return later
            task = asyncio.create_task(self._tried(row), name=f"event {row.id}")
            self._tries.add(task)
            task.add_done_callback(self._tries.discard)
        if len(self._tries) >= self._limits.parallel:
            return later
        next_due = await self._rows.next_due()
        return later if next_due is None else next_due

    def _closed(self) -> bool:
        return self._closing

    async def _tried(self, row: EventRow) -> None:
        try:
            await self._try(row)
        except HostError as error:
            log.warning("cannot write how event %s ended: %s", row.id, error.message)
            self._unwritten.add(row.id)
        finally:
            self._changed.set()

    # --- one try ------------------------------------------------------------------------------

    async def _try(self, row: EventRow) -> None:
        if self._age(row) > self._limits.longest:
            await self._fail(row, row.attempts, row.reason or "it waited for too long")
            return
        qualifier = None if row.qualifier == LATEST else row.qualifier
        work = self._router.invoke(
            row.function,
            qualifier,
            row.payload,
            trace=self._traces.get(row.id, ""),
            request=row.id,
        )
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, NotFound | InvalidRequest):
            await self._fail(row, row.attempts + 1, outcome.message)
        elif isinstance(outcome, _NOT_ITS_FAULT):
            await self._postpone(row, outcome)
        elif isinstance(outcome, BaseException):
            if not isinstance(outcome, TemplatedError):
                log.error("event %s of %s failed", row.id, row.function, exc_info=outcome)
            await self._again(row, str(outcome))
        elif outcome.view.error is not None:
            await self._again(row, _reason(outcome.view))
        else:
            await self._rows.drop_event(row.id)
            self._done(row.function)
            self._forget(row)

    async def _again(self, row: EventRow, reason: str) -> None:
        """A try failed: another one later, unless this was the last."""
        attempts = row.attempts + 1
        if attempts > len(self._limits.retries):
            await self._fail(row, attempts, reason)
        else:
            await self._requeue(row, attempts, self._limits.retries[attempts - 1], reason)

    async def _postpone(self, row: EventRow, error: TemplatedError) -> None:
        """It could not run, which is no try."""
        pause = self._pauses.get(row.id, self._limits.pause)
        self._pauses[row.id] = min(pause * 2, self._limits.longest_pause)
        await self._requeue(row, row.attempts, pause, error.message)

    async def _requeue(self, row: EventRow, attempts: int, pause: float, reason: str) -> None:
        if self._age(row) + pause > self._limits.longest:
            await self._fail(row, attempts, reason)
            return
        due = self._clock() + pause
        await self._rows.event_state(
            row.id, EventState.QUEUED, attempts=attempts, due=due, reason=reason
        )

    async def _fail(self, row: EventRow, attempts: int, reason: str) -> None:
        """Make it a dead letter, and forget the oldest ones of too many."""
        await self._rows.event_state(row.id, EventState.FAILED, attempts=attempts, reason=reason)
        self._done(row.function)
        self._forget(row)
        self._events.emit(
            "function.event_failed",
            row.function,
            id=row.id,
            version=row.qualifier,
            attempts=attempts,
            reason=reason,
        )
        limit = self._limits.kept + self._limits.parallel
        dead = await self._rows.events(row.function, state=EventState.FAILED, limit=limit)
        for old in dead[: max(len(dead) - self._limits.kept, 0)]:
            await self._rows.drop_event(old.id)

    def _forget(self, row: EventRow) -> None:
        self._pauses.pop(row.id, None)
        self._traces.pop(row.id, None)

    def _age(self, row: EventRow) -> float:
        return self._clock() - datetime.fromisoformat(row.created).timestamp()

    def _done(self, function: str) -> None:
        if self._waiting[function] > 1:
            self._waiting[function] -= 1
        else:
            del self._waiting[function]

    # --- showing, and what people do ------------------------------------------------------------

    async def views(self, name: str) -> list[EventView]:
        """The events of a function that are not done, oldest first. Raises HostError."""
        return [_view(row) for row in await self._rows.events(name)]

    async def retry(self, name: str, event: str) -> str:
        """Queue a dead letter's event anew, under the id that is returned.

        Raises NotFound, and what `enqueue` raises; leaves the dead letter then.
        """
        for row in await self._rows.events(name, state=EventState.FAILED):
            if row.id == event:
                again = await self.enqueue(name, row.qualifier, row.payload)
                await self._rows.drop_event(event)
                return again
        raise NotFound(
            f"function {name} has no dead letter {event[:64]}",
            hint=f"see: templated function events {name}",
        )

    async def purge(self, name: str) -> int:
        """Forget the dead letters of a function; returns how many. Raises HostError."""
        dead = await self._rows.events(name, state=EventState.FAILED)
        for row in dead:
            await self._rows.drop_event(row.id)
        return len(dead)

    async def removed(self, function: str, number: int | None) -> None:
        """A function is gone with its events, when there is no number (`Registry.on_removed`)."""
        if number is None:
            del self._waiting[function]


def _reason(view: InvokeView) -> str:
    """How a function failed, in a line."""
    try:
        failed: Any = msgspec.json.decode(view.payload)
    except (msgspec.DecodeError, RecursionError):
        failed = None
    parts: Sequence[object] = ()
    if isinstance(failed, dict):
        parts = [failed.get(key) for key in ("errorType", "errorMessage")]
    return ": ".join(str(part) for part in parts if part)[:500] or f"{view.error}"


def _view(row: EventRow) -> EventView:
    payload = msgspec.json.decode(row.payload) if len(row.payload) <= _SHOWN else None
    return EventView(
        id=row.id,
        function=row.function,
        qualifier=row.qualifier,
        state=row.state,
        attempts=row.attempts,
        created=row.created,
        due=_shown(row.due),
        reason=row.reason,
        payload=payload,
    )


def _shown(at: float) -> str:
    """A time, RFC 3339 in UTC."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
