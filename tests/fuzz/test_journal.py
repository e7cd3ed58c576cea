"""Journals that something has spoiled: the daemon starts, or says what is wrong with them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import TemplatedError
from templated.journal import FunctionRows
from templated.model.api import CloneRequest
from templated.model.config import Config
from templated.services.daemon import Services
from templated.services.places import Layout
from tests.fuzz.cases import check_error, fuzz
from tests.unit.fake_daemon import GENERATION, activate, configured, daemon, freeze
from tests.unit.test_function_rows import filled

_COLUMNS = {
    "templates": ["name", "active"],
    "generations": ["id", "template", "state", "created"],
    "slots": ["id", "idx", "generation", "uuid", "mac", "ip", "machine_id", "boot_id"],
    "clones": [
        *("name", "slot", "template", "state", "path", "created"),
        *("pid", "pid_start", "phases", "total_ms", "reason", "function"),
    ],
    "counters": ["name", "value"],
    "pools": ["template", "standby", "warm"],
    "functions": ["name", "reserved", "created", "least", "most"],
    "provisioned": ["function", "qualifier", "count", "changed"],
    "versions": ["function", "number", "settings", "digest", "bytes", "created"],
    "numbers": ["function", "last"],
    "aliases": ["function", "name", "versions", "description"],
    "events": [
        *("id", "function", "qualifier", "payload", "state", "attempts", "created", "due"),
        "reason",
    ],
}
_PLACES = [(table, column) for table, columns in _COLUMNS.items() for column in columns]
_VALUES = st.one_of(
    st.none(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(),
    st.binary(max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            *(
                "",
                ".",
                "..",
                "../..",
                "a/b",
                "/",
                "\0",
                "starting",
                "removing",
                "building",
                "ready",
            ),
            *("queued", "f", "$LATEST", '{"1": 0.5}', '{"handler": "a.b", "template": "t"}'),
            *("{}", "[]", '{"spawn": "x"}', "[" * 5000, "x" * 5000, "direct", "dead", 0, -1, 1),
        ]
    ),
)
_ROWS = st.lists(st.tuples(st.sampled_from(_PLACES), _VALUES), min_size=1, max_size=3)
_DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.binary(min_size=1, max_size=64)),
)
_CASE = st.one_of(_ROWS, _ROWS, st.lists(_DAMAGE, min_size=1, max_size=3))


# The rows of the clone c-2; of the other tables, any. The clone c-1 is the bystander.
_OWN = {
    "clones": "name = 'c-2'",
    "slots": "id = (SELECT slot FROM clones WHERE name = 'c-2')",
}


def _spoil_rows(path: Path, changes: list[Any]) -> None:
    """As another program might, without the journal's care; STRICT tables refuse some of it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        rows = {
            table: db.execute(f"SELECT rowid FROM {table} WHERE {_OWN.get(table, 1)}").fetchone()[0]
            for table in _COLUMNS
        }
        for (table, column), value in changes:
            with suppress(sqlite3.Error, OverflowError):
                db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, rows[table]))


def _spoil_bytes(path: Path, changes: list[Any]) -> None:
    data = bytearray(path.read_bytes())
    for kind, where, new in changes:
        at = int(where * len(data))
        if kind == "cut":
            del data[at:]
        else:
            data[at : at + len(new)] = new
    path.write_bytes(data)


async def _prepare(config: Config, fake: FakeHypervisor) -> None:
    """A daemon that ran, with two clones and a pool."""
    Layout(config).create()
    freeze(config)
    await activate(config)
    async with daemon(config, fake) as running:
        await running.clones.create(CloneRequest(name="c", count=2))
        await filled(running.context.journal)
    with closing(sqlite3.connect(Layout(config).journal, isolation_level=None)) as db:
        db.execute("INSERT INTO pools VALUES ('u', 0, 0)")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _use_functions(running: Services) -> None:
    """All that is read of them; one that is known can be changed, or says why not."""
    functions = running.functions
    rows = FunctionRows(running.context.journal)
    await rows.events()
    await rows.due_events(1e9)
    await rows.next_due()
    await rows.event_counts()
    for view in functions.views():
        await functions.registry.publish(view.name)
        await functions.registry.reserve(view.name, 1)
        await functions.registry.remove(view.name)


def _disk(layout: Layout) -> Path:
    """The disk of c-1."""
    with closing(sqlite3.connect(layout.journal)) as db:
        (slot,) = db.execute("SELECT slot FROM clones WHERE name = 'c-1'").fetchone()
    return layout.overlay(slot)


def _rows(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as db:
        return {name for (name,) in db.execute("SELECT CAST(name AS TEXT) FROM clones")}


def test_spoiled_journals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No traceback; nothing outside is touched, and no other clone is lost."""
    config = configured(tmp_path)
    layout, kept = Layout(config), tmp_path / "kept"
    bystander = tmp_path / "bystander"
    bystander.write_text("nobody's")

    async def case(changes: list[Any], fake: FakeHypervisor) -> None:
        caplog.clear()
        for path in (layout.state, layout.shm, layout.runtime):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(kept / path.name, path, symlinks=True)
        by_row = isinstance(changes[0][0], tuple)
        (_spoil_rows if by_row else _spoil_bytes)(layout.journal, changes)
        try:
            async with asyncio.timeout(30), daemon(config, fake) as running:
                await _use_functions(running)
                assert not by_row or "c-1" in {view.name for view in running.clones.views()}
        except TemplatedError as error:
            check_error(error)
        assert bystander.exists() and layout.slots.is_dir() and layout.sockets.is_dir()
        if by_row:
            assert "c-1" in _rows(layout.journal)
            assert _disk(layout).exists() and layout.generation("t", GENERATION).is_dir()
        wrong = [record for record in caplog.records if record.exc_info]
        assert not wrong, wrong

    async def prepare() -> None:
        fake = FakeHypervisor()
        await _prepare(config, fake)
        await fake.close()
        for path in (layout.state, layout.shm, layout.runtime):
            shutil.copytree(
                path, kept / path.name, ignore=shutil.ignore_patterns("*.sock", "agent", "qmp")
            )

    async def one(changes: list[Any]) -> None:
        fake = FakeHypervisor()
        try:
            await case(changes, fake)
        finally:
            await fake.close()

    caplog.set_level(logging.INFO)
    asyncio.run(prepare())
    fuzz("journal", _CASE, lambda changes: asyncio.run(one(changes)))
