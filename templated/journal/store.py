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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import structs

from templated import failpoints
from templated.errors import Busy, Conflict, Defect, HostError
from templated.journal import schema
from templated.journal.rows import CloneRow, GenerationRow, PolicyRow, check_move, now, parsed, read
from templated.model.clone import TRANSITIONS as CLONE_TRANSITIONS
from templated.model.clone import CloneState, Key, Slot
from templated.model.generation import TRANSITIONS as GENERATION_TRANSITIONS
from templated.model.generation import GenerationState
from templated.model.network import Elsewhere
from templated.model.policy import PolicyKeys, PolicyOwner
from templated.model.spec import PoolSpec

T = TypeVar("T")


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
        await self.run("open", self._open)

    async def close(self) -> None:
        """Close the file; later calls fail."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=True)

    # --- slots and clones -------------------------------------------------------------------

    def new_slot(
        self,
        generation: str,
        make: Callable[[int], Slot],
        capacity: int,
        elsewhere: Elsewhere | None = None,
    ) -> Slot:
        """Take the next free index, and write the slot that `make` builds for it.

        Its address is that of the index, or the next free one of the network `elsewhere`. Both go
        round, so that an address that was given back is the last to be used again; no two slots
        have the same, whatever their networks. Raises Busy when there is none; writes nothing then.
        Blocks, so it must run in a thread.
        """
        return self._transaction(
            "new_slot", lambda db: _new_slot(db, generation, make, capacity, elsewhere)
        )

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
        await self.run("new_clone", lambda db: _insert_clone(db, row))

    async def clone_state(self, slot_id: str, state: CloneState, reason: str = "") -> None:
        """Write a state and its reason; does nothing when the slot has no clone any more.

        By slot: the name may belong to another clone by now. Raises Defect for a move that the
        table of clones does not have; leaves the earlier state then.
        """

        def work(db: sqlite3.Connection) -> None:
            found = db.execute("SELECT name, state FROM clones WHERE slot = ?", (slot_id,))
            if row := found.fetchone():
                check_move(
                    CLONE_TRANSITIONS, CloneState(row["state"]), state, f"clone {row['name']}"
                )
                sql = "UPDATE clones SET state = ?, reason = ? WHERE slot = ?"
                db.execute(sql, (state.value, reason, slot_id))

        await self.run("clone_state", work)

    async def clones(self) -> list[CloneRow]:
        """All clones, oldest first."""
        return await self.run("clones", lambda db: [_clone_row(r) for r in db.execute(_CLONES)])

    async def free_slots(self) -> list[Slot]:
        """Slots without a clone."""
        return await self.run(
            "free_slots", lambda db: [read({**r}, Slot) for r in db.execute(_FREE)]
        )

    # --- pools ----------------------------------------------------------------------------------

    async def pool_sizes(self) -> dict[str, PoolSpec]:
        """The sizes that were set at run time, by template."""
        sql = "SELECT template, standby, warm FROM pools"
        return await self.run(
            "pool_sizes",
            lambda db: {
                r["template"]: read(
                    {"standby": r["standby"], "warm": r["warm"]}, PoolSpec, r["template"]
                )
                for r in db.execute(sql)
            },
        )

    async def set_pool(self, template: str, sizes: PoolSpec | None) -> None:
        """Keep sizes that were set at run time; None forgets them."""
        if sizes is None:
            await self.run("set_pool", _executor("DELETE FROM pools WHERE template = ?", template))
            return
        sql = "INSERT OR REPLACE INTO pools VALUES (?, ?, ?)"
        await self.run("set_pool", _executor(sql, template, sizes.standby, sizes.warm))

    async def policies(self) -> dict[PolicyOwner, PolicyKeys]:
        """The keys of the network policies that are in force."""

        def work(db: sqlite3.Connection) -> dict[PolicyOwner, PolicyKeys]:
            found = db.execute("SELECT * FROM policies").fetchall()
            rows = (
                read({"name": r["name"], "kind": r["kind"], "keys": parsed(r["keys"])}, PolicyRow)
                for r in found
            )
            return {PolicyOwner(row.kind, row.name): row.keys for row in rows}

        return await self.run("policies", work)

    async def set_policy(self, owner: PolicyOwner, keys: PolicyKeys | None) -> None:
        """Keep the keys of a policy that is in force; None forgets it."""
        if keys is None:
            sql = "DELETE FROM policies WHERE kind = ? AND name = ?"
            await self.run("set_policy", _executor(sql, *owner))
            return
        written = msgspec.json.encode(keys).decode()
        sql = "INSERT OR REPLACE INTO policies VALUES (?, ?, ?)"
        await self.run("set_policy", _executor(sql, *owner, written))

    # --- templates and generations ----------------------------------------------------------

    async def new_generation(self, generation_id: str, template: str) -> None:
        """A build begins."""
        sql = "INSERT INTO generations VALUES (?, ?, ?, ?)"
        values = (generation_id, template, GenerationState.BUILDING.value, now())
        await self.run("new_generation", _executor(sql, *values))

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

        await self.run("activate", work)

    async def generation_state(self, generation_id: str, state: GenerationState) -> None:
        """Write a generation's state. Raises Defect for a move that the table does not have."""
        await self.run("generation_state", lambda db: _move_generation(db, generation_id, state))

    async def deactivate(self, template: str) -> None:
        """The template serves nothing from now on."""
        sql = "DELETE FROM templates WHERE name = ?"
        await self.run("deactivate", _executor(sql, template))

    async def drop_generation(self, generation_id: str) -> None:
        """Forget a generation whose files are gone."""
        sql = "DELETE FROM generations WHERE id = ?"
        await self.run("drop_generation", _executor(sql, generation_id))

    async def generations(self) -> list[GenerationRow]:
        """All generations, oldest first."""
        sql = "SELECT * FROM generations ORDER BY created, id"
        return await self.run(
            "generations", lambda db: [read({**r}, GenerationRow) for r in db.execute(sql)]
        )

    async def active(self) -> dict[str, str]:
        """The active generation of each template that has one."""
        sql = "SELECT name, active FROM templates"
        return await self.run(
            "active",
            lambda db: read(
                {r["name"]: r["active"] for r in db.execute(sql)}, dict[Key, Key], "of templates"
            ),
        )

    # --- inside -------------------------------------------------------------------------------

    async def run(self, name: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` as one transaction; `name` is that of its failpoint, `journal.NAME`."""
        loop = asyncio.get_running_loop()
        # A transaction under way is never abandoned: a caller that is cancelled still waits for
        # its end, so that it gives back exactly what the journal has.
        future = loop.run_in_executor(self._thread, self._transaction, name, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # nobody is left to be told
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
        # One transaction each: a file with tables and no version could never be opened again.
        if version == 0:  # a new file
            _upgrade(db, schema.SCHEMA)
        elif version in schema.MIGRATIONS:
            _upgrade(db, schema.MIGRATIONS[version])
        elif version != schema.VERSION:
            raise HostError(
                f"the journal {self._path} has version {version}, not {schema.VERSION}",
                hint="run the templated that wrote it, or move state_dir away",
            )


_CLONES = """
SELECT clones.*, slots.*, slots.idx AS "index" FROM clones LEFT JOIN slots ON slots.id = clones.slot
"""
_FREE = """
SELECT *, idx AS "index" FROM slots WHERE id NOT IN (SELECT slot FROM clones) ORDER BY idx
"""
_INSERT_CLONE = "INSERT INTO clones VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def _upgrade(db: sqlite3.Connection, script: str) -> None:
    db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {schema.VERSION}; COMMIT;")


def _sqlite_error(_: int, text: str) -> sqlite3.OperationalError:
    return sqlite3.OperationalError(text)


def _executor(sql: str, *values: object) -> Callable[[sqlite3.Connection], None]:
    def work(db: sqlite3.Connection) -> None:
        db.execute(sql, values)

    return work


def _new_slot(
    db: sqlite3.Connection,
    generation: str,
    make: Callable[[int], Slot],
    capacity: int,
    elsewhere: Elsewhere | None,
) -> Slot:
    rows = db.execute("SELECT idx, ip FROM slots").fetchall()
    indexes, addresses = {row["idx"] for row in rows}, {row["ip"] for row in rows}
    given = None if elsewhere is None else _next_address(db, elsewhere, addresses)
    for index in _round(db, "slot", capacity):
        if index in indexes:
            continue
        slot = make(index)
        if given is not None:
            slot = structs.replace(slot, ip=given)
        elif slot.ip in addresses:  # of a slot on another network with the same subnet
            continue
        _pass(db, "slot", index)
        values = (slot.id, index, generation, slot.uuid, slot.mac, slot.ip, slot.machine_id)
        db.execute("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, slot.boot_id))
        return slot
    raise Busy(
        f"all {capacity} slots are in use, by the addresses of the subnet or by the uids",
        hint="remove clones, or configure a larger network.subnet, or more `uids`",
    )


def _next_address(db: sqlite3.Connection, elsewhere: Elsewhere, taken: set[str]) -> str:
    counter, plan = f"network {elsewhere.name}", elsewhere.plan
    for offset in _round(db, counter, plan.capacity):
        if (ip := plan.ip(offset)) not in taken:
            _pass(db, counter, offset)
            return ip
    raise Busy(
        f"all {plan.capacity} addresses of libvirt's network {elsewhere.name} are in use",
        hint=f"remove clones, or let DHCP have fewer: virsh net-edit {elsewhere.name}, and build",
    )


def _round(db: sqlite3.Connection, counter: str, capacity: int) -> Iterator[int]:
    """The numbers below `capacity`, each once, from the one after that which was given last."""
    row = db.execute("SELECT value FROM counters WHERE name = ?", (counter,)).fetchone()
    start = row["value"] if row else 0
    return ((start + step) % capacity for step in range(capacity))


def _pass(db: sqlite3.Connection, counter: str, number: int) -> None:
    db.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (counter, number + 1))


def _move_generation(db: sqlite3.Connection, generation_id: str, state: GenerationState) -> None:
    found = db.execute("SELECT state FROM generations WHERE id = ?", (generation_id,)).fetchone()
    if found is None:
        raise Defect(f"there is no generation {generation_id} to become {state.value}")
    old = GenerationState(found["state"])
    check_move(GENERATION_TRANSITIONS, old, state, f"generation {generation_id}")
    db.execute("UPDATE generations SET state = ? WHERE id = ?", (state.value, generation_id))


def _insert_clone(db: sqlite3.Connection, row: CloneRow) -> None:
    values = (row.name, row.slot.id, row.template, row.state.value, row.path.value, row.created)
    measured = (row.pid, row.pid_start, json.dumps(row.phases), row.total_ms)
    try:
        db.execute(_INSERT_CLONE, (*values, *measured, row.reason, row.function))
    except sqlite3.IntegrityError:
        raise Conflict(
            f"a clone named {row.name} exists already",
            hint=f"take another name, or: rm {row.name}",
        ) from None


def _clone_row(row: sqlite3.Row) -> CloneRow:
    fields = {**row, "slot": {**row}, "phases": parsed(row["phases"])}
    return read(fields, CloneRow)
