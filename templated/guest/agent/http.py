"""HTTP/1.1 for clients in the guest, as little of it as they need: heads, bodies, keep-alive.

RFC 9112. Clients are users' code: whatever they send is bounded, and ends at worst their own
connection.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from .port import Port
from .wire import CHUNK, MAX_PAYLOAD, join

MAX_HEAD = 16384
MAX_CONNECTIONS = 16
MAX_DISCARDED = 64 << 20
"""Bytes of a body that is too large: it is read, so that its client comes to read the answer."""
_HEX = b"0123456789abcdefABCDEF"
_REASONS = {
    200: b"OK",
    202: b"Accepted",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    410: b"Gone",
    413: b"Payload Too Large",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
}
NEXT_LINE = b"\r\n"


class Broken(Exception):
    """A request that is none; becomes an answer, after which the connection ends."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request:
    """The head of a request. `body` is None when it was too large."""

    def __init__(self, head: bytes) -> None:
        first, *lines = head.split(NEXT_LINE)
        words = first.split(b" ")
        if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
            raise Broken(400, "not a request of HTTP/1.1")
        self.method, self.path, version = words
        headers: dict[bytes, bytes] = {}
        self.headers = headers
        self.body: bytes | bytearray | None = b""
        for line in lines:
            name, colon, value = line.partition(b":")
            name, value = name.lower(), value.strip()
            if not colon or not name or name != name.strip():
                raise Broken(400, "a header field that is none")
            if name == b"content-length" and headers.get(name, value) != value:
                raise Broken(400, "two lengths")
            headers[name] = value
        self.keep = version == b"HTTP/1.1" and headers.get(b"connection", b"").lower() != b"close"
        length = headers.get(b"content-length", b"0")
        coding = headers.get(b"transfer-encoding")
        if not length.isdigit() or len(length) > 15 or (coding and b"content-length" in headers):
            raise Broken(400, "the length of the body is not known")
        if coding and coding.lower() != b"chunked":
            raise Broken(501, "no transfer coding but chunked is known")
        self.chunked, self.length = coding is not None, int(length)


Serve = Callable[["Connection", Request], None]


class Connection:
    """A client. A request is served when it is whole, and the next one when it was answered."""

    def __init__(
        self, port: Port, end: socket.socket, serve: Serve, gone: Callable[[Connection], None]
    ) -> None:
        self._port, self._socket, self._serve, self._gone = port, end, serve, gone
        self._descriptor = end.fileno()
        self._input = bytearray()
        self._output = memoryview(b"")
        self._request: Request | None = None
        self._last: tuple[bytes, Request] | None = None
        """The last head of a request without a body: most are like the one before."""
        self._body = bytearray()
        self._left = self._size = 0
        self._framed = False
        self._served = False
        """A request is whole and waits for its answer."""
        self._ends = False
        """It closes when its output is sent."""
        self.closed = False
        self.quick: Callable[[Connection, bytes], bool] | None = None
        """Is shown what came when nothing else is under way, and says whether it has handled it:
        for requests of which the shape is known."""
        self._owed = b""
        port.watch(self._descriptor, select.EPOLLIN, self._on_ready)

    def _on_ready(self, descriptor: int, events: int) -> None:
        if self._output:
            self._flush()
        if events & ~select.EPOLLOUT:
            self.receive()

    def receive(self) -> bool:
        """Take what has come; whether there was something."""
        if self.closed:
            return False
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if self.quick is not None and self._rests() and self.quick(self, data):
            return True
        self._input += data
        if not data or (len(self._input) > MAX_HEAD + CHUNK and self._served):
            self.close()
            return False
        self._advance()
        return True

    def _rests(self) -> bool:
        return not (self._request or self._served or self._input or self._output)

    def _advance(self) -> None:
        try:
            while not (self._served or self._output or self.closed):
                if self._request is None and not self._take_head():
                    return
                if not self._take_body():
                    return
                assert self._request is not None
                self._served = True
                self._serve(self, self._request)
        except Broken as error:
            self._request, self._served = None, True
            self.answer(error.status, str(error).encode(), close=True)

    def _take_head(self) -> bool:
        end = self._input.find(b"\r\n\r\n")
        if end < 0:
            while self._input[:2] == NEXT_LINE:  # before a request: RFC 9112, 2.2
                del self._input[:2]
            if len(self._input) > MAX_HEAD:
                raise Broken(431, "the head is too long")
            return False
        if end > MAX_HEAD:
            raise Broken(431, "the head is too long")
        head = bytes(self._input[:end])
        del self._input[: end + 4]
        if self._last is not None and self._last[0] == head:
            self._request = self._last[1]
            return True
        self._request = request = Request(head.lstrip(NEXT_LINE))
        if not request.length and not request.chunked:
            self._last = head, request
            return True
        self._left, self._size, self._framed = request.length, 0, False
        if b"expect" in request.headers:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _take_body(self) -> bool:
        """Move to the body what there is of it; whether it is whole."""
        request = self._request
        assert request is not None
        if self._left or request.chunked:
            if not (self._take_chunks() if request.chunked else self._take_piece()):
                return False
            request.body = self._body if self._size <= MAX_PAYLOAD else None
            self._body = bytearray()
        return True

    def _take_piece(self) -> bool:
        piece = self._input[: self._left]
        del self._input[: len(piece)]
        self._left -= len(piece)
        self._size += len(piece)
        if self._size > MAX_DISCARDED:
            raise Broken(413, "the body is too large")
        if self._size <= MAX_PAYLOAD:
            self._body += piece
        else:
            self._body.clear()
        return not self._left

    def _take_chunks(self) -> bool:
        while self._take_piece():
            end = self._input.find(NEXT_LINE)
            if end < 0:
                if len(self._input) > MAX_HEAD:
                    raise Broken(400, "a chunk without a size")
                return False
            line = bytes(self._input[:end])
            if self._framed:  # the end of the last chunk
                if line:
                    raise Broken(400, "a chunk that is longer than its size")
                del self._input[:2]
                self._framed = False
                continue
            size = line.partition(b";")[0].strip()
            if not size or len(size) > 12 or size.translate(None, _HEX):
                raise Broken(400, "a chunk without a size")
            self._left, self._framed = int(size, 16), True
            if not self._left:
                return self._take_trailers(end)
            del self._input[: end + 2]
        return False

    def _take_trailers(self, start: int) -> bool:
        """Drop the last chunk's line, which ends at `start`, and the fields that follow it."""
        end = self._input.find(b"\r\n\r\n", start)
        if end < 0:
            if len(self._input) > MAX_HEAD:
                raise Broken(431, "the trailers are too long")
            self._left = 0
            self._framed = False
            return False
        del self._input[: end + 4]
        return True

    def answer(
        self, status: int, body: bytes = b"", fields: bytes = b"", *, close: bool = False
    ) -> None:
        """Answer the request that was served; `fields` are whole lines."""
        keep = not close and self._request is not None and self._request.keep
        line = b"HTTP/1.1 %d %s\r\nContent-Length: %d\r\n" % (status, _REASONS[status], len(body))
        if not keep:
            fields += b"Connection: close\r\n"
            self._request = None
        self.raw(join((line, fields, b"\r\n", body)))

    def raw(self, data: bytes | bytearray) -> None:
        """Answer the request that was served with these bytes."""
        request, self._request, self._served = self._request, None, False
        owed, self._owed = self._owed, b""
        if owed and len(data) > CHUNK:  # no copy of it
            self._send(owed)
        elif owed:
            data = join((owed, data))
        self._send(data)
        if request is None or not request.keep:
            if self._output:
                self._served = self._ends = True
            else:
                self.close()

    def hold(self, request: Request, owed: bytes) -> None:
        """Be as if `request` was served now; `owed`, an earlier answer, is sent before its own."""
        self._request, self._served, self._owed = request, True, owed

    def resume(self) -> None:
        """Go on with what came meanwhile, after an answer that was not given while serving."""
        if self._input:
            self._advance()

    def _send(self, data: bytes | bytearray) -> None:
        if self.closed:
            return
        if self._output:
            self._output = memoryview(join((self._output, data)))
            return
        try:
            count = self._socket.send(data)
        except BlockingIOError:
            count = 0
        except OSError:
            self.close()
            return
        if count < len(data):
            self._output = memoryview(data)[count:]
            self._watch(select.EPOLLOUT)

    def _flush(self) -> None:
        try:
            self._output = self._output[self._socket.send(self._output) :]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._output:
            if self._ends:
                self.close()
                return
            self._watch(select.EPOLLIN)
            self._advance()

    def _watch(self, events: int) -> None:
        self._port.unwatch(self._descriptor)
        self._port.watch(self._descriptor, events, self._on_ready)

    def close(self) -> None:
        """End it; nothing happens when it has ended."""
        if not self.closed:
            self.closed = True
            self._output = self._output[:0]
            self._port.unwatch(self._descriptor)
            self._socket.close()
            self._gone(self)


class Server:
    """Listens, and keeps the connections."""

    def __init__(self, port: Port, address: tuple[str, int], serve: Serve) -> None:
        self._port, self._serve = port, serve
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(address)
        self._socket.listen(MAX_CONNECTIONS)
        self._socket.setblocking(False)
        self.address = "%s:%d" % self._socket.getsockname()  # noqa: UP031 - fewer modules
        self.connections: list[Connection] = []
        port.watch(self._socket.fileno(), select.EPOLLIN, self._on_connect)

    def _on_connect(self, descriptor: int, events: int) -> None:
        try:
            end, _ = self._socket.accept()
        except OSError:
            return
        if len(self.connections) >= MAX_CONNECTIONS:
            end.close()
            return
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.add(end)

    def add(self, end: socket.socket) -> Connection:
        """Serve a client that is connected."""
        end.setblocking(False)
        connection = Connection(self._port, end, self._serve, self.connections.remove)
        self.connections.append(connection)
        return connection

    def close(self) -> None:
        """End all of it."""
        for connection in list(self.connections):
            connection.close()
        self._port.unwatch(self._socket.fileno())
        self._socket.close()
