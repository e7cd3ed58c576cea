"""How fast one guest is listened to, whatever it says, and the lines that it says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

# What is read at once, in bytes, and of it handled before others have their turn, in lines.
READ, TURN = 65536, 64
MAX_LINE = 1 << 20
# Seconds: a wake-up costs at least this, and a line with all that others do because of it; a rest
# is worth a timer from here on.
_COST, _LEAST_REST = 30e-6, 1e-3
# How many times as long as it worked the reader rests, for lines that are asked for or not.
_ASKED, _UNASKED = 2.0, 50.0


class Pace:
    """How fast one guest is listened to: it must not take the daemon's time from the others.

    What it says is read with rests that grow with the work that it makes. Meanwhile its port is
    full, and it waits itself. A guest that says only what it is asked for never notices.
    """

    def __init__(self, transport: asyncio.ReadTransport) -> None:
        self._transport = transport
        self._paid = 0.0
        """When all rests of the work so far are over, on the monotonic clock."""

    @contextlib.contextmanager
    def work(self, asked: bool) -> Iterator[Work]:
        """Count what is done inside, by the CPU time that it takes."""
        work, begin = Work(asked), time.thread_time()
        yield work
        seconds = max(time.thread_time() - begin, work.lines * _COST)
        self._paid = max(self._paid, time.monotonic())
        self._paid += seconds * (_ASKED if work.asked else _UNASKED)

    async def rest(self) -> None:
        """Let others have their turn, once that is due."""
        owed = self._paid - time.monotonic()
        if owed < _LEAST_REST:
            return
        # Each byte that comes meanwhile would wake the loop. It reads no more already when the
        # reader has as much as it takes.
        reading = self._transport.is_reading()
        if reading:
            self._transport.pause_reading()
        try:
            await asyncio.sleep(owed)
        finally:
            if reading and not self._transport.is_closing():
                self._transport.resume_reading()


@dataclass
class Work:
    """What is done for a guest at once: whether all of it was asked for."""

    asked: bool
    lines: int = 0
    """Those that others have work with, and what comes from the hypervisor at once."""


class Lines:
    """Makes lines of what comes."""

    def __init__(self, longest: int = MAX_LINE) -> None:
        self._longest = longest
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """The lines that end here and are not empty; None is a part of one that is too long."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._skipping and lines:
            self._skipping = False
            del lines[0]
        whole: list[bytes | None] = [line for line in lines if line and not line.isspace()]
        if len(self._rest) >= self._longest or (self._skipping and self._rest):
            whole.append(None)
            self._rest, self._skipping = b"", True
        return whole
