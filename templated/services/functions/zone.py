"""The zone's code (L2): images in an object store, in chunks that are sent and fetched once.

    chunks/ab/abcd…   512 KiB of an image, compressed by zstd; named by the SHA-256 of what it holds
    code/<digest>     the Manifest of an image, written when all its chunks are there

Chunks that hold zeros alone are holes, and not stored. Nothing here trusts the store: each chunk
is checked against its name, and the whole against its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, ParamSpec, TypeVar

import msgspec
import zstandard
from msgspec import Struct

from templated.drivers.code import VIRTUAL_SIZE
from templated.drivers.code.image import Record, is_whole
from templated.drivers.objectstore import ObjectStore
from templated.errors import HostError, NotFound
from templated.model.function import Digest

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
CHUNK: Final = 524288
_ZEROS = bytes(CHUNK)
_LEVEL = 3
_MOST_STORED = CHUNK + (64 << 10)
"""Bytes of a chunk that cannot be compressed, with what zstd adds."""
_MOST_MANIFEST = 1 << 20
_THREADS = 4
_TRIES = 2
_MODE = 0o444


class Manifest(Struct, frozen=True, kw_only=True):
    """How an image is stored."""

    format: Literal[1] = 1
    code: Record
    chunk: Literal[524288] = CHUNK
    chunks: tuple[Digest | None, ...]
    """In their order; None: a hole."""


class Zone:
    """The code in one store. `parallel` objects are sent or fetched at once, for one image."""

    def __init__(self, store: ObjectStore, parallel: int) -> None:
        self._store = store
        self._parallel = parallel
        # Not the loop's own threads: a fetch must not keep others waiting.
        self._threads = ThreadPoolExecutor(
            min(_THREADS, os.cpu_count() or 1), thread_name_prefix="zone"
        )

    def close(self) -> None:
        """End the threads, once they have nothing to do. Raises nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def push(self, record: Record, image: Path) -> None:
        """Send what the zone lacks of an image, and then its manifest.

        Raises HostError; leaves chunks without a manifest then, which the next push finds.
        """
        count = -(-record.size // CHUNK)
        chunks: list[str | None] = [None] * count

        async def send(index: int) -> None:
            name, stored = await self._in_thread(_read_chunk, image, index, record.size)
            chunks[index] = name
            # One of another size was cut short, or is of another version of zstd.
            if name is not None and await self._store.size(_key(name)) != len(stored):
                await self._store.put(_key(name), stored)

        await _in_parallel(range(count), send, self._parallel)
        manifest = Manifest(code=record, chunks=tuple(chunks))
        await self._store.put(f"code/{record.digest}", msgspec.json.encode(manifest))

    async def fetch(self, digest: str, target: Path) -> Record:
        """Make `target` the image with this digest, and verify it.

        Raises NotFound when the zone has none, HostError when it cannot be had or is not what its
        name says; leaves a part of it in `target` then.
        """
        manifest = await self._manifest(digest)
        places: dict[str, list[int]] = {}
        for index, name in enumerate(manifest.chunks):
            if name is not None:
                places.setdefault(name, []).append(index)

        async def get(name: str) -> None:
            await self._chunk(name, places[name], manifest.code, target)

        await self._in_thread(_create, target)
        await _in_parallel(places, get, self._parallel)
        if not await self._in_thread(_finish, target, manifest.code):
            raise HostError(
                f"code {digest} in {self._store.name} is not what its name says",
                hint="deploy the function again",
            )
        return manifest.code

    async def _manifest(self, digest: str) -> Manifest:
        content = await self._store.get(f"code/{digest}", _MOST_MANIFEST)
        try:
            manifest = msgspec.json.decode(content, type=Manifest)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise self._bad_manifest(digest, str(error)) from error
        if manifest.code.digest != digest:
            raise self._bad_manifest(digest, f"it is that of {manifest.code.digest}")
        if len(manifest.chunks) != -(-manifest.code.size // CHUNK):
            raise self._bad_manifest(digest, "it has not as many chunks as its image")
        return manifest

    def _bad_manifest(self, digest: str, why: str) -> HostError:
        return HostError(
            f"the manifest of code {digest} in {self._store.name} is damaged: {why}",
            hint="deploy the function again",
        )

    async def _chunk(self, name: str, indexes: list[int], code: Record, target: Path) -> None:
        for _ in range(_TRIES):
            try:
                stored = await self._store.get(_key(name), _MOST_STORED)
            except NotFound:
                raise self._bad_chunk(name, code, "is missing") from None
            if await self._in_thread(_write_chunk, target, stored, name, indexes, code.size):
                return
            log.warning("chunk %s in %s is not what its name says", name, self._store.name)
        raise self._bad_chunk(name, code, "is not what its name says")

    def _bad_chunk(self, name: str, code: Record, wrong: str) -> HostError:
        return HostError(
            f"chunk {name} of code {code.digest} in {self._store.name} {wrong}",
            hint=f"remove {_key(name)} there if it is there, and deploy the function again",
        )

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` off the loop; an OSError of it as a HostError."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except OSError as error:
            raise HostError(
                f"code cannot be kept on this node: {error.strerror or error}",
                hint="see whether state_dir has space",
            ) from error


async def _in_parallel(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], parallel: int
) -> None:
    """Do `work` for all items, so many at once. The first error ends the others."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    workers = [asyncio.create_task(worker()) for _ in range(parallel)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.wait(workers)


def _key(name: str) -> str:
    return f"chunks/{name[:2]}/{name}"


# In threads


def _read_chunk(image: Path, index: int, size: int) -> tuple[str | None, bytes]:
    """A chunk's name, and what is stored for it; None for a hole."""
    length = min(CHUNK, size - index * CHUNK)
    with open(image, "rb", buffering=0) as content:
        raw = os.pread(content.fileno(), length, index * CHUNK)
    if len(raw) != length:
        raise OSError(0, f"{image} has been cut")
    if raw == _ZEROS[:length]:
        return None, b""
    return hashlib.sha256(raw).hexdigest(), zstandard.ZstdCompressor(_LEVEL).compress(raw)


def _create(target: Path) -> None:
    with open(target, "xb") as content:
        content.truncate(VIRTUAL_SIZE)


def _write_chunk(
    target: Path, stored: memoryview, name: str, indexes: list[int], size: int
) -> bool:
    """Write a chunk to its places, if it is what its name says."""
    length = min(CHUNK, size - indexes[0] * CHUNK)
    try:
        # What it says of its own size is checked before so much memory is taken.
        if zstandard.frame_content_size(stored) != length:
            return False
        raw = zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError:
        return False
    if hashlib.sha256(raw).hexdigest() != name:
        return False
    # Opened each time: when a fetch is cancelled, the thread may still be here.
    with open(target, "r+b", buffering=0) as content:
        for index in indexes:
            if os.pwrite(content.fileno(), raw, index * CHUNK) != length:
                raise OSError(0, "the disk takes only a part")
    return True


def _finish(target: Path, code: Record) -> bool:
    """No wait for the disk: after a crash of the host the content is verified before its use."""
    target.chmod(_MODE)
    return is_whole(target, code)
