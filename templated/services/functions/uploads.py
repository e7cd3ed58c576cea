"""Archives on their way in: a file while its deploy runs, and nothing after."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from templated.errors import InvalidRequest, host_errors
from templated.model.function import MAX_CODE

_REFUSED = "the code cannot be received"
_HINT = "see whether state_dir has space"


class Uploads:
    """Archives that are being received, in a directory of their own."""

    def __init__(self, folder: Path, limit: int = MAX_CODE) -> None:
        self._folder = folder
        self._limit = limit

    async def open(self) -> None:
        """Remove what a killed daemon left. Raises HostError; leaves what could not be removed."""
        await asyncio.to_thread(self._clear)

    @contextlib.asynccontextmanager
    async def receive(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[Path | None]:
        """The file that the chunks make, for as long as the block runs; None for an empty one.

        Raises InvalidRequest for one that is too large, HostError when it cannot be written;
        leaves no file.
        """
        path = self._folder / f"{uuid.uuid4().hex}.zip"
        try:
            size = await self._write(path, chunks)
            yield path if size else None
        finally:
            await asyncio.to_thread(_remove, path)

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> int:
        size, file = 0, None
        try:
            async for chunk in chunks:
                if not chunk:
                    continue
                size += len(chunk)
                if size > self._limit:
                    raise InvalidRequest(
                        f"the code is larger than {self._limit >> 20} MiB",
                        hint="leave out what the function does not need",
                    )
                if file is None:
                    file = await asyncio.to_thread(self._create, path)
                await asyncio.to_thread(_put, file, chunk)
        finally:
            if file is not None:
                await asyncio.to_thread(_close, file)
        return size

    def _create(self, path: Path) -> IO[bytes]:
        with host_errors(_REFUSED, _HINT):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Unbuffered: what cannot be written is an error of the chunk, not of the close.
            return path.open("xb", buffering=0)

    def _clear(self) -> None:
        with host_errors(_REFUSED, _HINT):
            if self._folder.is_dir():
                shutil.rmtree(self._folder)


def _put(file: IO[bytes], chunk: bytes) -> None:
    left = memoryview(chunk)
    with host_errors(_REFUSED, _HINT):
        while left:
            left = left[file.write(left) :]


def _remove(path: Path) -> None:
    # Where no file could be made there is none.
    with host_errors(_REFUSED, _HINT), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        file.close()
