"""The rows of functions: what they are, their versions and aliases, and their queued events."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from templated.errors import Busy, NotFound
from templated.journal.rows import EventRow, check_move, parsed, read
from templated.journal.store import Journal
from templated.model.function import (
    EVENT_TRANSITIONS,
    Alias,
    EventState,
    FunctionName,
    Provisioned,
    Version,
)

LAST_NUMBER = 999_999_999
_Number = Annotated[int, Meta(ge=0, le=LAST_NUMBER)]
_SET = """
INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (function, number) DO UPDATE SET
settings = excluded.settings, digest = excluded.digest, bytes = excluded.bytes,
created = excluded.created
"""
_SET_ALIAS = "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)"
_UNPROVISION = "DELETE FROM provisioned WHERE function = ? AND qualifier = ?"
_ADD_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DUE = "SELECT * FROM events WHERE state = 'queued' AND due <= ? ORDER BY due, id LIMIT ?"
# Without the payloads, which may be large.
_EVENTS = """
SELECT id, function, qualifier, x'' AS payload, state, attempts, created, due, reason FROM events
"""


class FunctionRow(Struct, frozen=True, kw_only=True):
    """One function, apart from its versions."""

    name: FunctionName
    reserved: Annotated[int, Meta(ge=0, le=LAST_NUMBER)] | None
    """How many of its requests may run at once; None: as many as there may be in all."""
    created: str
    least: Annotated[int, Meta(ge=0, le=LAST_NUMBER)] = 0
    """How many instances of `$LATEST` are kept ready."""
    most: Annotated[int, Meta(ge=1, le=LAST_NUMBER)] | None = None
    """How many instances there may be of all versions; None: it has no bound of its own."""


class FunctionRows:
    """The part of the journal that functions have. As in Journal, each method is one transaction
    or read, and raises HostError when the file cannot be used; nothing of it is then kept."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    # --- functions, versions, aliases -----------------------------------------------------------

    async def functions(self) -> list[FunctionRow]:
        """All functions, by name."""
        sql = "SELECT * FROM functions ORDER BY name"
        return await self._journal.run(
            "functions", lambda db: [read({**r}, FunctionRow) for r in db.execute(sql)]
        )

    async def versions(self) -> list[Version]:
        """All versions of all functions, `$LATEST` as number 0."""
        sql = "SELECT * FROM versions ORDER BY function, number"
        return await self._journal.run(
            "versions", lambda db: [_version(r) for r in db.execute(sql)]
        )

    async def aliases(self) -> list[Alias]:
        """All aliases of all functions."""
        sql = "SELECT * FROM aliases ORDER BY function, name"
        return await self._journal.run("aliases", lambda db: [_alias(r) for r in db.execute(sql)])

    async def deploy(self, latest: Version) -> None:
        """Write what `$LATEST` is now, and its function if that is new."""

        def work(db: sqlite3.Connection) -> None:
            sql = "INSERT OR IGNORE INTO functions VALUES (?, NULL, ?, 0, NULL)"
            db.execute(sql, (latest.function, latest.created))
            db.execute(_SET, _values(latest, 0))

        await self._journal.run("deploy", work)

    async def publish(self, latest: Version) -> Version:
        """Write a copy under the next number, and return it; no number is ever used again.

        Raises NotFound when the function has gone, Busy when there are no more numbers.
        """

        def work(db: sqlite3.Connection) -> Version:
            number = _next_number(db, latest.function)
            with _owned(latest.function):
                db.execute(_SET, _values(latest, number))
            return msgspec.structs.replace(latest, number=number)

        return await self._journal.run("publish", work)

    async def set_alias(self, alias: Alias) -> None:
        """Write an alias, in place of the one of this name. NotFound when the function has gone."""
        versions = msgspec.json.encode(alias.versions).decode()
        values = (alias.function, alias.name, versions, alias.description)

        def work(db: sqlite3.Connection) -> None:
            with _owned(alias.function):
                db.execute(_SET_ALIAS, values)

        await self._journal.run("set_alias", work)

    async def drop_alias(self, function: str, name: str) -> None:
        """Forget an alias, and what was provisioned for it."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM aliases WHERE function = ? AND name = ?", (function, name))
            db.execute(_UNPROVISION, (function, name))

        await self._journal.run("drop_alias", work)

    async def drop_version(self, function: str, number: int) -> None:
        """Forget a version, and what was provisioned for it; its number stays used."""

        def work(db: sqlite3.Connection) -> None:
            sql = "DELETE FROM versions WHERE function = ? AND number = ?"
            db.execute(sql, (function, number))
            db.execute(_UNPROVISION, (function, str(number)))

        await self._journal.run("drop_version", work)

    async def drop_function(self, function: str) -> None:
        """Forget a function with its versions, aliases and events; its numbers stay used."""
        sql = "DELETE FROM functions WHERE name = ?"
        await self._journal.run("drop_function", _executor(sql, function))

    async def reserve(self, function: str, count: int | None) -> None:
        """Write how many requests of a function may run at once."""
        sql = "UPDATE functions SET reserved = ? WHERE name = ?"
        await self._journal.run("reserve", _executor(sql, count, function))

    async def scale(self, function: str, least: int, most: int | None) -> None:
        """Write how many instances are kept, and how many there may be."""
        sql = "UPDATE functions SET least = ?, most = ? WHERE name = ?"
        await self._journal.run("scale", _executor(sql, least, most, function))

    async def provisioned(self) -> list[Provisioned]:
        """What is provisioned for versions and aliases of all functions."""
        sql = "SELECT * FROM provisioned ORDER BY function, qualifier"
        return await self._journal.run(
            "provisioned", lambda db: [read({**r}, Provisioned) for r in db.execute(sql)]
        )

    async def provision(self, row: Provisioned) -> None:
        """Write what is provisioned for a version or an alias. NotFound without its function."""
        values = (row.function, row.qualifier, row.count, row.changed)

        def work(db: sqlite3.Connection) -> None:
            with _owned(row.function):
                db.execute("INSERT OR REPLACE INTO provisioned VALUES (?, ?, ?, ?)", values)

        await self._journal.run("provision", work)

    async def unprovision(self, function: str, qualifier: str) -> None:
        """Forget what is provisioned for a version or an alias."""
        await self._journal.run("unprovision", _executor(_UNPROVISION, function, qualifier))

    # --- asynchronous events ------------------------------------------------------------------

    async def add_event(self, row: EventRow) -> None:
        """Write an event: once this returns it is not lost. NotFound without its function."""
        values = (row.id, row.function, row.qualifier, row.payload, row.state.value)

        def work(db: sqlite3.Connection) -> None:
            with _owned(row.function):
                db.execute(_ADD_EVENT, (*values, row.attempts, row.created, row.due, row.reason))

        await self._journal.run("add_event", work)

    async def due_events(self, at: float, limit: int = 100) -> list[EventRow]:
        """Queued events that are due at this time (seconds since the epoch), the first ones."""
        return await self._journal.run(
            "due_events", lambda db: [_event(r) for r in db.execute(_DUE, (at, limit))]
        )

    async def next_due(self) -> float | None:
        """When the next queued event is due; None when none is queued."""
        sql = "SELECT min(due) AS due FROM events WHERE state = 'queued'"
        return await self._journal.run(
            "next_due", lambda db: read({"due": db.execute(sql).fetchone()["due"]}, _Due).due
        )

    async def event_state(
        self,
        event_id: str,
        state: EventState,
        *,
        attempts: int | None = None,
        due: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Write a state, and what else is not None; does nothing when the event has gone.

        Raises Defect for a move that the table of events does not have; leaves the earlier row
        then.
        """

        def work(db: sqlite3.Connection) -> None:
            found = db.execute("SELECT * FROM events WHERE id = ?", (event_id,)).fetchone()
            if found is None:
                return
            old = _event(found)
            check_move(EVENT_TRANSITIONS, old.state, state, f"event {event_id}")
            values = (
                state.value,
                old.attempts if attempts is None else attempts,
                old.due if due is None else due,
                old.reason if reason is None else reason,
            )
            sql = "UPDATE events SET state = ?, attempts = ?, due = ?, reason = ? WHERE id = ?"
            db.execute(sql, (*values, event_id))

        await self._journal.run("event_state", work)

    async def drop_event(self, event_id: str) -> None:
        """Forget an event that is done."""
        await self._journal.run(
            "drop_event", _executor("DELETE FROM events WHERE id = ?", event_id)
        )

    async def events(
        self, function: str | None = None, *, state: EventState | None = None, limit: int = 1000
    ) -> list[EventRow]:
        """The oldest events: of one function or of all, in one state or in any."""
        sql = (
            "SELECT * FROM events WHERE (?1 IS NULL OR function = ?1)"
            " AND (?2 IS NULL OR state = ?2) ORDER BY created, id LIMIT ?3"
        )
        values = (function, state.value if state else None, limit)
        return await self._journal.run(
            "events", lambda db: [_event(r) for r in db.execute(sql, values)]
        )

    async def event_counts(self) -> dict[str, dict[EventState, int]]:
        """How many events each function has, by state. Reads every row as strictly as for use."""

        def work(db: sqlite3.Connection) -> dict[str, dict[EventState, int]]:
            found: dict[str, Counter[EventState]] = {}
            for row in map(_event, db.execute(_EVENTS)):
                found.setdefault(row.function, Counter())[row.state] += 1
            return {function: dict(counts) for function, counts in found.items()}

        return await self._journal.run("event_counts", work)


class _Due(Struct, frozen=True):
    due: float | None


class _Last(Struct, frozen=True):
    function: FunctionName
    last: _Number


@contextmanager
def _owned(function: str) -> Iterator[None]:
    """Turns what SQLite says of a row without its function into NotFound."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorname != "SQLITE_CONSTRAINT_FOREIGNKEY":
            raise
        hint = "see: templated function ls"
        raise NotFound(f"there is no function {function}", hint=hint) from None


def _executor(sql: str, *values: object) -> Callable[[sqlite3.Connection], None]:
    def work(db: sqlite3.Connection) -> None:
        db.execute(sql, values)

    return work


def _next_number(db: sqlite3.Connection, function: str) -> int:
    """The number after the last one that the function, or an earlier one of its name, had."""
    found = db.execute("SELECT * FROM numbers WHERE function = ?", (function,)).fetchone()
    last = read({**found}, _Last).last if found else 0
    sql = "SELECT ? AS function, coalesce(max(number), 0) AS last FROM versions WHERE function = ?"
    highest = read({**db.execute(sql, (function, function)).fetchone()}, _Last).last
    number = max(last, highest) + 1
    if number > LAST_NUMBER:
        raise Busy(f"function {function} has had all {LAST_NUMBER} versions that there can be")
    db.execute("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (function, number))
    return number


def _values(version: Version, number: int) -> tuple[object, ...]:
    settings = msgspec.json.encode(version.settings).decode()
    code = version.code
    return version.function, number, settings, code.digest, code.bytes, version.created


def _version(row: sqlite3.Row) -> Version:
    fields: dict[str, Any] = {
        "function": row["function"],
        "number": row["number"],
        "settings": parsed(row["settings"]),
        "code": {"digest": row["digest"], "bytes": row["bytes"]},
        "created": row["created"],
    }
    version = read(fields, Version, f"{row['function']}:{row['number']}")
    read({"function": version.function, "last": version.number}, _Last)
    return version


def _alias(row: sqlite3.Row) -> Alias:
    fields = {**row, "versions": parsed(row["versions"])}
    return read(fields, Alias, f"{row['function']}:{row['name']}")


def _event(row: sqlite3.Row) -> EventRow:
    return read({**row}, EventRow)
