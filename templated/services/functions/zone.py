"""The zone's code (L2): images in an object store, in chunks that are sent and fetched once.

    chunks/ab/abcd…   512 KiB of an image, named by the SHA-256 of what it holds; compressed by
                      zstd, or as it is where that does not make it smaller
    code/<digest>     the Manifest of an image, written when all its chunks are there

Chunks that hold zeros alone are holes, and not stored. Nothing here trusts the store: each chunk
is checked against its name, and the whole against its digest. Where the whole is right, so is each
chunk: they are read one by one only where it is not, to find which one is wrong.
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
from templated.drivers.code.image import Record, uuid_of
from templated.drivers.objectstore import ObjectStore
from templated.errors import HostError, NotFound
from templated.model.function import Digest

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
CHUNK: Final = 524288
_ZEROS = bytes(CHUNK)
_LEVEL = 3
_MOST_MANIFEST = 1 << 20
_THREADS = 4
_MODE = 0o444


class Manifest(Struct, frozen=True, kw_only=True):
    """How an image is stored."""

    format: Literal[1] = 1
    code: Record
    chunk: Literal[524288] = CHUNK
    chunks: tuple[Digest | None, ...]
    """In their order; None: a hole."""


class _Assembly:
    """An image that is made from its chunks. What blocks runs in threads, each on its own part."""

    def __init__(self, manifest: Manifest, target: Path) -> None:
        self.code = manifest.code
        self.digesting = False
        """Whether one is at it."""
        self._target = target
        self._places: dict[str, list[int]] = {}
        self._there = [name is None for name in manifest.chunks]
        for index, name in enumerate(manifest.chunks):
            if name is not None:
                self._places.setdefault(name, []).append(index)
        self._hash = hashlib.sha256()
        self._digested = 0

    @property
    def names(self) -> list[str]:
        """The chunks, in the order of their first places."""
        return list(self._places)

    def begin(self) -> None:
        """Make the file: a hole. Blocks; OSError."""
        with open(self._target, "xb") as content:
            content.truncate(VIRTUAL_SIZE)

    def write(self, name: str, stored: memoryview, checked: bool) -> bool:
        """Write a chunk to its places; not when it cannot be what its name says. Blocks; OSError.

        That is told by its size, and when `checked` by its content too.
        """
        indexes = self._places[name]
        raw = _raw(stored, self._length(indexes[0]))
        if raw is None or (checked and hashlib.sha256(raw).hexdigest() != name):
            return False
        # Opened each time: when a fetch is cancelled, the thread may still be here.
        with open(self._target, "r+b", buffering=0) as content:
            for index in indexes:
                if os.pwrite(content.fileno(), raw, index * CHUNK) != len(raw):
                    raise OSError(0, "the disk takes only a part")
                self._there[index] = True
        return True

    def wrong(self) -> list[str]:
        """The chunks that are not what their names say. Blocks; OSError."""
        return [name for name, indexes in self._places.items() if self._name(indexes[0]) != name]

    def _name(self, index: int) -> str:
        with open(self._target, "rb", buffering=0) as content:
            raw = os.pread(content.fileno(), self._length(index), index * CHUNK)
        return hashlib.sha256(raw).hexdigest()

    def restart(self) -> None:
        """Digest all of it again."""
        self._hash, self._digested = hashlib.sha256(), 0

    def can_digest(self) -> bool:
        """Whether the next chunk in their order is there."""
        return self._digested < len(self._there) and self._there[self._digested]

    def digest_on(self) -> None:
        """Digest what is there without a gap. Blocks; OSError."""
        with open(self._target, "rb", buffering=0) as content:
            while self.can_digest():
                length, place = self._length(self._digested), self._digested * CHUNK
                self._hash.update(os.pread(content.fileno(), length, place))
                self._digested += 1

    def is_right(self) -> bool:
        """Whether the whole is what its digest says, when all is digested. Blocks; OSError.

        There is no wait for the disk: after a crash of the host it is verified before its use.
        """
        self._target.chmod(_MODE)
        with open(self._target, "rb", buffering=0) as content:
            right = uuid_of(content.fileno()) == self.code.uuid
        return right and self._hash.hexdigest() == self.code.digest

    def _length(self, index: int) -> int:
        return min(CHUNK, self.code.size - index * CHUNK)


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
        assembly = _Assembly(manifest, target)
        await self._in_thread(assembly.begin)
        # While some are decompressed and written, others are under way.
        slots = asyncio.Semaphore(self._parallel)

        async def get(name: str) -> None:
            await self._chunk(assembly, name, slots, (False, True))
            await self._digest(assembly)

        await _in_parallel(assembly.names, get, self._parallel + _THREADS)
        await self._digest(assembly)
        if not await self._in_thread(assembly.is_right):
            await self._repair(assembly, slots)
        return manifest.code

    async def _repair(self, assembly: _Assembly, slots: asyncio.Semaphore) -> None:
        """Ask once more for the chunks that are not what their names say, and refuse them then."""
        wrong = await self._in_thread(assembly.wrong)
        for name in wrong:
            log.warning("chunk %s in %s is not what its name says", name, self._store.name)
            await self._chunk(assembly, name, slots, (True,))
        assembly.restart()
        await self._digest(assembly)
        if not await self._in_thread(assembly.is_right):
            raise HostError(
                f"code {assembly.code.digest} in {self._store.name} is not what its name says",
                hint="deploy the function again",
            )

    async def _digest(self, assembly: _Assembly) -> None:
        """Digest what is there without a gap, beside the others; one does it for all."""
        if assembly.digesting:
            return
        assembly.digesting = True
        try:
            while assembly.can_digest():
                await self._in_thread(assembly.digest_on)
        finally:
            assembly.digesting = False

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

    async def _chunk(
        self,
        assembly: _Assembly,
        name: str,
        slots: asyncio.Semaphore,
        tries: tuple[bool, ...],
    ) -> None:
        """Fetch a chunk and write it. Of each try, whether it is checked against its name here."""
        for checked in tries:
            try:
                async with slots:
                    stored = await self._store.get(_key(name), CHUNK)
            except NotFound:
                raise self._bad_chunk(name, assembly.code, "is missing") from None
            if await self._in_thread(assembly.write, name, stored, checked):
                return
        raise self._bad_chunk(name, assembly.code, "is not what its name says")

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
    stored = zstandard.ZstdCompressor(_LEVEL).compress(raw)
    return hashlib.sha256(raw).hexdigest(), stored if len(stored) < length else raw


def _raw(stored: memoryview, length: int) -> memoryview | bytes | None:
    """The `length` bytes of a chunk; None when it is not stored as they would be."""
    if len(stored) == length:
        return stored
    try:
        # What it says of its own size is checked before so much memory is taken.
        if zstandard.frame_content_size(stored) != length:
            return None
        return zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError:
        return None
