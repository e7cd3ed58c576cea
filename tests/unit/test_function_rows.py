"""The rows of functions: one transaction each, numbers never used twice, steps from 3 and 4."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest
from msgspec.structs import replace

from templated.errors import Busy, Defect, HostError, NotFound
from templated.journal import EventRow, FunctionRow, FunctionRows, Journal, now, schema
from templated.model.function import (
    EVENT_TRANSITIONS,
    Alias,
    CodeView,
    EventState,
    Provisioned,
    Settings,
    Version,
)
from tests.unit.test_journal import clone, make, opened

ROOT = Path(__file__).parents[2]
DIGEST = "ab" * 32
PROVISIONED = Provisioned(function="f", qualifier="live", count=3, changed=now())


def version(number: int = 0, function: str = "f", handler: str = "app.handler") -> Version:
    """A version of a function."""
    return Version(
        function=function,
        number=number,
        settings=Settings(handler=handler, template="t", env={"A": "ü"}),
        code=CodeView(digest=DIGEST, bytes=12),
        created=now(),
    )


def event(name: str, function: str = "f", due: float = 1.0) -> EventRow:
    """A queued event."""
    return EventRow(id=name, function=function, payload=b'{"\xc3\xbc": 1}', created=now(), due=due)


async def filled(journal: Journal) -> FunctionRows:
    """Rows of each kind."""
    rows = FunctionRows(journal)
    await rows.deploy(version())
    await rows.publish(version())
    await rows.set_alias(Alias(function="f", name="live", versions={"1": 1.0}))
    await rows.provision(PROVISIONED)
    await rows.add_event(event("e"))
    return rows


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Also by the next daemon."""

    async def main() -> None:
        latest = version()
        alias = Alias(function="f", name="live", versions={"2": 0.9, "1": 0.1}, description="x")
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            await rows.deploy(latest)
            one = await rows.publish(latest)
            two = await rows.publish(replace(latest, created="later"))
            await rows.set_alias(alias)
            await rows.reserve("f", 5)
            await rows.scale("f", 2, 9)
            await rows.provision(PROVISIONED)
            await rows.provision(replace(PROVISIONED, qualifier="1"))
            await rows.provision(replace(PROVISIONED, qualifier="2", count=4))
            await rows.unprovision("f", "1")
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            function = FunctionRow(name="f", reserved=5, created=latest.created, least=2, most=9)
            kept = [replace(PROVISIONED, qualifier="2", count=4), PROVISIONED]
            assert await rows.provisioned() == kept
            assert await rows.functions() == [function]
            assert await rows.versions() == [latest, one, two]
            assert (one.number, two.number) == (1, 2)
            assert await rows.aliases() == [alias]
            assert list((await rows.aliases())[0].versions) == ["2", "1"]
            changed = version(handler="app.other")
            await rows.deploy(changed)
            assert (await rows.versions())[0] == changed
            assert (await rows.functions())[0] == function
            await rows.drop_version("f", 2)
            assert await rows.provisioned() == [PROVISIONED]
            await rows.drop_alias("f", "live")
            assert await rows.provisioned() == []
            with pytest.raises(NotFound):
                await rows.provision(replace(PROVISIONED, function="g"))

    asyncio.run(main())


def test_numbers_are_never_used_again(tmp_path: Path) -> None:
    """Not of a version that was removed, and not of an earlier function of the same name."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            rows = await filled(journal)
            assert (await rows.publish(version())).number == 2
            await rows.drop_version("f", 2)
            assert (await rows.publish(version())).number == 3
            await rows.drop_function("f")
            assert [await rows.functions(), await rows.versions()] == [[], []]
            await rows.deploy(version())
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            assert (await rows.publish(version())).number == 4
            await rows.deploy(version(function="g"))
            assert (await rows.publish(version(function="g"))).number == 1

    asyncio.run(main())


def test_there_are_no_more_numbers(tmp_path: Path) -> None:
    """The last one that a qualifier can be is the last one that is given."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            rows = await filled(journal)
        spoil(tmp_path, "UPDATE numbers SET last = 999999999")
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            with pytest.raises(Busy, match="all 999999999"):
                await rows.publish(version())
            assert len(await rows.versions()) == 2

    asyncio.run(main())


def test_a_function_goes_with_all_that_it_has(tmp_path: Path) -> None:
    """In one step; whoever comes later is told that it has gone."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            rows = await filled(journal)
            await rows.drop_function("f")
            assert await rows.aliases() == [] and await rows.events() == []
            with pytest.raises(NotFound, match="no function f"):
                await rows.publish(version())
            with pytest.raises(NotFound, match="no function f"):
                await rows.set_alias(Alias(function="f", name="live", versions={"1": 1.0}))
            with pytest.raises(NotFound, match="no function f"):
                await rows.add_event(event("late"))
            await rows.deploy(version())
            await rows.add_event(event("e"))
            with pytest.raises(sqlite3.IntegrityError):  # one id for two is a defect
                await rows.add_event(event("e"))
            # A number that was not given because its function had gone is given later.
            assert (await rows.publish(version())).number == 2

    asyncio.run(main())


def test_the_life_of_an_event(tmp_path: Path) -> None:
    """Queued, run, tried again, and done or kept as a dead letter."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            rows = await filled(journal)
            await rows.add_event(event("later", due=50.5))
            assert await rows.next_due() == 1.0
            (due,) = await rows.due_events(10.0)
            assert due == replace(event("e"), created=due.created)
            await rows.event_state("e", EventState.RUNNING, attempts=1)
            assert await rows.next_due() == 50.5
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            (running,) = await rows.events(state=EventState.RUNNING)
            assert (running.id, running.attempts) == ("e", 1)
            await rows.event_state("e", EventState.QUEUED, due=70.0, reason="it was killed")
            assert [row.id for row in await rows.due_events(100.0)] == ["later", "e"]
            assert [row.id for row in await rows.due_events(100.0, limit=1)] == ["later"]
            counts = await rows.event_counts()
            assert counts == {"f": {EventState.QUEUED: 2}}
            await rows.event_state("e", EventState.FAILED)
            for state in (EventState.QUEUED, EventState.RUNNING):
                with pytest.raises(Defect, match="event e is failed"):
                    await rows.event_state("e", state)
            (dead,) = await rows.events("f", state=EventState.FAILED)
            assert (dead.due, dead.reason, dead.attempts) == (70.0, "it was killed", 1)
            for name in ("e", "later", "none"):
                await rows.drop_event(name)
            await rows.event_state("e", EventState.RUNNING)  # it has gone
            assert await rows.events() == [] and await rows.next_due() is None
            assert await rows.events("other") == []

    asyncio.run(main())


def test_no_forbidden_move_is_written(tmp_path: Path) -> None:
    """Each pair of states: written, or refused with the row as it was."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            rows = await filled(journal)
            for number, (old, new) in enumerate(product(EventState, repeat=2)):
                name = f"e-{number}"
                await rows.add_event(replace(event(name), state=old))
                if new is old or new in EVENT_TRANSITIONS[old]:
                    await rows.event_state(name, new, reason="why")
                    expected = new, "why"
                else:
                    with pytest.raises(Defect, match=f"event {name} is {old.value}"):
                        await rows.event_state(name, new, reason="why")
                    expected = old, ""
                found = {row.id: (row.state, row.reason) for row in await rows.events()}
                assert found[name] == expected

    asyncio.run(main())


ACCEPTS = """
import asyncio, os, signal, sys
from pathlib import Path
from templated.journal import Journal
from tests.unit.test_function_rows import filled

async def main():
    journal = Journal(Path(sys.argv[1]))
    await journal.open()
    await filled(journal)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_an_accepted_event_is_not_lost(tmp_path: Path) -> None:
    """Also when the daemon is killed right after it has answered."""
    command = [sys.executable, "-c", ACCEPTS, str(tmp_path / "journal.sqlite")]
    done = subprocess.run(command, cwd=ROOT, timeout=30, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr

    async def main() -> None:
        async with opened(tmp_path) as journal:
            (row,) = await FunctionRows(journal).events()
            assert (row.id, row.payload) == ("e", event("e").payload)

    asyncio.run(main())


def spoil(path: Path, sql: str) -> None:
    """Change the file as another program might."""
    with closing(sqlite3.connect(path / "journal.sqlite", isolation_level=None)) as db:
        db.execute(sql)


SPOILED = [
    ("functions SET name = '../x'", "'../x'"),
    ("functions SET reserved = -1", "`$.reserved`"),
    ("functions SET least = -1", "`$.least`"),
    ("functions SET most = 0", "`$.most`"),
    ("provisioned SET count = 0", "`$.count`"),
    ("provisioned SET qualifier = ''", "`$.qualifier`"),
    ("versions SET settings = '[['", "'f:0'"),
    ("versions SET settings = '{}'", "handler"),
    ("versions SET digest = '../x'", "`$.code.digest`"),
    ("versions SET number = -1", "`$.number`"),
    ("versions SET number = 1000000000 WHERE number = 1", "`$.last`"),
    ("versions SET function = 'a/b'", "`$.function`"),
    ("aliases SET name = '3'", "'f:3'"),
    ("aliases SET versions = '3'", "`$.versions`"),
    ("aliases SET versions = '{\"1\": 2}'", "'f:live'"),
    ("events SET state = 'lost'", "'lost'"),
    ("events SET due = 9e999", "`$.due`"),
    ("events SET attempts = -1", "`$.attempts`"),
    ("events SET id = '..'", "'..'"),
    ("events SET created = '22'", "`$.created`"),
    ("events SET created = '2026-02-30T00:00:00.000Z'", "day is out of range"),
    ("clones SET function = 'a b'", "`$.function`"),
]


async def read_all(journal: Journal) -> None:
    """What a daemon reads when it starts."""
    rows = FunctionRows(journal)
    await rows.functions()
    await rows.versions()
    await rows.aliases()
    await rows.provisioned()
    await rows.event_counts()
    await journal.clones()


@pytest.mark.parametrize(("change", "what"), SPOILED)
def test_a_spoiled_row(tmp_path: Path, change: str, what: str) -> None:
    """It is refused in one line that names it."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            await filled(journal)
            row = replace(clone("c", journal.new_slot("g", make, 9)), function="f:$LATEST")
            await journal.new_clone(row)
            assert await journal.clones() == [row]
        where = "" if "WHERE" in change else "WHERE rowid = 1"
        spoil(tmp_path, f"UPDATE {change} {where}")
        async with opened(tmp_path) as journal:
            with pytest.raises(HostError, match="spoiled row") as caught:
                await read_all(journal)
        assert what in caught.value.message and "\n" not in caught.value.message

    asyncio.run(main())


# The steps from versions 3 and 4

VERSION_4 = (
    schema.SCHEMA.partition("CREATE TABLE provisioned")[0]
    .replace(",\n    least INTEGER NOT NULL DEFAULT 0,\n    most INTEGER", "")
    .strip()
)
VERSION_3 = schema.SCHEMA.partition("CREATE TABLE functions")[0].replace(
    ",\n    function TEXT NOT NULL DEFAULT ''", ""
)
MIGRATES = """
import asyncio, os, signal, sys
from pathlib import Path
from templated.journal import Journal

class Killed(Journal):
    def _connect(self):
        db = super()._connect()
        def seen(statement):
            if statement.strip().startswith(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        db.set_trace_callback(seen)
        return db

async def main():
    journal = Killed(Path(sys.argv[1]))
    await journal.open()
    await journal.close()

asyncio.run(main())
"""


def as_version_3(path: Path) -> None:
    """A journal that the version before has written, with a clone."""
    with closing(sqlite3.connect(path / "journal.sqlite", isolation_level=None)) as db:
        db.executescript(f"{VERSION_3} PRAGMA user_version = 3;")
        slot = make(1)
        values = (slot.id, 1, "g", slot.uuid, slot.mac, slot.ip, slot.machine_id, slot.boot_id)
        db.execute("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        row = ("c", slot.id, "t", "running", "direct", now(), 12, 34, "{}", 1.5, "")
        db.execute("INSERT INTO clones VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def as_version_4(path: Path) -> None:
    """A journal of the version before, with a clone and with functions."""
    with closing(sqlite3.connect(path / "journal.sqlite", isolation_level=None)) as db:
        db.executescript(f"{VERSION_4} PRAGMA user_version = 4;")
        slot = make(1)
        values = (slot.id, 1, "g", slot.uuid, slot.mac, slot.ip, slot.machine_id, slot.boot_id)
        db.execute("INSERT INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        row = ("c", slot.id, "t", "running", "direct", now(), 12, 34, "{}", 1.5, "", "old:1")
        db.execute("INSERT INTO clones VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO functions VALUES ('old', 7, ?)", (now(),))
        settings = '{"handler": "a.b", "template": "t"}'
        for number in (0, 1):
            one = ("old", number, settings, DIGEST, 12, now())
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", one)
        db.execute("INSERT INTO numbers VALUES ('old', 1)")
        db.execute("INSERT INTO aliases VALUES ('old', 'live', '{\"1\": 1.0}', '')")


def version_of(path: Path) -> tuple[int, set[str]]:
    """The version of the file, and its tables."""
    with closing(sqlite3.connect(path / "journal.sqlite")) as db:
        (number,) = db.execute("PRAGMA user_version").fetchone()
        tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        return number, {name for (name,) in tables}


def test_a_journal_of_version_3(tmp_path: Path) -> None:
    """It becomes one of this version with all that it has, and is the same as a new one."""

    async def main() -> None:
        as_version_3(tmp_path)
        async with opened(tmp_path) as journal:
            (row,) = await journal.clones()
            assert (row.name, row.function, row.pid) == ("c", "", 12)
            await filled(journal)
        (tmp_path / "new").mkdir()
        async with opened(tmp_path / "new"):
            pass
        assert version_of(tmp_path) == version_of(tmp_path / "new")
        assert columns(tmp_path) == columns(tmp_path / "new")

    asyncio.run(main())


def test_a_journal_of_version_4(tmp_path: Path) -> None:
    """The same; its functions keep nothing, and have no bound of their own."""

    async def main() -> None:
        as_version_4(tmp_path)
        async with opened(tmp_path) as journal:
            rows = FunctionRows(journal)
            (function,) = await rows.functions()
            assert (function.name, function.reserved) == ("old", 7)
            assert (function.least, function.most) == (0, None)
            assert [v.number for v in await rows.versions()] == [0, 1]
            assert [a.name for a in await rows.aliases()] == ["live"]
            assert await rows.provisioned() == []
            assert [row.function for row in await journal.clones()] == ["old:1"]
            assert (await rows.publish(version(function="old"))).number == 2
            await filled(journal)
        (tmp_path / "new").mkdir()
        async with opened(tmp_path / "new"):
            pass
        assert version_of(tmp_path) == version_of(tmp_path / "new")
        assert columns(tmp_path) == columns(tmp_path / "new")

    asyncio.run(main())


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All columns of all tables, with their types and defaults."""
    with closing(sqlite3.connect(path / "journal.sqlite")) as db:
        tables = version_of(path)[1]
        return {t: db.execute(f"PRAGMA table_info({t})").fetchall() for t in sorted(tables)}


STATEMENTS = {
    3: ["ALTER", "CREATE TABLE versions", "CREATE INDEX", "PRAGMA user_version =", "COMMIT"],
    4: ["ALTER", "CREATE TABLE provisioned", "PRAGMA user_version =", "COMMIT"],
}
EARLIER = {3: as_version_3, 4: as_version_4}


@pytest.mark.parametrize(
    ("earlier", "statement"), [(n, s) for n, statements in STATEMENTS.items() for s in statements]
)
def test_killed_in_the_middle(tmp_path: Path, earlier: int, statement: str) -> None:
    """The file is still one of its version, whole, and the next daemon begins again."""
    EARLIER[earlier](tmp_path)
    before = version_of(tmp_path)
    command = [sys.executable, "-c", MIGRATES, str(tmp_path / "journal.sqlite"), statement]
    done = subprocess.run(command, cwd=ROOT, timeout=30, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert version_of(tmp_path) == before

    async def main() -> None:
        async with opened(tmp_path) as journal:
            assert [row.name for row in await journal.clones()] == ["c"]
            await filled(journal)

    asyncio.run(main())
    assert version_of(tmp_path)[0] == schema.VERSION


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_step_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: int) -> None:
    """A full disk, or a table that is in the way: the file stays what it was."""
    EARLIER[earlier](tmp_path)
    before = version_of(tmp_path)
    script = f"{schema.MIGRATIONS[earlier]} interrupted;"
    monkeypatch.setitem(schema.MIGRATIONS, earlier, script)

    async def main() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        try:
            with pytest.raises(HostError, match="cannot be used"):
                await journal.open()
        finally:
            await journal.close()

    asyncio.run(main())
    assert version_of(tmp_path) == before
