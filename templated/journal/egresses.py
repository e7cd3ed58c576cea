"""The rows of egresses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from templated.errors import Conflict
from templated.journal.rows import check_move, now, parsed, read
from templated.journal.store import Journal
from templated.model.egress import (
    EGRESS_TRANSITIONS,
    MAX_EGRESSES,
    EgressSpec,
    EgressState,
    LaneState,
)


class EgressRow(Struct, frozen=True, kw_only=True):
    """One egress."""

    spec: EgressSpec
    index: Annotated[int, Meta(ge=1, le=MAX_EGRESSES)]
    """Of its link; no other egress of this daemon has it."""
    state: EgressState
    created: str
    lanes: tuple[tuple[int, LaneState], ...] = ()
    """Those that there are beside the first one, which is always there and serves."""


class EgressRows:
    """The part of the journal that egresses have; as in FunctionRows, each is one transaction."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def egresses(self) -> list[EgressRow]:
        """All egresses, by name."""
        sql = "SELECT * FROM egresses ORDER BY name"
        return await self._journal.run("egresses", lambda db: [_row(r) for r in db.execute(sql)])

    async def add(self, spec: EgressSpec, index: int) -> EgressRow:
        """An egress is about to be made. Raises Conflict when its name or index is taken."""
        row = EgressRow(spec=spec, index=index, state=EgressState.MAKING, created=now())
        text = msgspec.json.encode(spec).decode()

        def work(db: sqlite3.Connection) -> None:
            values = (spec.name, index, text, row.state.value, row.created)
            try:
                db.execute("INSERT INTO egresses VALUES (?, ?, ?, ?, ?, '[]')", values)
            except sqlite3.IntegrityError:
                raise Conflict(f"there is an egress {spec.name} already") from None

        await self._journal.run("add_egress", work)
        return row

    async def state(self, name: str, state: EgressState) -> None:
        """Write a state; does nothing when the egress has gone. Defect for a forbidden move."""

        def work(db: sqlite3.Connection) -> None:
            found = db.execute("SELECT state FROM egresses WHERE name = ?", (name,)).fetchone()
            if found is not None:
                old = EgressState(found["state"])
                check_move(EGRESS_TRANSITIONS, old, state, f"egress {name}")
                sql = "UPDATE egresses SET state = ? WHERE name = ?"
                db.execute(sql, (state.value, name))

        await self._journal.run("egress_state", work)

    async def lanes(self, name: str, lanes: Iterable[tuple[int, LaneState]]) -> None:
        """Write which lanes there are; does nothing when the egress has gone."""
        text = msgspec.json.encode(tuple(lanes)).decode()

        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE egresses SET lanes = ? WHERE name = ?", (text, name))

        await self._journal.run("egress_lanes", work)

    async def drop(self, name: str) -> None:
        """Forget an egress of which nothing is left."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM egresses WHERE name = ?", (name,))

        await self._journal.run("drop_egress", work)


def _row(row: sqlite3.Row) -> EgressRow:
    fields = {
        "spec": parsed(row["spec"]),
        "index": row["idx"],
        "state": row["state"],
        "created": row["created"],
        "lanes": parsed(row["lanes"]),
    }
    return read(fields, EgressRow, row["name"])
