"""The journal: one transaction per step, and never one number for two."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from templated.errors import Busy, Conflict, HostError
from templated.journal import CloneRow, Journal, now, schema
from templated.model.clone import CloneState, Slot, StartPath
from templated.model.generation import GenerationState
from templated.model.network import Addresses, AddressPlan, Elsewhere
from templated.model.spec import PoolSpec


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Journal]:
    """A journal, closed at the end."""
    journal = Journal(path / "journal.sqlite")
    await journal.open()
    try:
        yield journal
    finally:
        await journal.close()


def make(index: int) -> Slot:
    """A slot whose addresses follow from its index, as they do in the daemon."""
    return Slot(
        id=uuid.uuid4().hex[:10],
        index=index,
        generation="g",
        uuid=str(uuid.uuid4()),
        mac=f"02:00:00:00:00:{index:02x}",
        ip=f"10.0.0.{index}",
        machine_id=uuid.uuid4().hex,
        boot_id=str(uuid.uuid4()),
    )


def clone(name: str, slot: Slot) -> CloneRow:
    """A clone that runs."""
    return CloneRow(
        name=name,
        slot=slot,
        template="t",
        state=CloneState.RUNNING,
        path=StartPath.DIRECT,
        created=now(),
        pid=12,
        pid_start=34,
        phases={"spawn": 1.5},
        total_ms=2.5,
    )


def test_slots_are_never_given_twice(tmp_path: Path) -> None:
    """A hundred requests at once get a hundred indexes."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            made = (asyncio.to_thread(journal.new_slot, "g", make, 200) for _ in range(100))
            slots = await asyncio.gather(*made)
            assert len({s.index for s in slots}) == len({s.mac for s in slots}) == 100

    asyncio.run(main())


def test_indexes_go_round(tmp_path: Path) -> None:
    """An address that was given back is the last to be used again, also after a restart."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            first = journal.new_slot("g", make, 3)
            journal.drop_slot(first.id)
            assert journal.new_slot("g", make, 3).index == 1
        async with opened(tmp_path) as journal:
            assert journal.new_slot("g", make, 3).index == 2
            assert journal.new_slot("g", make, 3).index == 0
            with pytest.raises(Busy, match="all 3 slots"):
                journal.new_slot("g", make, 3)

    asyncio.run(main())


def test_a_clones_life(tmp_path: Path) -> None:
    """Its slot, then itself; all of it is there after a restart, and gone after the end."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            slot = journal.new_slot("g", make, 9)
            assert await journal.free_slots() == [slot]
            known = clone("a", slot)
            await journal.new_clone(known)
            assert await journal.free_slots() == []
        async with opened(tmp_path) as journal:
            (row,) = await journal.clones()
            assert row == known
            await journal.clone_state(slot.id, CloneState.DEAD, "it was killed")
            (row,) = await journal.clones()
            assert (row.state, row.reason) == (CloneState.DEAD, "it was killed")
            other = journal.new_slot("g", make, 9)
            with pytest.raises(Conflict, match="a exists already"):
                await journal.new_clone(clone("a", other))
            journal.drop_slot(slot.id)
            assert await journal.clones() == []

    asyncio.run(main())


def test_activation_is_one_step(tmp_path: Path) -> None:
    """A template points at a ready generation or at the one before."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            await journal.new_generation("g1", "t")
            assert await journal.active() == {}
            await journal.activate("g1", "t")
            await journal.new_generation("g2", "t")
            assert await journal.active() == {"t": "g1"}
            states = {row.id: row.state for row in await journal.generations()}
            assert states == {"g1": GenerationState.READY, "g2": GenerationState.BUILDING}

    asyncio.run(main())


@pytest.mark.parametrize("write", ["UPDATE ON generations", "INSERT ON templates"])
def test_interrupted_activation_leaves_nothing(tmp_path: Path, write: str) -> None:
    """Whichever of its two writes comes second: when it fails, the first one is undone."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            await journal.new_generation("g1", "t")
            await journal.activate("g1", "t")
            await journal.new_generation("g2", "t")
            interrupt(tmp_path, write)
            with pytest.raises(sqlite3.IntegrityError, match="interrupted"):
                await journal.activate("g2", "t")
            assert await journal.active() == {"t": "g1"}
            states = {row.id: row.state for row in await journal.generations()}
            assert states == {"g1": GenerationState.READY, "g2": GenerationState.BUILDING}

    asyncio.run(main())


def interrupt(path: Path, write: str) -> None:
    """Make every later write of this kind fail, in the file itself."""
    db = sqlite3.connect(path / "journal.sqlite")
    db.execute(f"CREATE TRIGGER t BEFORE {write} BEGIN SELECT RAISE(ABORT, 'interrupted'); END")
    db.close()


def test_sizes_of_pools(tmp_path: Path) -> None:
    """What an operator set is there after a restart, until it is forgotten."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            await journal.set_pool("t", PoolSpec(warm=1))
            await journal.set_pool("t", PoolSpec(standby=3, warm=2))
        async with opened(tmp_path) as journal:
            assert await journal.pool_sizes() == {"t": PoolSpec(standby=3, warm=2)}
            await journal.set_pool("t", None)
            assert await journal.pool_sizes() == {}

    asyncio.run(main())


def test_cancelled_request_waits_for_its_transaction(tmp_path: Path) -> None:
    """Who is cancelled in the middle finds what it did in the journal, and can undo it."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            slot = journal.new_slot("g", make, 9)
            task = asyncio.create_task(journal.new_clone(clone("a", slot)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await journal.clones()) == 1

    asyncio.run(main())


def test_cancelled_request_whose_transaction_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled, and its error is no surprise to anybody. Found by the fuzzer."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            slot = journal.new_slot("g", make, 9)
            await journal.new_clone(clone("a", slot))
            task = asyncio.create_task(journal.new_clone(clone("a", slot)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            gc.collect()

    asyncio.run(main())
    assert not caplog.records


def test_damaged_file(tmp_path: Path) -> None:
    """A file that is no journal is refused in one line and left as it is."""
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, " * 100)

    async def main() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        try:
            with pytest.raises(HostError, match="cannot be used"):
                await journal.open()
        finally:
            await journal.close()

    asyncio.run(main())
    assert (tmp_path / "journal.sqlite").read_bytes().startswith(b"not a database")


@pytest.mark.parametrize("version", [1, 2, 99])
def test_other_version(tmp_path: Path, version: int) -> None:
    """A journal of another version, older ones too, is refused."""
    db = sqlite3.connect(tmp_path / "journal.sqlite")
    db.execute(f"PRAGMA user_version = {version}")
    db.close()

    async def main() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        try:
            with pytest.raises(HostError, match=f"version {version}"):
                await journal.open()
        finally:
            await journal.close()

    asyncio.run(main())


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    """Neither a row nor a step of the counter, and the journal goes on."""

    def broken(index: int) -> Slot:
        raise RuntimeError("no")

    async def main() -> None:
        async with opened(tmp_path) as journal:
            first = journal.new_slot("g", make, 9)
            with pytest.raises(RuntimeError):
                journal.new_slot("g", broken, 9)
            with pytest.raises(sqlite3.IntegrityError):
                journal.new_slot("g", lambda _: replace(first, ip="10.0.0.9"), 9)
            assert await journal.free_slots() == [first]
            assert journal.new_slot("g", make, 9).index == 1

    asyncio.run(main())


def test_one_slot_for_one_clone(tmp_path: Path) -> None:
    """The file itself forbids two clones on a slot, and a clone without one."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            slot = journal.new_slot("g", make, 9)
            await journal.new_clone(clone("a", slot))
            for other in (slot, make(1)):
                with pytest.raises((Conflict, HostError, sqlite3.IntegrityError)):
                    await journal.new_clone(clone("b", other))
            assert [row.name for row in await journal.clones()] == ["a"]

    asyncio.run(main())


def test_a_freed_address_is_the_last_to_come_back(tmp_path: Path) -> None:
    """Whoever still talks to the old one does not reach the new one."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            for _ in range(3):
                slot = journal.new_slot("g", make, 5)
                journal.drop_slot(slot.id)
            indexes = [journal.new_slot("g", make, 5).index for _ in range(5)]
            assert indexes == [3, 4, 0, 1, 2]
            with pytest.raises(Busy) as caught:
                journal.new_slot("g", make, 5)
            assert "network.subnet" in caught.value.hint

    asyncio.run(main())


def elsewhere(name: str, first: int, last: int) -> Elsewhere:
    """A network of libvirt, of which slots may have these addresses."""
    ends = f"10.0.0.{first}", f"10.0.0.{last}"
    given = Addresses(subnet="10.0.0.0/24", gateway="10.0.0.1", first=ends[0], last=ends[1])
    return Elsewhere(name, AddressPlan("10.77.0.0/16", b"host").elsewhere(given))


def test_addresses_of_other_networks(tmp_path: Path) -> None:
    """Each network goes round by itself, and no address is had twice where two have a subnet."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            ours = [journal.new_slot("g", make, 200) for _ in range(12)]
            two = elsewhere("two", 100, 101)
            lent = [journal.new_slot("g", make, 200, two) for _ in range(2)]
            assert [slot.ip for slot in lent] == ["10.0.0.100", "10.0.0.101"]
            assert [slot.index for slot in lent] == [12, 13]
            with pytest.raises(Busy, match="all 2 addresses of libvirt's network two"):
                journal.new_slot("g", make, 200, two)
            assert journal.new_slot("g", make, 200).index == 14
            journal.drop_slot(ours[0].id)
            # Built again, after a change of the network; and another network with its subnet.
            assert journal.new_slot("g", make, 200, elsewhere("two", 101, 103)).ip == "10.0.0.103"
            assert journal.new_slot("g", make, 200, elsewhere("three", 100, 103)).ip == "10.0.0.102"
            assert journal.new_slot("g", make, 200).index == 17

    asyncio.run(main())


def test_an_index_whose_address_another_network_has(tmp_path: Path) -> None:
    """It is passed over, as the address is that of a VM."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            assert journal.new_slot("g", make, 9, elsewhere("one", 1, 1)).index == 0
            assert journal.new_slot("g", make, 9).index == 2

    asyncio.run(main())


def test_dropping_is_idempotent(tmp_path: Path) -> None:
    """What is gone already is no error: after a crash it is done again."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            slot = journal.new_slot("g", make, 9)
            for _ in range(2):
                journal.drop_slot(slot.id)
                await journal.drop_generation("none")
                await journal.deactivate("none")
            assert await journal.free_slots() == [] and await journal.active() == {}

    asyncio.run(main())


def test_closing(tmp_path: Path) -> None:
    """What was asked for before is written; what is asked for later fails."""

    async def main() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        await journal.open()
        rows = [clone(f"a-{i}", journal.new_slot("g", make, 99)) for i in range(20)]
        asked = [asyncio.ensure_future(journal.new_clone(row)) for row in rows]
        await asyncio.sleep(0)
        await journal.close()
        await asyncio.gather(*asked)
        with pytest.raises(RuntimeError):
            await journal.clones()
        with pytest.raises(RuntimeError, match="closed"):
            journal.new_slot("g", make, 99)
        async with opened(tmp_path) as again:
            assert await again.clones() == rows

    asyncio.run(main())


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """One line with the path and what to look at."""

    async def main() -> None:
        journal = Journal(tmp_path / "none" / "journal.sqlite")
        with pytest.raises(HostError, match=r"none/journal\.sqlite cannot be used") as caught:
            await journal.open()
        assert caught.value.hint
        await journal.close()

    asyncio.run(main())


def test_interrupted_while_the_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and version come in one step: what ends in between leaves an empty file."""

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(schema, "SCHEMA", schema.SCHEMA + "interrupted;")
            journal = Journal(tmp_path / "journal.sqlite")
            with pytest.raises(HostError):
                await journal.open()
            await journal.close()
        async with opened(tmp_path) as journal:
            journal.new_slot("g", make, 9)

    asyncio.run(main())


async def read_all(path: Path) -> None:
    """What a daemon reads when it starts."""
    async with opened(path) as journal:
        await journal.clones()
        await journal.free_slots()
        await journal.generations()
        await journal.active()
        await journal.pool_sizes()


SPOILED = [
    ("UPDATE slots SET id = '../..'", "`$.slot.id`"),
    ("UPDATE slots SET id = 'another'", "`$.slot.id`"),  # of which the clone knows nothing
    ("UPDATE slots SET idx = -1", "`$.slot.index`"),
    ("UPDATE slots SET uuid = 'x'", "`$.slot.uuid`"),
    ("UPDATE clones SET name = 'a/b'", "`$.name`"),
    ("UPDATE clones SET state = 'asleep'", "'asleep'"),
    ("UPDATE clones SET phases = '[[['", "`$.phases`"),
    ("UPDATE clones SET phases = '[1]'", "`$.phases`"),
    ("UPDATE clones SET pid = -1", "`$.pid`"),
    ("UPDATE generations SET id = '..'", "`$.id`"),
    ("UPDATE generations SET template = '../x'", "`$.template`"),
    ("UPDATE generations SET state = ''", "`$.state`"),
    ("UPDATE templates SET active = '../x'", "`$[...]`"),
    ("UPDATE pools SET warm = -1", "`$.warm`"),
]


@pytest.mark.parametrize(("spoil", "what"), SPOILED)
def test_a_spoiled_row(tmp_path: Path, spoil: str, what: str) -> None:
    """It is refused in one line before it can name a directory, and every row stays."""

    async def main() -> None:
        async with opened(tmp_path) as journal:
            await journal.new_generation("g", "t")
            await journal.activate("g", "t")
            await journal.set_pool("t", PoolSpec(warm=1))
            await journal.new_clone(clone("a", journal.new_slot("g", make, 9)))
            journal.new_slot("g", make, 9)
        with closing(sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)) as db:
            db.execute(f"{spoil} WHERE rowid = 1")
        with pytest.raises(HostError, match="spoiled row") as caught:
            await read_all(tmp_path)
        assert what in caught.value.message and "\n" not in caught.value.message
        with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as db:
            for table, count in (("slots", 2), ("clones", 1), ("generations", 1), ("pools", 1)):
                assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,)

    asyncio.run(main())


def test_a_file_whose_schema_is_no_text(tmp_path: Path) -> None:
    """Found by tests/fuzz/test_journal.py: SQLite quotes it in its error."""

    async def main() -> None:
        async with opened(tmp_path):
            pass
        path = tmp_path / "journal.sqlite"
        content = path.read_bytes()
        assert content.count(b"CREATE TABLE pools")
        path.write_bytes(content.replace(b"CREATE TABLE pools", b"CRE\x80TE TABLE pools"))
        with pytest.raises(HostError, match="cannot be used"):
            async with opened(tmp_path) as journal:
                await journal.pool_sizes()

    asyncio.run(main())
