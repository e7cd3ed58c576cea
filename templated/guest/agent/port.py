"""Lines over a virtio port: connections that come and go, and a host that may be slow."""

from __future__ import annotations

import collections
import os
import select
import time
from collections.abc import Callable

from .wire import CHUNK, MAX_LINE, encode

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

QUEUE_LIMIT = 1 << 20
GRACE_SECONDS = 5.0


class Source:
    """What sends to the host by itself, for a while: a command that runs."""

    deadline: float | None
    """When `expire` is due, on the monotonic clock."""

    def pause(self) -> None:
        """Make no more output: the host takes it too slowly."""

    def resume(self) -> None:
        """Go on."""

    def expire(self) -> None:
        """The deadline came."""


class Port:
    """A port, and all that is waited for. `fd_in` and `fd_out` do not block, and may be one.

    A subclass says what happens to a line (`handle`). While more than QUEUE_LIMIT bytes wait for
    the host, the sources make no more of them.
    """

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self._in, self._out = fd_in, fd_out
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int, int], None]] = {}
        self._input = bytearray()
        self._skipping = False
        self._queue: collections.deque[memoryview] = collections.deque()
        self._queued = 0
        self._retry = False
        self._connected = False
        self._grace: float | None = None
        self.connection = 0
        """Counts connections: the end of a command must not reach a later one."""
        self.sources: set[Source] = set()
        self.ready = 0
        """How much was there to be handled when the last turn began."""
        # Edge-triggered, as a port without a host reports EPOLLHUP for ever.
        edges = select.EPOLLIN | select.EPOLLET
        if fd_in == fd_out:
            self.watch(fd_in, edges | select.EPOLLOUT, self._on_port)
        else:
            self.watch(fd_in, edges, self._on_port)
            self.watch(fd_out, select.EPOLLOUT | select.EPOLLET, self._on_port)

    @property
    def queued(self) -> int:
        """Bytes that wait for the host to take them."""
        return self._queued

    def handle(self, line: bytes) -> None:
        """Do what a line asks for; it is not empty."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the port; its descriptors stay open."""
        self._epoll.close()

    def watch(self, descriptor: int, events: int, handler: Callable[[int, int], None]) -> None:
        """Have `handler` called with the descriptor and its events."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """End `watch`; nothing happens when there was none."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def turn(self, limit: float | None) -> None:
        """Wait for something, at most `limit` seconds, and handle it."""
        found = self._epoll.poll(self._wait(limit))
        self.ready = len(found)
        for descriptor, events in found:
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(descriptor, events)
        if self._grace is not None and self._grace <= time.monotonic():
            self._disconnect()
        if self._retry:
            self._flush()
        if self.sources:
            now = time.monotonic()
            for source in list(self.sources):
                if source.deadline is not None and source.deadline <= now:
                    source.expire()

    def _wait(self, limit: float | None) -> float | None:
        if not self.sources and not self._retry and self._grace is None:
            return limit
        due = [item.deadline for item in self.sources if item.deadline is not None]
        if self._grace is not None:
            due.append(self._grace)
        waits = [max(0.0, min(due) - time.monotonic())] if due else []
        if self._retry:
            waits.append(0.1)  # in case the port does not tell that there is room again
        if limit is not None:
            waits.append(limit)
        return min(waits, default=None)

    def _on_port(self, descriptor: int, events: int) -> None:
        if descriptor == self._in:
            if not events & (select.EPOLLHUP | select.EPOLLERR):
                self._connected, self._grace = True, None
            elif self._grace is None:
                self._disconnect()
            if events & select.EPOLLIN:
                self._receive()
        if self._queue:
            self._flush()

    def _disconnect(self) -> None:
        self._connected = self._skipping = self._retry = False
        self._grace = None
        self._input.clear()
        self._drop_output()

    def _drop_output(self) -> None:
        self._queue.clear()
        self._queued = 0
        for source in self.sources:
            source.resume()

    def _begin(self) -> None:
        """A new connection: its first line is empty, or ends what an old one left half-said."""
        self.connection += 1
        self._drop_output()

    def _receive(self) -> None:
        """Read all there is and handle the lines."""
        while True:
            try:
                data = os.read(self._in, CHUNK)
            except OSError:  # nothing more for now, or a broken port
                return
            if not data:
                return
            if not self._connected:
                # Data may overtake the notice that the host is there, which the kernel handles
                # in a work queue. Until then writing fails, and what is to be said is kept.
                self._connected = True
                self._grace = time.monotonic() + GRACE_SECONDS
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._input += data
        while (end := self._input.find(b"\n")) >= 0:
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            if self._skipping:
                self._skipping = False
            elif len(line) > MAX_LINE:
                self.refuse(None, "too_long", "a line is longer than 1 MiB")
            elif line and not line.isspace():
                self.handle(line)
            else:
                self._begin()
        if self._skipping:
            self._input.clear()
        elif len(self._input) > MAX_LINE:
            self._skipping = True
            self._input.clear()
            self.refuse(None, "too_long", "a line is longer than 1 MiB")

    def reply(self, number: Any, result: dict[str, Any], connection: int) -> None:
        """Send the good end of request `number`."""
        self.send({"id": number, "ok": True, "result": result}, connection)

    def refuse(self, number: Any, code: str, message: str) -> None:
        """Send the bad end of request `number`."""
        body = {
            "id": number,
            "ok": False,
            "error": {"code": code, "message": message[:2000]},
        }
        self.send(body, self.connection)

    def send(self, message: dict[str, Any], connection: int) -> None:
        """Queue a line for the host; dropped when its connection is over."""
        if not self._connected or connection != self.connection:
            return
        line = (encode(message) + "\n").encode()
        self._queue.append(memoryview(line))
        self._queued += len(line)
        self._flush()
        if self._queued > QUEUE_LIMIT:
            for source in self.sources:
                source.pause()

    def _flush(self) -> None:
        self._retry = False
        while self._queue:
            head = self._queue[0]
            try:
                count = os.write(self._out, head)
            except BlockingIOError:
                self._retry = True
                break
            except OSError:
                self._drop_output()
                return
            self._queued -= count
            if count == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[count:]
        if self._queued <= QUEUE_LIMIT // 2:
            for source in self.sources:
                source.resume()
