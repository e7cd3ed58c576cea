"""The daemon's only memory: SQLite in WAL mode, never on the event loop's thread.

Rule: write the intent, act, write the result. A daemon that is killed at any instruction leaves
rows from which the next one finds every QEMU, tap, overlay and file again.

`synchronous=NORMAL`: in WAL mode a commit then costs no fsync (sqlite.org/pragma.html). Rows can
be lost with the power, and so are the VMs they describe.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct, ValidationError, convert

from templated import failpoints
from templated.errors import Busy, Conflict, Defect, HostError
from templated.model.clone import TRANSITIONS as CLONE_TRANSITIONS
from templated.model.clone import CloneState, Key, Slot, StartPath
from templated.model.generation import TRANSITIONS as GENERATION_TRANSITIONS
from templated.model.generation import GenerationState
from templated.model.lifecycle import S, Table, move
from templated.model.spec import PoolSpec

T = TypeVar("T")
_SCHEMA_VERSION = 3  # 1 and 2 were never released
_SCHEMA = """
CREATE TABLE templates (
    name TEXT PRIMARY KEY,
    active TEXT REFERENCES generations(id)
) STRICT;
CREATE TABLE generations (
    id TEXT PRIMARY KEY,
    template TEXT NOT NULL,
    state TEXT NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE TABLE slots (
    id TEXT PRIMARY KEY,
    idx INTEGER NOT NULL UNIQUE,
    generation TEXT NOT NULL,
    uuid TEXT NOT NULL UNIQUE,
    mac TEXT NOT NULL UNIQUE,
    ip TEXT NOT NULL UNIQUE,
    machine_id TEXT NOT NULL UNIQUE,
    boot_id TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE clones (
    name TEXT PRIMARY KEY,
    slot TEXT NOT NULL UNIQUE REFERENCES slots(id),
    template TEXT NOT NULL,
    state TEXT NOT NULL,
    path TEXT NOT NULL,
    created TEXT NOT NULL,
    pid INTEGER,
    pid_start INTEGER,
    phases TEXT NOT NULL DEFAULT '{}',
    total_ms REAL,
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE pools (
    template TEXT PRIMARY KEY,
    standby INTEGER NOT NULL,
    warm INTEGER NOT NULL
) STRICT;
"""


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


def now(ago: float = 0.0) -> str:
    """The time, RFC 3339 in UTC: at present, or so many seconds ago."""
    return (
        (datetime.now(UTC) - timedelta(seconds=ago))
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


class Journal:
    """All methods are safe to call side by side, from any thread; each is one transaction or read.

    Raises HostError when the file cannot be written (a full disk); nothing of the transaction
    is then kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._began: float | None = None

    @property
    def stalled(self) -> float:
        """Seconds that the transaction under way has taken so far; 0 when there is none."""
        began = self._began
        return time.monotonic() - began if began is not None else 0.0

    async def open(self) -> None:
        """Open or create the file; HostError when it is not a journal that this version reads."""
        await self._run("open", self._open)

    async def close(self) -> None:
        """Close the file; later calls fail."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=True)

    # --- slots and clones -------------------------------------------------------------------

    def new_slot(self, generation: str, make: Callable[[int], Slot], capacity: int) -> Slot:
        """Take the next free index, and write the slot that `make` builds for it.

        Indexes go round, so that an address that was given back is the last to be used again.
        Blocks, so it must run in a thread.
        """
        return self._transaction("new_slot", lambda db: _new_slot(db, generation, make, capacity))

    def drop_slot(self, slot_id: str) -> None:
        """Forget a slot that has been taken down, and its clone. Blocks."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM clones WHERE slot = ?", (slot_id,))
            db.execute("DELETE FROM slots WHERE id = ?", (slot_id,))

        self._transaction("drop_slot", work)

    async def new_clone(self, row: CloneRow) -> None:
        """Give a slot that has a VM a name, which makes it a running clone in one step.

        Until then a restart ends the VM, which it finds by the slot's UUID. Raises Conflict when
        the name or the slot is taken.
        """
        await self._run("new_clone", lambda db: _insert_clone(db, row))

    async def clone_state(self, slot_id: str, state: CloneState, reason: str = "") -> None:
        """Write a state and its reason; does nothing when the slot has no clone any more.

        By slot: the name may belong to another clone by now. Raises Defect for a move that the
        table of clones does not have; leaves the earlier state then.
        """

        def work(db: sqlite3.Connection) -> None:
            found = db.execute("SELECT name, state FROM clones WHERE slot = ?", (slot_id,))
            if row := found.fetchone():
                _check(CLONE_TRANSITIONS, CloneState(row["state"]), state, f"clone {row['name']}")
                sql = "UPDATE clones SET state = ?, reason = ? WHERE slot = ?"
                db.execute(sql, (state.value, reason, slot_id))

        await self._run("clone_state", work)

    async def clones(self) -> list[CloneRow]:
        """All clones, oldest first."""
        return await self._run("clones", lambda db: [_clone_row(r) for r in db.execute(_CLONES)])

    async def free_slots(self) -> list[Slot]:
        """Slots without a clone."""
        return await self._run(
            "free_slots", lambda db: [_read({**r}, Slot) for r in db.execute(_FREE)]
        )

    # --- pools ----------------------------------------------------------------------------------

    async def pool_sizes(self) -> dict[str, PoolSpec]:
        """The sizes that were set at run time, by template."""
        sql = "SELECT template, standby, warm FROM pools"
        return await self._run(
            "pool_sizes",
            lambda db: {
                r["template"]: _read(
                    {"standby": r["standby"], "warm": r["warm"]}, PoolSpec, r["template"]
                )
                for r in db.execute(sql)
            },
        )

    async def set_pool(self, template: str, sizes: PoolSpec | None) -> None:
        """Keep sizes that were set at run time; None forgets them."""
        if sizes is None:
            await self._run("set_pool", _executor("DELETE FROM pools WHERE template = ?", template))
            return
        sql = "INSERT OR REPLACE INTO pools VALUES (?, ?, ?)"
        await self._run("set_pool", _executor(sql, template, sizes.standby, sizes.warm))

    # --- templates and generations ----------------------------------------------------------

    async def new_generation(self, generation_id: str, template: str) -> None:
        """A build begins."""
        sql = "INSERT INTO generations VALUES (?, ?, ?, ?)"
        values = (generation_id, template, GenerationState.BUILDING.value, now())
        await self._run("new_generation", _executor(sql, *values))

    async def activate(self, generation_id: str, template: str) -> None:
        """In one step: the generation is ready and is the one that its template serves.

        Raises Defect for a retired one, and for one that is not there; leaves what was active
        then.
        """

        def work(db: sqlite3.Connection) -> None:
            _move_generation(db, generation_id, GenerationState.READY)
            db.execute(
                "INSERT OR REPLACE INTO templates VALUES (?, ?)",
                (template, generation_id),
            )

        await self._run("activate", work)

    async def generation_state(self, generation_id: str, state: GenerationState) -> None:
        """Write a generation's state. Raises Defect for a move that the table does not have."""
        await self._run("generation_state", lambda db: _move_generation(db, generation_id, state))

    async def deactivate(self, template: str) -> None:
        """The template serves nothing from now on."""
        sql = "DELETE FROM templates WHERE name = ?"
        await self._run("deactivate", _executor(sql, template))

    async def drop_generation(self, generation_id: str) -> None:
        """Forget a generation whose files are gone."""
        sql = "DELETE FROM generations WHERE id = ?"
        await self._run("drop_generation", _executor(sql, generation_id))

    async def generations(self) -> list[GenerationRow]:
        """All generations, oldest first."""
        sql = "SELECT * FROM generations ORDER BY created, id"
        return await self._run(
            "generations", lambda db: [_read({**r}, GenerationRow) for r in db.execute(sql)]
        )

    async def active(self) -> dict[str, str]:
        """The active generation of each template that has one."""
        sql = "SELECT name, active FROM templates"
        return await self._run(
            "active",
            lambda db: _read(
                {r["name"]: r["active"] for r in db.execute(sql)}, dict[Key, Key], "of templates"
            ),
        )

    # --- inside -------------------------------------------------------------------------------

    async def _run(self, name: str, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        # A transaction under way is never abandoned: a caller that is cancelled still waits for
        # its end, so that it gives back exactly what the journal has.
        future = loop.run_in_executor(self._thread, self._transaction, name, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    def _transaction(self, name: str, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the journal is closed")
                self._began = time.monotonic()
                try:
                    return self._committed(name, work)
                finally:
                    self._began = None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # it quotes a broken file
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise HostError(
                f"the journal {self._path} cannot be used: {error}",
                hint="check the space and the permissions of state_dir",
            ) from error

    def _committed(self, name: str, work: Callable[[sqlite3.Connection], T]) -> T:
        if failpoints.armed:
            failpoints.hit(f"journal.{name}", _sqlite_error)
        if self._db is None:
            self._db = self._connect()
        with self._db:
            result = work(self._db)
            if failpoints.armed and self._db.in_transaction:
                failpoints.hit(f"journal.{name}.commit", _sqlite_error)
            return result

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            if self._db is not None:
                self._db.close()
                self._db = None

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=5.0, check_same_thread=False)
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            db.close()
            raise
        return db

    def _open(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == 0:  # a new file
            # One transaction: a file with tables and no version could never be opened again.
            version_set = f"PRAGMA user_version = {_SCHEMA_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {version_set} COMMIT;")
        elif version != _SCHEMA_VERSION:
            raise HostError(
                f"the journal {self._path} has version {version}, not {_SCHEMA_VERSION}",
                hint="run the templated that wrote it, or move state_dir away",
            )


_CLONES = """
SELECT clones.*, slots.*, slots.idx AS "index" FROM clones LEFT JOIN slots ON slots.id = clones.slot
"""
_FREE = """
SELECT *, idx AS "index" FROM slots WHERE id NOT IN (SELECT slot FROM clones) ORDER BY idx
"""
_INSERT_CLONE = "INSERT INTO clones VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def _sqlite_error(_: int, text: str) -> sqlite3.OperationalError:
    return sqlite3.OperationalError(text)


def _executor(sql: str, *values: object) -> Callable[[sqlite3.Connection], None]:
    def work(db: sqlite3.Connection) -> None:
        db.execute(sql, values)

    return work


def _new_slot(
    db: sqlite3.Connection, generation: str, make: Callable[[int], Slot], capacity: int
) -> Slot:
    index = _next_index(db, capacity)
    slot = make(index)
    values = (slot.id, index, generation, slot.uuid, slot.mac, slot.ip, slot.machine_id)
    db.execute("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, slot.boot_id))
    return slot


def _next_index(db: sqlite3.Connection, capacity: int) -> int:
    row = db.execute("SELECT value FROM counters WHERE name = 'slot'").fetchone()
    start = row["value"] % capacity if row else 0
    taken = {r["idx"] for r in db.execute("SELECT idx FROM slots")}
    for step in range(capacity):
        index = (start + step) % capacity
        if index not in taken:
            db.execute("INSERT OR REPLACE INTO counters VALUES ('slot', ?)", (index + 1,))
            return index
    raise Busy(
        f"all {capacity} slots are in use, by the addresses of the subnet or by the uids",
        hint="remove clones, or configure a larger network.subnet, or more `uids`",
    )


def _check(table: Table[S], old: S, new: S, what: str) -> None:
    """Check a move. Writing the same state again is none: an `rm` is tried again, a rollback."""
    if old is not new:
        move(table, old, new, what)


def _move_generation(db: sqlite3.Connection, generation_id: str, state: GenerationState) -> None:
    found = db.execute("SELECT state FROM generations WHERE id = ?", (generation_id,)).fetchone()
    if found is None:
        raise Defect(f"there is no generation {generation_id} to become {state.value}")
    old = GenerationState(found["state"])
    _check(GENERATION_TRANSITIONS, old, state, f"generation {generation_id}")
    db.execute("UPDATE generations SET state = ? WHERE id = ?", (state.value, generation_id))


def _insert_clone(db: sqlite3.Connection, row: CloneRow) -> None:
    values = (row.name, row.slot.id, row.template, row.state.value, row.path.value, row.created)
    measured = (row.pid, row.pid_start, json.dumps(row.phases), row.total_ms, row.reason)
    try:
        db.execute(_INSERT_CLONE, values + measured)
    except sqlite3.IntegrityError:
        raise Conflict(
            f"a clone named {row.name} exists already",
            hint=f"take another name, or: rm {row.name}",
        ) from None


def _clone_row(row: sqlite3.Row) -> CloneRow:
    fields = {**row, "slot": {**row}, "phases": _phases(row["phases"])}
    return _read(fields, CloneRow)


def _phases(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which is refused with the row


def _read(fields: dict[str, Any], kind: type[T], name: str = "") -> T:
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
