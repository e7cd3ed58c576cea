"""Code in a real S3 server: two nodes, and every way in which a store lets them down."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import pytest
import zstandard
from obstore.store import S3Store

from templated.drivers.code.image import is_whole
from templated.drivers.objectstore import connect
from templated.errors import HostError, NotFound
from templated.services.functions.cache import CodeCache
from templated.services.functions.zone import CHUNK, Zone
from tests.real.objectstore import Proxy, Server
from tests.unit.code_images import Counted, image_of
from tests.unit.zips import files

if TYPE_CHECKING:
    from obstore import ObjectMeta

_SOON = 10.0
"""Seconds within which a store that does nothing is given up, with a `timeout` of one second."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that all tests share."""
    made = Server()
    try:
        made.start()
        yield made
    finally:
        made.close()


@asynccontextmanager
async def _zone(server: Server, **config: Any) -> AsyncIterator[Zone]:
    settings = server.config(**config)
    zone = Zone(await asyncio.to_thread(connect, settings), settings.parallel)
    try:
        yield zone
    finally:
        zone.close()


@asynccontextmanager
async def _node(folder: Path, zone: Zone) -> AsyncIterator[CodeCache]:
    cache = CodeCache(folder, 1 << 30, zone, Counted())
    await cache.open()
    try:
        yield cache
    finally:
        await cache.close()


def _objects(server: Server) -> tuple[S3Store, dict[str, ObjectMeta]]:
    """What the server has, by the key."""
    store: Any = connect(server.config())._store
    return store, {meta["path"]: meta for batch in obstore.list(store) for meta in batch}


def _archive(folder: Path) -> Path:
    """Code of more than one chunk, which no other test has."""
    path = folder / "code.zip"
    contents = {"app.py": b"x = 1\n" * 100, "data": os.urandom(3 * CHUNK)}
    path.write_bytes(files(contents))
    return path


def test_code_of_one_node_is_served_by_another(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            _zone(server) as zone,
            _node(tmp_path / "a", zone) as first,
            _node(tmp_path / "b", zone) as second,
        ):
            view = await first.admit(_archive(tmp_path))
            _, before = await asyncio.to_thread(_objects, server)
            assert f"code/{view.digest}" in before
            one = await first.ensure(view.digest)
            found = await asyncio.gather(*(second.ensure(view.digest) for _ in range(10)))
            assert {file.uuid for file in found} == {one.uuid}
            assert (await second.views())[0].bytes == view.bytes
            # What is there is not sent again.
            await first.admit(tmp_path / "code.zip")
            _, after = await asyncio.to_thread(_objects, server)
            changed = {key for key in after if after[key] != before.get(key)}
            assert changed <= {f"code/{view.digest}"}
            with pytest.raises(NotFound):
                await second.ensure("0" * 64)

    asyncio.run(work())


def test_a_wrong_chunk_is_refused_by_name(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            _zone(server) as zone,
            _node(tmp_path / "a", zone) as first,
            _node(tmp_path / "b", zone) as second,
        ):
            _, before = await asyncio.to_thread(_objects, server)
            digest = (await first.admit(_archive(tmp_path))).digest
            store, after = await asyncio.to_thread(_objects, server)
            key = next(key for key in after if key not in before and key.startswith("chunks/"))
            right = await obstore.get_async(store, key)
            content = bytes(await right.bytes_async())
            for wrong in (
                b"",
                os.urandom(CHUNK),
                zstandard.ZstdCompressor().compress(bytes(CHUNK)),
            ):
                await obstore.put_async(store, key, wrong)
                with pytest.raises(HostError, match=key.rpartition("/")[2]):
                    await second.ensure(digest)
                assert os.listdir(tmp_path / "b") == []
            await obstore.put_async(store, key, content)
            assert (await second.ensure(digest)).digest == digest

    asyncio.run(work())


def test_a_store_that_is_down(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            Proxy(server) as proxy,
            _zone(server, endpoint=proxy.url, timeout="3s") as zone,
            _node(tmp_path / "a", zone) as node,
        ):
            digest = (await node.admit(_archive(tmp_path))).digest
            await proxy.stop()
            with pytest.raises(HostError, match="s3://code/functions") as caught:
                await node.admit(_archive(tmp_path))
            print(caught.value.message)
            assert caught.value.hint
            assert len(caught.value.message) < 400
            with pytest.raises(HostError, match="s3://code/functions"):
                await node.ensure("0" * 64)
            # What is here goes on, and nothing else is.
            assert [row.digest for row in await node.views()] == [digest]
            assert (await node.ensure(digest)).digest == digest
            assert len(os.listdir(tmp_path / "a")) == 2
            await proxy.start()
            await node.admit(tmp_path / "code.zip")

    asyncio.run(work())


@pytest.mark.parametrize("cuts", [False, True], ids=["stalls", "cut short"])
def test_answers_that_do_not_come_to_an_end(server: Server, tmp_path: Path, cuts: bool) -> None:
    async def work() -> None:
        async with (
            Proxy(server) as proxy,
            _zone(server, endpoint=proxy.url, timeout="1s") as zone,
            _node(tmp_path / "a", zone) as first,
            _node(tmp_path / "b", zone) as second,
        ):
            digest = (await first.admit(_archive(tmp_path))).digest
            proxy.cuts, proxy.passed = cuts, 100_000
            # Connections that are there have passed more than that already.
            began = time.monotonic()
            with pytest.raises(HostError, match="s3://code/functions"):
                await second.ensure(digest)
            assert time.monotonic() - began < _SOON
            assert os.listdir(tmp_path / "b") == []
            assert (await first.ensure(digest)).digest == digest
            proxy.passed = 0
            with pytest.raises(HostError, match="s3://code/functions"):
                await second.admit(tmp_path / "code.zip")
            assert os.listdir(tmp_path / "b") == []
            proxy.passed = None
            assert (await second.ensure(digest)).digest == digest

    asyncio.run(work())


def test_a_key_that_the_store_does_not_know(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("another")
    secret.chmod(0o600)

    async def work() -> None:
        for config in ({"secret_file": str(secret)}, {"access_key": None, "secret_file": None}):
            async with _zone(server, **config) as zone, _node(tmp_path / "a", zone) as node:
                with pytest.raises(HostError, match="does not let this daemon in"):
                    await node.admit(_archive(tmp_path))
                assert os.listdir(tmp_path / "a") == []

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        asyncio.run(work())


def test_a_big_one_is_fetched_as_fast_as_it_is_read(server: Server, tmp_path: Path) -> None:
    """With the client alone, that is; docs/performance.md has the figures of a quiet machine."""
    record = image_of(os.urandom(50_000_000 // 4096 * 4096), tmp_path / "image")

    async def work() -> list[tuple[float, float]]:
        async with _zone(server) as zone:
            await zone.push(record, tmp_path / "image")
            return [await _times(server, zone, record.digest, tmp_path / f"{n}") for n in range(5)]

    times = asyncio.run(work())
    assert is_whole(tmp_path / "0", record)
    best = max(alone / fetch for alone, fetch in times)
    print(f"\nfetch of 50 MB: {times}, best {best:.2f} of the client alone")
    # Far below the goal: other things run on this machine, too.
    assert best > 0.3


async def _times(server: Server, zone: Zone, digest: str, target: Path) -> tuple[float, float]:
    """Seconds for reading the objects of an image with the client alone, and for fetching it."""
    store: Any = (await asyncio.to_thread(connect, server.config()))._store
    names = iter({name for name in (await zone._manifest(digest)).chunks if name is not None})

    async def reader() -> None:
        for name in names:
            found = await obstore.get_async(store, f"chunks/{name[:2]}/{name}")
            await found.bytes_async()

    began = time.monotonic()
    await asyncio.gather(*(reader() for _ in range(8)))
    read = time.monotonic()
    await zone.fetch(digest, target)
    return read - began, time.monotonic() - read
