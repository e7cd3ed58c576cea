"""The node's code: what is kept, for how long, and that nothing damaged is ever given."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from templated.drivers.code import image
from templated.errors import HostError, InvalidRequest, NotFound
from templated.model.code import CodeState
from templated.services.functions import cache, shelf
from templated.services.functions.cache import CodeCache
from tests.unit.code_images import Counted, FakeZone, make_image
from tests.unit.zips import files

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
_SIZE = 4096


class Rig:
    """A cache in a folder of its own, with a clock that is set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "code"
        self.archives = folder / "archives"
        self.archives.mkdir()
        (folder / "zone").mkdir()
        self.zone = FakeZone(folder / "zone")
        self.metrics = Counted()
        self.now = 1_700_000_000.0

    async def cache(self, *, limit: int = 1 << 30, zone: bool = False) -> CodeCache:
        """A cache as after a start of the daemon."""
        made = CodeCache(
            self.folder, limit, self.zone if zone else None, self.metrics, lambda: self.now
        )
        await made.open()
        return made

    async def admit(self, cache: CodeCache, content: str) -> str:
        """Admit code with this content, one minute after what was before."""
        self.now += 60
        archive = self.archives / content
        await asyncio.to_thread(archive.write_text, content)
        return (await cache.admit(archive)).digest

    def files(self) -> list[str]:
        """Names in the cache's folder."""
        return sorted(os.listdir(self.folder))

    async def spoil(self, digest: str, at: int = 3) -> None:
        """Flip a bit of an image on this node."""
        await asyncio.to_thread(_flip, self.folder / f"{digest}.img", at)


def _flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as content:
        content.seek(at)
        byte = content.read(1)[0]
        content.seek(at)
        content.write(bytes([byte ^ 1]))


Test = Callable[[Rig], Awaitable[None]]


def rigged(test: Test) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """A test that runs on a loop, with images that take no mkfs."""

    @functools.wraps(test)
    def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "make_image", make_image)

        async def work() -> None:
            await test(Rig(tmp_path))

        asyncio.run(work())

    del run.__wrapped__  # pytest would ask for its arguments
    return run


@rigged
async def test_what_was_admitted_is_there(rig: Rig) -> None:
    code = await rig.cache()
    digest = await rig.admit(code, "one")
    file = await code.ensure(digest)
    assert file.digest == digest
    assert file.path == rig.folder / f"{digest}.img"
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o444
    assert rig.files() == [f"{digest}.img", f"{digest}.json"]
    (row,) = await code.views()
    assert (row.digest, row.bytes, row.size, row.needed, row.verified) == (
        *(digest, 7, _SIZE),
        *(False, True),
    )
    assert row.used == "2023-11-14T22:14:20Z"
    assert rig.metrics.requests == {("l1", "hit"): 1}
    assert rig.metrics.bytes == _SIZE


@rigged
async def test_the_same_again_is_kept_once(rig: Rig) -> None:
    code = await rig.cache()
    digest = await rig.admit(code, "one")
    inode = os.stat(rig.folder / f"{digest}.img").st_ino
    assert await rig.admit(code, "one") == digest
    assert os.stat(rig.folder / f"{digest}.img").st_ino == inode


@rigged
async def test_code_that_nobody_has(rig: Rig) -> None:
    for zone in (False, True):
        code = await rig.cache(zone=zone)
        with pytest.raises(NotFound, match="no code"):
            await code.ensure("0" * 64)
    assert rig.metrics.requests == {("l1", "miss"): 2, ("l2", "miss"): 1}
    assert rig.files() == []


@rigged
async def test_a_restart_keeps_it_and_reads_it_before_its_first_use(rig: Rig) -> None:
    digest = await rig.admit(await rig.cache(), "one")
    code = await rig.cache()
    assert [row.verified for row in await code.views()] == [False]
    await code.ensure(digest)
    assert [row.verified for row in await code.views()] == [True]
    await rig.spoil(digest)
    code = await rig.cache()
    with pytest.raises(HostError, match=f"{digest} was damaged"):
        await code.ensure(digest)
    assert rig.files() == []
    with pytest.raises(NotFound):
        await code.ensure(digest)


@rigged
async def test_a_change_while_it_runs_is_seen(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    digest = await rig.admit(code, "one")
    await rig.spoil(digest)
    assert await asyncio.gather(*(code.ensure(digest) for _ in range(5)))
    assert rig.zone.fetched == 1
    assert rig.metrics.requests == {("l1", "damaged"): 1, ("l2", "hit"): 1}
    content = await asyncio.to_thread((rig.folder / f"{digest}.img").read_bytes)
    assert content.startswith(b"one\0")


@rigged
async def test_one_fetch_however_many_ask(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    digest = await rig.admit(code, "one")
    await code.gc()
    rig.now += 60
    assert (await code.gc()).removed == (digest,)
    rig.zone.open.clear()
    asked = [asyncio.create_task(code.ensure(digest)) for _ in range(20)]
    await asyncio.sleep(0)
    asked.pop().cancel()  # the others get it all the same
    rig.zone.open.set()
    assert len({file.path for file in await asyncio.gather(*asked)}) == 1
    assert rig.zone.fetched == 1
    await code.close()


@rigged
async def test_a_fetch_that_fails_leaves_nothing(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    rig.zone.error = HostError("the store is down")
    with pytest.raises(HostError, match="down"):
        await code.ensure("1" * 64)
    assert rig.files() == []
    assert rig.metrics.requests["l2", "error"] == 1


@rigged
async def test_the_end_of_the_daemon_ends_a_fetch(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    rig.zone.open.clear()
    asked = asyncio.create_task(code.ensure("1" * 64))
    while not rig.files():
        await asyncio.sleep(0.001)
    await code.close()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert rig.files() == []


@rigged
async def test_a_deploy_that_the_zone_does_not_take_leaves_nothing(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    rig.zone.error = HostError("the store is down")
    with pytest.raises(HostError, match="down"):
        await rig.admit(code, "one")
    assert rig.files() == []
    assert await code.views() == []
    # What was there before stays.
    rig.zone.error = None
    digest = await rig.admit(code, "one")
    rig.zone.error = HostError("the store is down")
    with pytest.raises(HostError):
        await rig.admit(code, "one")
    assert (await code.ensure(digest)).digest == digest


@rigged
async def test_one_of_two_deploys_of_the_same_code_fails(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    rig.zone.open.clear()
    first = asyncio.create_task(rig.admit(code, "one"))
    while not any(name.endswith(".img") for name in rig.files()):
        await asyncio.sleep(0.001)
    second = asyncio.create_task(rig.admit(code, "one"))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    rig.zone.open.set()
    digest = await second
    assert (await code.ensure(digest)).digest == digest


@rigged
async def test_least_recently_used_goes_first(rig: Rig) -> None:
    code = await rig.cache(limit=3 * _SIZE)
    one, two, three = [await rig.admit(code, name) for name in ("one", "two", "three")]
    rig.now += 60
    await code.ensure(one)
    four = await rig.admit(code, "four")
    assert {row.digest for row in await code.views()} == {one, three, four}
    assert rig.metrics.bytes == 3 * _SIZE
    # The order is kept over a restart.
    code = await rig.cache(limit=3 * _SIZE)
    await rig.admit(code, "five")
    assert three not in {row.digest for row in await code.views()}
    assert two not in {row.digest for row in await code.views()}


@rigged
async def test_what_is_needed_is_never_evicted(rig: Rig) -> None:
    code = await rig.cache(limit=2 * _SIZE)
    one, two, three = [await rig.admit(code, name) for name in ("one", "two", "three")]
    assert two in {row.digest for row in await code.views()}
    code.needed = lambda: {two, three}
    four = await rig.admit(code, "four")
    rig.now += 3600
    assert {row.digest for row in await code.views()} == {two, three, four}
    assert {row.digest for row in await code.views() if row.needed} == {two, three}
    freed = await code.gc()
    assert (freed.removed, freed.size) == ((four,), _SIZE)
    assert one not in {row.digest for row in await code.views()}
    assert (await code.ensure(two)).digest == two


@rigged
async def test_what_was_just_asked_for_is_not_evicted(rig: Rig) -> None:
    code = await rig.cache(limit=_SIZE)
    digest = await rig.admit(code, "one")
    assert (await code.gc()).removed == ()
    rig.now -= 55  # `admit` adds a minute
    await rig.admit(code, "two")
    assert (await code.ensure(digest)).digest == digest


@rigged
async def test_partial_files_are_dropped(rig: Rig) -> None:
    digest = await rig.admit(await rig.cache(), "one")

    def litter() -> None:
        (rig.folder / ".pack-x/made/tree").mkdir(parents=True)
        for name in ("a.json.part", f"{'1' * 64}.img", f"{'2' * 64}.json", "placeholder.img"):
            (rig.folder / name).write_text("x")

    await asyncio.to_thread(litter)
    code = await rig.cache()
    assert rig.files() == [f"{digest}.img", f"{digest}.json", "placeholder.img"]
    assert [row.digest for row in await code.views()] == [digest]


@rigged
async def test_verify_says_what_it_found(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    good, bad, lost = [await rig.admit(code, name) for name in ("good", "bad", "lost")]
    del rig.zone.records[lost]
    for digest in (bad, lost):
        await rig.spoil(digest, at=4000)
    found = {check.digest: check for check in await code.verify()}
    assert {digest: check.state for digest, check in found.items()} == {
        good: CodeState.OK,
        bad: CodeState.REPAIRED,
        lost: CodeState.DAMAGED,
    }
    assert "no store has it" in found[lost].problem
    assert {row.digest for row in await code.views()} == {good, bad}
    assert (await code.prefetch(bad)).verified


@rigged
async def test_a_disk_that_is_full(rig: Rig) -> None:
    code = await rig.cache(zone=True)
    first = await rig.admit(code, "one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "write_record", full)
        with pytest.raises(HostError, match="No space left"):
            await rig.admit(code, "two")
        assert rig.files() == [f"{first}.img", f"{first}.json"]
    assert [row.digest for row in await code.views()] == [first]
    second = await rig.admit(code, "two")
    assert (await code.ensure(second)).digest == second


def test_with_images_as_they_are(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        code = await rig.cache()
        await image.placeholder(rig.folder)
        archive = rig.archives / "a.zip"
        await asyncio.to_thread(archive.write_bytes, files({"app.py": b"x"}))
        digest = (await code.admit(archive)).digest
        await asyncio.to_thread(archive.write_bytes, files({"../app.py": b"x"}))
        with pytest.raises(InvalidRequest):
            await code.admit(archive)
        assert (await (await rig.cache()).ensure(digest)).uuid
        assert [name.partition(".")[0] for name in rig.files()] == sorted(
            [digest, digest, "placeholder", "placeholder"]
        )

    asyncio.run(work())
