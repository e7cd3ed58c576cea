"""The Runtime API in the guest, asked by clients that are broken, hostile, or only slow."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from templated.drivers.guest_functions import Answer
from templated.guest.agent.http import MAX_CONNECTIONS, MAX_DISCARDED, MAX_HEAD
from templated.guest.agent.wire import MAX_PAYLOAD
from templated.model.function import Runtime
from tests.unit.function_guest import Caller, Guest, calling, functions_in

API = b"/2018-06-01/runtime"
NEXT = b"GET " + API + b"/invocation/next HTTP/1.1\r\nHost: x\r\n\r\n"
WAITS = "#!/bin/sh\nexec sleep 60\n"


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with functions_in(tmp_path) as guest:
        guest.write("bootstrap", WAITS, 0o755)
        yield guest


class Client:
    """A connection to the API, of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Send, and read one answer."""
        self.writer.write(data)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Read one answer: status, fields, body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in lines)
        if first == b"HTTP/1.1 100 Continue":
            return await self.answer()
        body = await self.reader.readexactly(int(fields[b"content-length"]))
        return int(first.split()[1]), fields, body

    async def ended(self) -> bool:
        """Whether the other end has closed."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def client(guest: Guest) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(*guest.address)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def runtime(guest: Guest, caller: Caller) -> AsyncIterator[Client]:
    """A function has started, and this is its runtime, which waits for a request."""
    async with client(guest) as one:
        loading = asyncio.create_task(caller.load(runtime=Runtime.PROVIDED))
        while guest.functions.state != "starting":
            await asyncio.sleep(0.01)
        one.writer.write(NEXT)
        await loading
        yield one


async def connected(guest: Guest, count: int) -> None:
    """The agent has seen that so many clients are left."""
    while len(guest.functions._server.connections) != count:
        await asyncio.sleep(0.01)


def post(what: bytes, body: bytes, fields: bytes = b"") -> bytes:
    """A request that ends request r-1."""
    head = b"POST %s/invocation/r-1/%s HTTP/1.1\r\nContent-Length: %d\r\n%s\r\n"
    return head % (API, what, len(body), fields) + body


BAD = [
    (b"nonsense\r\n\r\n", 400),
    (b"GET / HTTP/2\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\n\r\n", 400),
    (b"\x00\xff\xfe\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nContent-Length: 1e9\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
    (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400),
    (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * (MAX_HEAD + 9), 400),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
    (b"x" * (MAX_HEAD + 9), 431),
]


@pytest.mark.parametrize(("data", "status"), BAD, ids=range(len(BAD)))
def test_what_is_no_request_ends_its_connection_alone(
    guest: Guest, data: bytes, status: int
) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as good:
            async with client(guest) as bad:
                got, fields, _ = await bad.ask(data)
                assert got == status and fields[b"connection"] == b"close"
                assert await bad.ended()
            await serves(caller, good)

    calling(guest, body)


async def serves(caller: Caller, one: Client, answer: bytes | None = None) -> Answer:
    """The runtime gets a request and answers it."""
    asked = asyncio.create_task(caller.invoke(b"[1]"))
    status, fields, body = await one.answer()
    assert (status, body) == (200, b"[1]")
    assert fields[b"lambda-runtime-aws-request-id"] == b"r-1"
    assert fields[b"lambda-runtime-deadline-ms"] == b"2000000000000"
    assert fields[b"lambda-runtime-invoked-function-arn"] == b"arn:x"
    status, _, _ = await one.ask(answer or post(b"response", b"well"))
    assert status == 202
    result = await asked
    one.writer.write(NEXT)
    return result


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"DELETE " + API + b"/invocation/next HTTP/1.1\r\n\r\n", 405),
        (b"POST " + API + b"/invocation/next HTTP/1.1\r\n\r\n", 400),
        (post(b"response", b"x"), 400),
        (post(b"other", b"x"), 400),
        (b"POST " + API + b"/init/error HTTP/1.1\r\n\r\n", 403),
        (b"GET " + API + b"/init/order HTTP/1.1\r\n\r\n", 404),
    ],
)
def test_what_may_not_be_asked_is_answered(guest: Guest, data: bytes, status: int) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as good, client(guest) as bad:
            for _ in range(3):
                assert (await bad.ask(data))[0] == status
            await serves(caller, good)

    calling(guest, body)


@pytest.mark.parametrize("split", [1, 7, 100])
def test_a_chunked_answer_in_pieces(guest: Guest, split: int) -> None:
    head = b"POST %s/invocation/r-1/response HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" % API
    data = head + b"Trailer: x\r\n\r\n4\r\n[1, \r\n2;a=b\r\n2]\r\n0\r\nX: y\r\n\r\n"

    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            asked = asyncio.create_task(caller.invoke(b"[1]"))
            await one.answer()
            for start in range(0, len(data), split):
                one.writer.write(data[start : start + split])
                await one.writer.drain()
                if split < 100 and start % 13 == 0:
                    await asyncio.sleep(0.002)
            assert (await one.answer())[0] == 202
            assert (await asked).payload == b"[1, 2]"

    calling(guest, body)


def test_an_error_says_of_which_kind_it_is(guest: Guest) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            for word, error in ((b"Handled", "Handled"), (b"Anything", "Unhandled")):
                field = b"Lambda-Runtime-Function-Error-Type: %s\r\n" % word
                answer = await serves(caller, one, post(b"error", b"{}", field))
                assert answer == Answer(payload=b"{}", error=error)  # type: ignore[arg-type]

    calling(guest, body)


def test_an_answer_that_is_no_text(guest: Guest) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            for data in (b"\xff\x00\n", bytes(range(256)) * 1000, b""):
                assert (await serves(caller, one, post(b"response", data))).payload == data

    calling(guest, body)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_is_too_large(guest: Guest, chunked: bool) -> None:
    """The request fails at once, and the runtime goes on."""
    size = MAX_PAYLOAD + 1
    head = b"POST %s/invocation/r-1/response HTTP/1.1\r\nExpect: 100-continue\r\n" % API
    if chunked:
        data = b"%sTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
            head,
            size,
            b"x" * size,
        )
    else:
        data = b"%sContent-Length: %d\r\n\r\n%s" % (head, size, b"x" * size)

    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            asked = asyncio.create_task(caller.invoke(b"[1]"))
            await one.answer()
            assert (await one.ask(data))[0] == 413
            answer = await asked
            assert answer.error == "Unhandled" and b"ResponseSizeTooLarge" in answer.payload
            one.writer.write(NEXT)
            await serves(caller, one)

    calling(guest, body)


def test_a_body_without_end_is_not_read_for_ever(guest: Guest) -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (1 << 40)

    async def body(caller: Caller) -> None:
        async with client(guest) as bad:
            bad.writer.write(head)
            with contextlib.suppress(ConnectionError):
                for _ in range((MAX_DISCARDED >> 20) + 8):
                    bad.writer.write(b"x" * (1 << 20))
                    await bad.writer.drain()
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await bad.answer())[0] == 413
            assert await bad.ended()
        await caller.agent.ping(5.0)

    calling(guest, body)


def test_connections_are_bounded_and_clients_that_leave_are_forgotten(guest: Guest) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            async with contextlib.AsyncExitStack() as stack:
                many = [
                    await stack.enter_async_context(client(guest)) for _ in range(MAX_CONNECTIONS)
                ]
                assert await many[-1].ended()
                for other in many[:3]:
                    other.writer.write(NEXT)
                await serves(caller, one)
            # Those that wait too have left: the next request goes to who is still there.
            await connected(guest, 1)
            await serves(caller, one)

    calling(guest, body)


def test_a_client_of_each_request_and_http_1_0(guest: Guest) -> None:
    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as first:
            await serves(caller, first)
        await connected(guest, 0)
        asked = asyncio.create_task(caller.invoke(b"[2]"))
        async with client(guest) as one:
            status, _, data = await one.ask(NEXT.replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert (status, data) == (200, b"[2]") and await one.ended()
        async with client(guest) as one:
            status, fields, _ = await one.ask(post(b"response", b"3", b"Connection: close\r\n"))
            assert status == 202 and fields[b"connection"] == b"close" and await one.ended()
        assert (await asked).payload == b"3"

    calling(guest, body)


def test_a_runtime_that_does_not_read_its_large_request(guest: Guest) -> None:
    """The agent goes on: what it cannot send waits."""

    async def body(caller: Caller) -> None:
        async with runtime(guest, caller) as one:
            payload = b'"' + b"x" * (MAX_PAYLOAD - 2) + b'"'
            asked = asyncio.create_task(caller.invoke(payload))
            while guest.functions.state != "busy":
                await asyncio.sleep(0.02)
            for _ in range(3):
                await caller.agent.ping(5.0)
            assert (await one.answer())[2] == payload
            assert (await one.ask(post(b"response", b"1")))[0] == 202
            assert (await asked).payload == b"1"

    calling(guest, body)


def test_requests_in_one_piece_are_answered_in_order(guest: Guest) -> None:
    async def body(caller: Caller) -> None:
        async with client(guest) as one:
            one.writer.write(b"\r\nGET /a HTTP/1.1\r\n\r\n" * 20 + b"PUT / HTTP/1.1\r\n\r\n")
            assert [(await one.answer())[0] for _ in range(21)] == [404] * 20 + [405]

    calling(guest, body)


def test_the_agent_listens_on_loopback_alone(guest: Guest) -> None:
    assert socket.inet_aton(guest.address[0])[0] == 127
