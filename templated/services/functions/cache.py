"""The node's code: images by digest, verified before their use, and bounded (L1).

What is not here comes from the zone (L2), where there is one; see `zone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from templated.drivers.code import CodeFile
from templated.drivers.code.image import Record, make_image
from templated.drivers.host.files import remove_directory
from templated.errors import HostError, NotFound
from templated.model.code import CodeCheck, CodeFreed, CodeRow, CodeState
from templated.model.function import CodeView
from templated.services.functions.flights import Flights
from templated.services.functions.shelf import Entry, Shelf

log = logging.getLogger(__name__)
_PACKS = 2
"""Images that are made at once: each takes a CPU and a disk."""
_GRACE = 10.0
"""Seconds after its last use for which an image is not evicted: who asked for it is about to open
it, or to write down that a version needs it."""
_TOUCH = 60.0
"""Seconds after which a use is written down again, for the order after a restart."""


class CodeStore(Protocol):
    """Where the code of all nodes is."""

    async def push(self, record: Record, image: Path) -> None:
        """Send what the zone lacks of an image. Raises HostError; leaves no half image there."""

    async def fetch(self, digest: str, target: Path) -> Record:
        """Make `target` the image, verified. NotFound, HostError; leaves a part of it then."""


class CodeMetrics(Protocol):
    """Who counts."""

    def code_request(self, layer: str, outcome: str) -> None:
        """Layer l1 or l2; outcome hit, miss, damaged or error."""

    def code_bytes(self, size: int) -> None:
        """What all images on this node take now."""


class CodeCache:
    """The code images on this node."""

    def __init__(
        self,
        folder: Path,
        limit: int,
        zone: CodeStore | None,
        metrics: CodeMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.needed: Callable[[], set[str]] = set
        """Digests that are never evicted; set by who knows the versions."""
        self._shelf = Shelf(folder)
        self._limit = limit
        self._zone = zone
        self._metrics = metrics
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._flights = Flights[CodeFile]()
        self._packs = asyncio.Semaphore(_PACKS)
        self._changing = asyncio.Lock()
        self._admitting: Counter[str] = Counter()
        self._unconfirmed: set[str] = set()

    async def open(self) -> None:
        """Find what is there, and drop partial files. HostError; leaves the cache empty then."""
        self._entries = await asyncio.to_thread(self._shelf.scan)
        self._tell_bytes()

    async def close(self) -> None:
        """End what is being fetched. Raises nothing."""
        await self._flights.end()

    async def admit(self, archive: Path) -> CodeView:
        """Take the files of a zip archive as code: onto this node, and into the zone.

        Raises InvalidRequest for an archive that is no code, HostError for a host or a zone that
        does not take it; leaves nothing of it then, unless something else needs the same code.
        """
        async with self._work() as work, self._packs:
            record, image = await make_image(archive, work)
            self._admitting[record.digest] += 1
            try:
                entry = await self._take(record, image)
                if self._zone is not None:
                    await self._zone.push(record, entry.path)
                self._unconfirmed.discard(record.digest)
            finally:
                self._admitting[record.digest] -= 1
                await asyncio.shield(self._withdraw(record.digest))
        return CodeView(digest=record.digest, bytes=record.bytes)

    async def _take(self, record: Record, image: Path) -> Entry:
        """Place an image that was made here, unless the same is there already."""
        async with self._changing:
            entry = self._entries.get(record.digest)
            if entry is not None and entry.current:
                self._use(entry)
                return entry
            if entry is None:
                self._unconfirmed.add(record.digest)
            return await self._place(record, image)

    async def _withdraw(self, digest: str) -> None:
        """Remove what an admission has placed that failed, unless another one goes on."""
        if self._admitting[digest]:
            return
        del self._admitting[digest]
        if digest in self._unconfirmed:
            self._unconfirmed.discard(digest)
            async with self._changing:
                await self._remove([digest])

    async def ensure(self, digest: str) -> CodeFile:
        """The image on this node, verified; fetched from the zone when it is not here.

        Raises NotFound when nobody has it, HostError when the zone does not give it; leaves
        nothing half, and a damaged image gone.
        """
        entry = self._entries.get(digest)
        if entry is not None and entry.current:
            self._use(entry)
            self._metrics.code_request("l1", "hit")
            return entry.file
        return await self._flights.join(digest, lambda: self._obtain(digest))

    async def _obtain(self, digest: str) -> CodeFile:
        entry = self._entries.get(digest)
        if entry is None:
            self._metrics.code_request("l1", "miss")
            return await self._fetch(digest, damaged=False)
        if await asyncio.to_thread(entry.verify):
            self._use(entry)
            self._metrics.code_request("l1", "hit")
            return entry.file
        log.warning("code %s is damaged on this node: %s", digest, entry.path)
        self._metrics.code_request("l1", "damaged")
        async with self._changing:
            if self._entries.get(digest) is entry:
                await self._remove([digest])
        return await self._fetch(digest, damaged=True)

    async def _fetch(self, digest: str, *, damaged: bool) -> CodeFile:
        if self._zone is None:
            raise _lost(digest) if damaged else _unknown(digest)
        async with self._work() as work:
            try:
                record = await self._zone.fetch(digest, work / "image")
            except NotFound:
                self._metrics.code_request("l2", "miss")
                raise (_lost(digest) if damaged else _unknown(digest)) from None
            except HostError:
                self._metrics.code_request("l2", "error")
                raise
            self._metrics.code_request("l2", "hit")
            async with self._changing:
                return (await self._place(record, work / "image")).file

    async def views(self) -> list[CodeRow]:
        """What is on this node, used last first. Raises nothing; leaves it as it is."""
        needed = self.needed()
        entries = sorted(self._entries.values(), key=lambda entry: -entry.used)
        return [_row(entry, needed) for entry in entries]

    async def prefetch(self, digest: str) -> CodeRow:
        """As `ensure`, ahead of a request."""
        await self.ensure(digest)
        return _row(self._entries[digest], self.needed())

    async def verify(self) -> list[CodeCheck]:
        """Read all images on this node again; the damaged ones are fetched again, or are gone.

        Raises nothing that concerns one image alone: the answer tells it.
        """
        return [await self._check(entry) for entry in list(self._entries.values())]

    async def _check(self, entry: Entry) -> CodeCheck:
        digest = entry.record.digest
        if await asyncio.to_thread(entry.verify) or self._entries.get(digest) is not entry:
            return CodeCheck(digest=digest, state=CodeState.OK)
        try:
            await self.ensure(digest)
        except (HostError, NotFound) as error:
            return CodeCheck(digest=digest, state=CodeState.DAMAGED, problem=error.message)
        return CodeCheck(digest=digest, state=CodeState.REPAIRED)

    async def gc(self) -> CodeFreed:
        """Remove all that nothing needs, but for what was used within the last ten seconds.

        Raises nothing; what cannot be removed stays, and is logged.
        """
        async with self._changing:
            return await self._remove([entry.record.digest for entry in self._unneeded()])

    # Changes; the lock is held

    async def _place(self, record: Record, image: Path) -> Entry:
        await self._make_room(record.size)
        entry = await asyncio.to_thread(self._shelf.place, record, image, self._clock())
        self._entries[record.digest] = entry
        self._tell_bytes()
        return entry

    async def _make_room(self, size: int) -> None:
        """Evict until so many more bytes fit; what is needed stays, even if they do not then."""
        excess = self._bytes() + size - self._limit
        evicted: list[str] = []
        for entry in self._unneeded() if excess > 0 else ():
            if excess <= 0:
                break
            excess -= entry.record.size
            evicted.append(entry.record.digest)
        freed = await self._remove(evicted)
        if freed.removed:
            log.info("code evicted: %s", ", ".join(digest[:12] for digest in freed.removed))
        if excess > 0:
            log.warning("the code that is needed takes more than code.cache_size")

    def _unneeded(self) -> list[Entry]:
        """What may be evicted, least recently used first."""
        needed, now = self.needed(), self._clock()
        found = [
            entry
            for digest, entry in self._entries.items()
            if digest not in needed
            and now - entry.used >= _GRACE
            and not self._admitting[digest]
            and digest not in self._flights
        ]
        return sorted(found, key=lambda entry: entry.used)

    async def _remove(self, digests: Iterable[str]) -> CodeFreed:
        gone = [
            self._entries.pop(digest)
            for digest in digests
            if digest in self._entries and await asyncio.to_thread(self._shelf.remove, digest)
        ]
        self._tell_bytes()
        return CodeFreed(
            removed=tuple(entry.record.digest for entry in gone),
            size=sum(entry.record.size for entry in gone),
        )

    def _use(self, entry: Entry) -> None:
        now = self._clock()
        if now - entry.used >= _TOUCH:
            entry.touch(now)
        entry.used = now

    def _bytes(self) -> int:
        return sum(entry.record.size for entry in self._entries.values())

    def _tell_bytes(self) -> None:
        self._metrics.code_bytes(self._bytes())

    @contextlib.asynccontextmanager
    async def _work(self) -> AsyncIterator[Path]:
        """A folder for an image on its way, removed at the end."""
        folder = await asyncio.to_thread(self._shelf.work)
        try:
            yield folder
        finally:
            await asyncio.shield(asyncio.to_thread(remove_directory, folder))


def _row(entry: Entry, needed: set[str]) -> CodeRow:
    record = entry.record
    return CodeRow(
        digest=record.digest,
        bytes=record.bytes,
        size=record.size,
        used=datetime.fromtimestamp(entry.used, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        needed=record.digest in needed,
        verified=entry.stamp is not None,
    )


def _unknown(digest: str) -> NotFound:
    return NotFound(
        f"there is no code {digest}", hint="deploy it again, or see code.store in the configuration"
    )


def _lost(digest: str) -> HostError:
    return HostError(
        f"code {digest} was damaged on this node, and no store has it: it was removed",
        hint="see the host's log for errors of this disk, and deploy the function again",
    )
