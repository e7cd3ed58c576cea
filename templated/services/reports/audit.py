"""The audit log: who changed what, in two files of bounded size, for `templated audit`.

Requests only append to a list; a thread writes it a moment later. What was not written yet is
lost with a SIGKILL, and nothing is synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import msgspec

from templated.drivers.accounts import user_name
from templated.errors import Conflict, HostError
from templated.journal import now
from templated.model.api import AuditEntry

log = logging.getLogger(__name__)
# Seconds that an entry waits for others, to be written with them.
_DELAY = 0.2
# Entries that wait for a disk that takes none; the oldest are dropped.
_WAITING = 10_000
# Seconds in which a caller's refusals of one kind make one entry, so that nobody who may do
# nothing pushes out what others did; and how many kinds are remembered for that.
_REFUSALS = 60.0
_KINDS = 1000
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_DECODER = msgspec.json.Decoder(AuditEntry)


class AuditLog:
    """JSON lines in `path`, and older ones in PATH.1, each of at most `limit` bytes.

    Without a limit nothing is kept.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        self._path = path
        self._limit = limit
        self._added = asyncio.Event()
        self._waiting: deque[AuditEntry] = deque(maxlen=_WAITING)
        self._refusals: dict[tuple[int | None, str, str], tuple[float, int]] = {}
        # What follows belongs to who has the lock.
        self._files = threading.Lock()
        self._lines: deque[bytes] = deque(maxlen=_WAITING)
        self._failing = False

    def add(self, entry: AuditEntry) -> None:
        """Keep an entry. Returns at once, and raises nothing."""
        if self._limit is None:
            return
        if entry.outcome == "forbidden":
            left_out = self._left_out(entry)
            if left_out is None:
                return
            entry = msgspec.structs.replace(entry, left_out=left_out)
        self._waiting.append(entry)
        self._added.set()

    def _left_out(self, entry: AuditEntry) -> int | None:
        """How many such refusals were left out before; None when this one is left out as well."""
        kind, present = (entry.uid, entry.key, entry.action), monotonic()
        until, left_out = self._refusals.get(kind, (present, 0))
        if present < until:
            self._refusals[kind] = until, left_out + 1
            return None
        if len(self._refusals) >= _KINDS:
            self._refusals.clear()
        self._refusals[kind] = present + _REFUSALS, 0
        return left_out

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        while True:
            await self._added.wait()
            await asyncio.sleep(_DELAY)
            await self.flush()

    async def flush(self) -> None:
        """Write what waits. What the disk does not take waits on; that is logged once."""
        self._added.clear()
        if self._limit is not None:
            await asyncio.to_thread(self._write, self._limit)

    async def read(
        self, lines: int, *, since: float | None = None, user: str = ""
    ) -> list[AuditEntry]:
        """The last entries, oldest first: of the last `since` seconds, of a user's name or uid, or
        of a key's id.

        Raises Conflict when the log is switched off, HostError when it cannot be read.
        """
        if self._limit is None:
            raise Conflict(
                "the audit log is switched off",
                hint="set `audit: {size: 8MiB}` in the daemon's configuration, and restart it",
            )
        await self.flush()
        return await asyncio.to_thread(self._read, lines, since, user)

    def _read(self, lines: int, since: float | None, user: str) -> list[AuditEntry]:
        try:
            with self._files:
                content = _content(self._older) + _content(self._path)
        except OSError as error:
            raise HostError(
                f"cannot read the audit log {self._path}: {error.strerror}",
                hint="check its owner and mode",
            ) from error
        begin = "" if since is None else now(ago=since)
        entries = (e for e in _entries(content) if e.time >= begin)
        if user:
            entries = (e for e in entries if user in (e.user, str(e.uid), e.key))
        return list(deque(entries, maxlen=lines))

    def _write(self, limit: int) -> None:
        with self._files:
            while self._waiting:
                self._lines.append(_line(self._waiting.popleft()))
            try:
                while self._lines:
                    self._write_some(limit)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("cannot write the audit log %s: %s", self._path, error.strerror)
                self._failing = True

    def _write_some(self, limit: int) -> None:
        """Append the lines that fit into the file, or begin a new one when none does."""
        fd = os.open(self._path, _FLAGS, 0o600)
        try:
            size = os.fstat(fd).st_size
            # A daemon that was killed may have left half a line.
            torn = bool(size) and os.pread(fd, 1, size - 1) != b"\n"
            fitting = self._fitting(limit - size - torn, at_least_one=size == 0)
            if fitting:
                _append(fd, size, b"\n" * torn + b"".join(fitting))
            else:
                os.replace(self._path, self._older)
            for _ in fitting:
                self._lines.popleft()
        finally:
            os.close(fd)

    def _fitting(self, room: int, *, at_least_one: bool) -> list[bytes]:
        fitting: list[bytes] = []
        for line in self._lines:
            room -= len(line)
            if room < 0 and (fitting or not at_least_one):
                break
            fitting.append(line)
        return fitting

    @property
    def _older(self) -> Path:
        return self._path.with_name(f"{self._path.name}.1")


def _append(fd: int, size: int, data: bytes) -> None:
    """Write all, or nothing: OSError then, and the file is as it was."""
    try:
        if os.write(fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        raise


def _line(entry: AuditEntry) -> bytes:
    known = msgspec.structs.replace(
        entry,
        user="" if entry.uid is None else user_name(entry.uid),
        target=_encodable(entry.target),
        detail=_encodable(entry.detail),
    )
    return msgspec.json.encode(known) + b"\n"


def _encodable(text: str) -> str:
    """What came in a URL can be no text at all: lone surrogates, which JSON cannot have."""
    return text.encode(errors="replace").decode()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _entries(content: bytes) -> Iterator[AuditEntry]:
    """The lines that can be read: one that a killed daemon did not finish is left out."""
    for line in content.split(b"\n"):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            yield _DECODER.decode(line)
