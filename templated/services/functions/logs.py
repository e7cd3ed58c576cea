"""The logs of functions: what their handlers print, in two files of bounded size for each.

Requests only append to memory; a thread writes it a moment later. What was not written yet is lost
with a SIGKILL, and nothing is synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from templated.errors import HostError
from templated.model.function import check_function_name

log = logging.getLogger(__name__)
# Seconds that what was printed waits for more, to be written with it.
_DELAY = 0.1
# Bytes of all functions that wait for the disk; what comes then is dropped.
_WAITING = 32 << 20
_READ = 256 << 10
_LONGEST_LINE = 64 << 10
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class _Position:
    """Up to where a follower has read: which file, and how many bytes of it."""

    inode: int
    offset: int


_NOWHERE = _Position(0, 0)


class FunctionLogs:
    """NAME/log below `folder`, and older lines in NAME/log.1, together of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int, *, delay: float = _DELAY) -> None:
        self._folder = folder
        self._half = limit // 2
        self._delay = delay
        self._waiting: dict[str, deque[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self._total = 0
        self._added = asyncio.Event()
        self._written = asyncio.Event()
        self._writes: dict[str, int] = {}
        self._flushing = asyncio.Lock()
        self._closed = False
        # The files belong to who has the lock.
        self._files = threading.Lock()
        self._failing = False

    # --- writing ------------------------------------------------------------------------------

    def append(self, function: str, data: bytes) -> None:
        """Add lines to a function's log. Returns at once, and raises nothing."""
        if self._total + len(data) > _WAITING or self._closed:
            return
        pieces = self._waiting.setdefault(function, deque())
        pieces.append(data)
        size = self._sizes.get(function, 0) + len(data)
        self._total += len(data)
        while size > self._half and len(pieces) > 1:  # the file would not keep them either
            oldest = len(pieces.popleft())
            size -= oldest
            self._total -= oldest
        self._sizes[function] = size
        self._added.set()

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            await self._added.wait()
            await asyncio.sleep(self._delay)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. What the disk does not take is lost; that is logged once."""
        async with self._flushing:  # one after the other, or lines would change places
            self._added.clear()
            if not self._waiting:
                return
            waiting, self._waiting = self._waiting, {}
            self._sizes.clear()
            self._total = 0
            await asyncio.to_thread(self._write, waiting)
            for function in waiting:
                self._writes[function] = self._writes.get(function, 0) + 1
            self._wake()

    async def close(self) -> None:
        """Write what waits, take nothing more, and end all followers. Idempotent."""
        await self.flush()
        self._closed = True
        self._wake()

    async def remove(self, function: str) -> None:
        """Forget a function's log. Raises HostError when its files stay."""
        size = self._sizes.pop(function, 0)
        if self._waiting.pop(function, None) is not None:
            self._total -= size
        await asyncio.to_thread(self._remove, self._place(function))

    async def prune(self, functions: Collection[str]) -> None:
        """Forget the logs of all other functions. Raises HostError when files stay."""
        await asyncio.to_thread(self._prune, set(functions))

    def _wake(self) -> None:
        self._written.set()
        self._written = asyncio.Event()

    def _place(self, function: str) -> Path:
        """The folder of a function's files. The name is checked here, as it becomes a path."""
        return self._folder / check_function_name(function)

    def _write(self, waiting: dict[str, deque[bytes]]) -> None:
        with self._files:
            try:
                for function, pieces in waiting.items():
                    self._write_one(self._place(function), b"".join(pieces)[-self._half :])
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("cannot write logs of functions: %s", error)
                self._failing = True

    def _write_one(self, place: Path, data: bytes) -> None:
        current = place / "log"
        try:
            size = current.stat().st_size
        except FileNotFoundError:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            size = 0
        if size and size + len(data) > self._half:
            os.replace(current, place / "log.1")
        fd = os.open(current, _FLAGS, 0o600)
        try:
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)

    def _remove(self, place: Path) -> None:
        with self._files:
            try:
                shutil.rmtree(place)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise HostError(f"cannot remove {place}: {error.strerror}") from error

    def _prune(self, kept: set[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for place in list(self._folder.iterdir()):
                if place.name not in kept:
                    self._remove(place)

    # --- reading ------------------------------------------------------------------------------

    async def tail(self, function: str, lines: int) -> bytes:
        """The last lines of a function's log, printable. Raises HostError when unreadable."""
        place = self._place(function)
        await self.flush()
        content, _ = await asyncio.to_thread(self._last, place)
        return _lines(content, lines)

    async def follow(self, function: str, lines: int) -> AsyncIterator[bytes]:
        """The last lines of a function's log, and then what comes, until the logs are closed.

        Raises HostError when the files cannot be read. A follower that is slow reads on from the
        files; what they no longer have it misses.
        """
        place = self._place(function)
        await self.flush()
        content, position = await asyncio.to_thread(self._last, place)
        partial = b""
        if last := _lines(content, lines):
            yield last
        seen = -1
        while True:
            written, closed = self._written, self._closed
            while self._writes.get(function, 0) != seen:
                seen = self._writes.get(function, 0)
                async for part in self._since(place, position):
                    content, position = part
                    *whole, partial = _split(partial + content)
                    if whole:
                        yield _lines(b"\n".join(whole) + b"\n")
            if closed:
                return
            await written.wait()

    async def _since(
        self, place: Path, position: _Position
    ) -> AsyncIterator[tuple[bytes, _Position]]:
        """What was written after a position, part by part, each with the position after it."""
        while True:
            content, after = await asyncio.to_thread(self._more, place, position)
            if after == position:
                return
            position = after
            yield content, position

    def _last(self, place: Path) -> tuple[bytes, _Position]:
        """All that is kept, and the position at its end."""
        with self._files, _readable(place):
            content = b""
            position = _NOWHERE
            for name in ("log.1", "log"):
                with contextlib.suppress(FileNotFoundError), open(place / name, "rb") as file:
                    data = file.read(self._half)
                    content += data
                    position = _Position(os.fstat(file.fileno()).st_ino, len(data))
            return content, position

    def _more(self, place: Path, position: _Position) -> tuple[bytes, _Position]:
        """The next bytes after a position; the file that they are in may have been renamed."""
        with self._files, _readable(place):
            begun = position.inode == 0
            for name in ("log.1", "log"):
                with contextlib.suppress(FileNotFoundError), open(place / name, "rb") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    if begun:
                        position = _Position(inode, 0)
                    elif inode != position.inode:
                        continue
                    file.seek(position.offset)
                    data = file.read(_READ)
                    if data:
                        return data, _Position(inode, position.offset + len(data))
                    begun = True  # this one is read to its end: what follows is in the next
            if begun:
                return b"", position
            return b"", _NOWHERE  # both are newer than what was read


@contextlib.contextmanager
def _readable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot read the log in {place}: {error.strerror}", hint="check its owner and mode"
        ) from error


def _split(content: bytes) -> list[bytes]:
    """Whole lines, and at last what has no end yet; a line that is too long ends anyway."""
    lines = content.split(b"\n")
    if len(lines[-1]) > _LONGEST_LINE:
        lines.append(b"")
    return lines


def _lines(content: bytes, last: int | None = None) -> bytes:
    """Lines, all or the last ones, without what a terminal would obey."""
    lines = content.decode(errors="replace").replace("\r", "").split("\n")
    if not lines[-1]:
        lines.pop()
    if last is not None:
        lines = lines[-last:] if last > 0 else []
    shown = ("".join(c if c.isprintable() or c == "\t" else " " for c in x) for x in lines)
    return "".join(f"{line}\n" for line in shown).encode()
