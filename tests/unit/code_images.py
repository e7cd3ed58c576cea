"""Code images that no mkfs made, and what a cache of them is given, for tests."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from pathlib import Path

from templated.drivers.code import VIRTUAL_SIZE
from templated.drivers.code.image import Record
from templated.errors import HostError, NotFound


def image_of(content: bytes, path: Path) -> Record:
    """Write an image that begins with `content`; its record. Blocks."""
    content = content.ljust(4096, b"\0")
    path.write_bytes(content)
    os.truncate(path, VIRTUAL_SIZE)
    path.chmod(0o444)
    return Record(
        digest=hashlib.sha256(content).hexdigest(),
        uuid=content[1072:1088].hex(),
        bytes=7,
        size=len(content),
    )


async def make_image(archive: Path, folder: Path) -> tuple[Record, Path]:
    """In place of the real one: the archive is the image."""
    content = await asyncio.to_thread(archive.read_bytes)
    return await asyncio.to_thread(image_of, content, folder / "image"), folder / "image"


def _copy(source: Path, target: Path, size: int) -> None:
    with open(source, "rb") as content:
        target.write_bytes(content.read(size))
    os.truncate(target, VIRTUAL_SIZE)


class FakeZone:
    """A zone in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.fetched = 0
        self.error: HostError | None = None
        self.open = asyncio.Event()
        """Nothing goes on until it is set."""
        self.open.set()

    async def push(self, record: Record, image: Path) -> None:
        """Keep a copy."""
        await self.open.wait()
        if self.error is not None:
            raise self.error
        await asyncio.to_thread(_copy, image, self.folder / record.digest, record.size)
        self.records[record.digest] = record

    async def fetch(self, digest: str, target: Path) -> Record:
        """Give the copy."""
        await self.open.wait()
        self.fetched += 1
        if self.error is not None:
            raise self.error
        if digest not in self.records:
            raise NotFound("not in the zone")
        record = self.records[digest]
        await asyncio.to_thread(_copy, self.folder / digest, target, record.size)
        return record


class Counted:
    """What a cache counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.bytes = -1

    def code_request(self, layer: str, outcome: str) -> None:
        """One more."""
        self.requests[layer, outcome] += 1

    def code_bytes(self, size: int) -> None:
        """What there is now."""
        self.bytes = size
