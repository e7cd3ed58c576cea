"""The rows of the journal: each is read strictly, as the struct that it must be."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, ValidationError, convert

from templated.errors import HostError
from templated.model.clone import CloneState, Key, Slot, StartPath
from templated.model.function import LATEST, EventState, FunctionName
from templated.model.generation import GenerationState
from templated.model.lifecycle import S, Table, move
from templated.model.policy import PolicyKeys

T = TypeVar("T")
InstanceOf = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{1,64}:[$A-Za-z0-9_-]{1,128})?$(?!\n)")]
"""`NAME:VERSION` of the function that a clone is an instance of; empty for ordinary clones."""
Time = Annotated[
    str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$(?!\n)")
]
"""As `now` writes it."""
# Seconds since the epoch of what a datetime can still say.
_LAST = 2e11


class GenerationRow(Struct, frozen=True, kw_only=True):
    """One generation."""

    id: Key
    template: Key
    state: GenerationState
    created: str


class CloneRow(Struct, frozen=True, kw_only=True):
    """One clone with its slot."""

    name: Key
    slot: Slot
    template: Key
    state: CloneState
    path: StartPath
    created: str
    pid: Annotated[int, Meta(ge=1, lt=1 << 31)] | None
    pid_start: int | None
    phases: dict[str, float]
    total_ms: float | None
    reason: str = ""
    function: InstanceOf = ""


class EventRow(Struct, frozen=True, kw_only=True):
    """One asynchronous event of a function."""

    id: Key
    function: FunctionName
    qualifier: Annotated[str, Meta(max_length=128)] = LATEST
    payload: bytes
    state: EventState = EventState.QUEUED
    attempts: Annotated[int, Meta(ge=0)] = 0
    """How often it was tried."""
    created: Time
    due: Annotated[float, Meta(ge=0, le=_LAST)]
    """When it is tried next, in seconds since the epoch."""
    reason: str = ""
    """Why its last try failed."""

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.created)  # its age is asked for: there is no 30 February


class PolicyRow(Struct, frozen=True, kw_only=True):
    """The keys of one network policy, and whose they are."""

    kind: Literal["template", "function"]
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    keys: PolicyKeys


def now(ago: float = 0.0) -> str:
    """The time, RFC 3339 in UTC: at present, or so many seconds ago."""
    return (
        (datetime.now(UTC) - timedelta(seconds=ago))
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def check_move(table: Table[S], old: S, new: S, what: str) -> None:
    """Check a move. Writing the same state again is none: an `rm` is tried again, a rollback."""
    if old is not new:
        move(table, old, new, what)


def parsed(text: Any) -> Any:
    """What `text` is as JSON; text that is none as it is, which is then refused with its row."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def read(fields: dict[str, Any], kind: type[T], name: str = "") -> T:
    """A row as what it must be. HostError otherwise: to leave it out would lose a VM.

    The error names the row by `name`, or by its first field.
    """
    try:
        return convert(fields, kind)
    except ValidationError as error:
        named = name or str(next(iter(fields.values()), ""))
        raise HostError(
            f"the journal has a spoiled row, {named[:70]!r}: {error}",
            hint="mend the row with sqlite3, or stop all VMs and move state_dir away",
        ) from error
