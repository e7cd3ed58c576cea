"""The host's end of the agent, against peers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.drivers import guest
from templated.drivers.guest import (
    CHUNK,
    Agent,
    Confirmation,
    ExecResult,
    IdentityOrder,
    Output,
)
from templated.drivers.pace import MAX_LINE, TURN
from templated.errors import Busy, GuestError, Timeout
from templated.guest.agent.wire import SEEN

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def talking_to(peer: Peer, path: Path) -> AsyncIterator[Agent]:
    """An agent connection whose other end is `peer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            assert await reader.readexactly(2) == b"\n\n"  # what ends an old half line
            await peer(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, str(path / "agent"), limit=MAX_LINE)
    agent = Agent(path / "agent")
    try:
        await agent.connect()
        yield agent
    finally:
        await agent.close()
        server.close()
        await server.wait_closed()


def scenario(path: Path, peer: Peer, body: Callable[[Agent], Coroutine[Any, Any, None]]) -> None:
    """Run `body` on a connection to `peer`."""

    async def main() -> None:
        async with asyncio.timeout(20), talking_to(peer, path) as agent:
            await body(agent)

    asyncio.run(main())


def answering(line: bytes) -> Peer:
    """A peer that answers every request with `line`."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(line)

    return peer


@pytest.mark.parametrize(
    "line",
    [b"{nonsense\n", b"\xff\xfe\n", b"[]\n", b'"x"\n', b'{"id": "one"}\n', b"x" * (MAX_LINE + 9)],
)
def test_nonsense(tmp_path: Path, line: bytes) -> None:
    """Each request that it answers ends with one clear error."""

    async def body(agent: Agent) -> None:
        for _ in range(2):
            with pytest.raises(GuestError, match="nonsense"):
                await agent.ping(5.0)

    scenario(tmp_path, answering(line), body)


def test_nonsense_is_forgotten(tmp_path: Path) -> None:
    """A program in the guest that wrote to the port once does not cut the clone off for good."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}\n")
        writer.write(b"{nonsense\n" + b"x" * (MAX_LINE + 9) + b"\n")
        while line := await reader.readline():
            answer = {"id": json.loads(line)["id"], "ok": True, "result": {}}
            writer.write(json.dumps(answer).encode() + b"\n")

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            await agent.ping(5.0)
        for _ in range(20):  # the rest of the nonsense may still come
            try:
                await agent.ping(5.0)
                return
            except GuestError:
                continue
        raise AssertionError("the connection is of no more use")

    scenario(tmp_path, peer, body)


def test_a_wrong_shape_is_nonsense_too(tmp_path: Path) -> None:
    """A good frame with a bad result fails its own request only."""

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            await agent.adjust_clock(1.0, 5.0)
        await agent.ping(5.0)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            answer = {"id": json.loads(line)["id"], "ok": True, "result": {"time": "noon"}}
            writer.write(json.dumps(answer).encode() + b"\n")

    scenario(tmp_path, peer, body)


def test_silence(tmp_path: Path) -> None:
    """Every wait has a bound, and the message says for what it waited."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def body(agent: Agent) -> None:
        with pytest.raises(Timeout, match=r"'ping' within 0\.1 s"):
            await agent.ping(0.1)

    scenario(tmp_path, peer, body)


def test_closed_in_the_middle(tmp_path: Path) -> None:
    """The hypervisor's end fails what is under way."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"id": 1, "ok"')

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError):
            await agent.ping(5.0)

    scenario(tmp_path, peer, body)


def test_no_socket(tmp_path: Path) -> None:
    """A port that is not there is an error, not a traceback."""

    async def main() -> None:
        agent = Agent(tmp_path / "none")
        with pytest.raises(GuestError, match="not there"):
            await agent.connect()
        with pytest.raises(GuestError):
            await agent.ping(1.0)
        await agent.close()

    asyncio.run(main())


def test_overlapping_requests(tmp_path: Path) -> None:
    """Answers may come in any order; late and unknown ones are passed over."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        numbers = [json.loads(await reader.readline())["id"] for _ in range(2)]
        for number in (-1, *reversed(numbers), numbers[0]):
            result = {"time": float(number - numbers[0])}
            answer = {"id": number, "ok": True, "result": result}
            writer.write(json.dumps(answer).encode() + b"\n")

    async def body(agent: Agent) -> None:
        requests = (agent.adjust_clock(0.0, 5.0) for _ in range(2))
        assert await asyncio.gather(*requests) == [0.0, 1.0]

    scenario(tmp_path, peer, body)


async def _exec_peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = json.loads(await reader.readline())
    data = base64.b64encode(b"out").decode()
    for frame in (
        {"stream": "stdout", "data": data},
        {"stream": "stderr", "data": data},
        {"ok": True, "result": {"exit_code": 3}},
    ):
        writer.write(json.dumps({"id": request["id"], **frame}).encode() + b"\n")
    await reader.read()


def test_exec_streams(tmp_path: Path) -> None:
    """Output comes before the end does."""

    async def body(agent: Agent) -> None:
        seen = [part async for part in agent.exec(["x"], timeout=5)]
        assert seen == [
            Output("stdout", b"out"),
            Output("stderr", b"out"),
            ExecResult(exit_code=3),
        ]

    scenario(tmp_path, _exec_peer, body)


def test_output_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a bound, after which the request ends, and not the connection."""
    monkeypatch.setattr(guest, "MAX_UNREAD", 3)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = json.loads(await reader.readline())["id"]
        frame = {"id": number, "stream": "stdout", "data": base64.b64encode(b"out").decode()}
        writer.write((json.dumps(frame).encode() + b"\n") * 10)
        ping = json.loads(await reader.readline())["id"]
        writer.write(json.dumps({"id": ping, "ok": True, "result": {}}).encode() + b"\n")
        await reader.read()

    async def body(agent: Agent) -> None:
        output = agent.exec(["x"], timeout=5)
        assert await anext(output) == Output("stdout", b"out")
        await agent.ping(5.0)  # whose answer comes after all of the output
        with pytest.raises(Busy, match="does not read"):
            async for _ in output:
                pass

    scenario(tmp_path, peer, body)


def test_a_reader_that_stops(tmp_path: Path) -> None:
    """Its request is forgotten at once; the connection goes on."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = json.loads(await reader.readline())["id"]
        frame = {"id": number, "stream": "stdout", "data": ""}
        writer.write(json.dumps(frame).encode() + b"\n")
        ping = json.loads(await reader.readline())["id"]
        for answered in (number, ping):
            writer.write(json.dumps({"id": answered, "ok": True}).encode() + b"\n")
        await reader.read()

    async def body(agent: Agent) -> None:
        async with contextlib.aclosing(agent.exec(["x"], timeout=60)) as output:
            assert await anext(output) == Output("stdout", b"")
        assert not agent._pending
        await agent.ping(5.0)

    scenario(tmp_path, peer, body)


def test_refusal(tmp_path: Path) -> None:
    """The agent's own error message reaches the user."""

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="agent refused: no such thing"):
            await agent.ping(5.0)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = json.loads(await reader.readline())["id"]
        error = {"code": "x", "message": "no such thing"}
        writer.write(json.dumps({"id": number, "ok": False, "error": error}).encode() + b"\n")
        await reader.read()

    scenario(tmp_path, peer, body)


def storing(files: dict[str, bytearray]) -> Peer:
    """A peer that keeps files as the real agent does, part by part."""

    def get(request: dict[str, Any]) -> dict[str, Any]:
        content = files[request["path"]]
        end = request["offset"] + request["length"]
        data = base64.b64encode(content[request["offset"] : end]).decode()
        return {"data": data, "eof": end >= len(content), "size": len(content), "mode": 0o644}

    def put(request: dict[str, Any]) -> dict[str, Any]:
        assert len(files.setdefault(request["path"], bytearray())) == request["offset"]
        files[request["path"]] += base64.b64decode(request["data"])
        return {"mode": request["mode"]}

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            result = {"get": get, "put": put}[request["cmd"]](request)
            answer = {"id": request["id"], "ok": True, "result": result}
            writer.write(json.dumps(answer).encode() + b"\n")

    return peer


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_files(tmp_path: Path, size: int) -> None:
    """What was put is what is got, whatever its size is to that of a part."""
    content = (bytes(range(256)) * (size // 256 + 1))[:size]
    files: dict[str, bytearray] = {}

    async def body(agent: Agent) -> None:
        await agent.put("/x", content, 0o600, 5.0)
        assert bytes(files["/x"]) == content
        assert await agent.get("/x", 5.0) == content

    scenario(tmp_path, storing(files), body)


def test_a_file_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest cannot fill the daemon's memory."""
    monkeypatch.setattr(guest, "MAX_FILE", 1000)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = base64.b64encode(b"x" * 300).decode()
        while line := await reader.readline():
            result = {"data": data, "eof": False, "size": 0, "mode": 0}
            answer = {"id": json.loads(line)["id"], "ok": True, "result": result}
            writer.write(json.dumps(answer).encode() + b"\n")

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="/x in the guest has more than"):
            await agent.get("/x", 5.0)

    scenario(tmp_path, peer, body)


def test_closing_fails_what_is_under_way(tmp_path: Path) -> None:
    """Nobody waits for an answer that cannot come, and close can be called again."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def body(agent: Agent) -> None:
        waiting = asyncio.ensure_future(agent.ping(60.0))
        await asyncio.sleep(0.01)
        await agent.close()
        with pytest.raises(GuestError):
            await waiting
        await agent.close()
        with pytest.raises(GuestError):
            await agent.ping(1.0)

    scenario(tmp_path, peer, body)


def test_identity(tmp_path: Path) -> None:
    """All of it goes out in one request, and what comes back is complete or an error."""
    identity = IdentityOrder(
        hostname="a",
        machine_id="m" * 32,
        boot_id="b" * 36,
        uuid="u" * 36,
        mac="02:00:00:00:00:01",
        ip="10.0.0.3",
        prefix=22,
        gateway=None,
        dns=(),
        time=1.0,
        entropy=bytes(64),
    )
    kernel = SEEN.pack(bytes.fromhex("020000000001"), b"\x0a\0\0\x03", b"\xff\xff\xfc\0", 1.5)
    answers = [
        {"seen": (kernel + b"a\nm\nb\nu\n").hex()},
        {"seen": (kernel + b"a\nm\nb\n").hex()},
        {"seen": "zz"},
        {},
    ]

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for result in answers:
            request = json.loads(await reader.readline())
            assert request["cmd"] == "identify" and identity.fields().items() <= request.items()
            answer = {"id": request["id"], "ok": True, "result": result}
            writer.write(json.dumps(answer).encode() + b"\n")
        await reader.read()

    async def body(agent: Agent) -> None:
        seen = await agent.identify(5.0, identity)
        assert (seen.hostname, seen.machine_id, seen.boot_id, seen.uuid) == ("a", "m", "b", "u")
        assert (seen.mac, seen.ip, seen.prefix) == (identity.mac, "10.0.0.3", 22)
        assert seen.time == 1.5
        for _ in answers[1:]:
            with pytest.raises(GuestError, match="nonsense"):
                await agent.identify(5.0, identity)

    scenario(tmp_path, peer, body)


def replying(**answer: Any) -> Peer:
    """A peer that answers every request with the same, under the request's id."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            body = {"id": json.loads(line)["id"], **answer}
            writer.write(json.dumps(body).encode() + b"\n")

    return peer


# Those below were found by tests/fuzz/test_host_side.py.
@pytest.mark.parametrize("data", ["", "!!!!", "YQ", "\u00e9"])
def test_a_file_without_end(tmp_path: Path, data: str) -> None:
    """A part that brings nothing and is not the last would be asked for again for ever."""

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            await agent.get("/x", 5.0)

    result = {"data": data, "eof": False, "size": 9, "mode": 0o644}
    scenario(tmp_path, replying(ok=True, result=result), body)


def test_a_file_that_comes_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "_WHOLE_FILE", 0.1)

    async def body(agent: Agent) -> None:
        with pytest.raises(Timeout, match="has no end"):
            await agent.get("/x", 5.0)

    result = {"data": "YQ==", "eof": False, "size": 9, "mode": 0o644}
    scenario(tmp_path, replying(ok=True, result=result), body)


def test_an_answer_that_is_nested_too_deep(tmp_path: Path) -> None:
    """It does not end the connection."""
    deep = b'{"error": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}\n"

    async def body(agent: Agent) -> None:
        for _ in range(2):
            with pytest.raises(GuestError, match="nonsense"):
                await agent.ping(5.0)

    scenario(tmp_path, answering(deep), body)


def test_a_refusal_is_one_short_line(tmp_path: Path) -> None:
    """A guest's words reach logs, the API and a terminal."""

    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="refused") as caught:
            await agent.ping(5.0)
        assert caught.value.message.isprintable() and len(caught.value.message) < 5000

    error = {"code": "x", "message": "a\nb\x1b[2J" * 5000}
    scenario(tmp_path, replying(ok=False, error=error), body)


@pytest.mark.parametrize("result", [{}, {"time": None}, {"hour": 1.0}])
def test_a_clock_without_its_time(tmp_path: Path, result: dict[str, Any]) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            await agent.adjust_clock(1.0, 5.0)

    scenario(tmp_path, replying(ok=True, result=result), body)


def test_a_clock_that_is_no_number() -> None:
    """It would lie within every tolerance."""
    seen = SEEN.pack(bytes(6), bytes(4), bytes(4), float("nan")) + b"a\nb\nc\nd"
    with pytest.raises(GuestError, match="nonsense"):
        Confirmation.of(msgspec.Raw(json.dumps({"seen": seen.hex()}).encode()))


@pytest.mark.parametrize(
    "result",
    [
        {"exit_code": 1 << 70},
        {"exit_code": -1},
        {"signal": 300},
        {"exit_code": 1, "error": "\x1b[2J"},
    ],
)
def test_an_end_that_no_command_has(tmp_path: Path, result: dict[str, Any]) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(GuestError, match="nonsense"):
            async for _ in agent.exec(["x"], timeout=5.0):
                pass

    scenario(tmp_path, replying(ok=True, result=result), body)


def test_large_pieces_of_output_that_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound counts bytes, not pieces."""
    monkeypatch.setattr(guest, "MAX_UNREAD", 1 << 20)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = json.loads(await reader.readline())["id"]
        data = base64.b64encode(bytes(500_000)).decode()
        frame = {"id": number, "stream": "stdout", "data": data}
        writer.write((json.dumps(frame).encode() + b"\n") * 5)
        ping = json.loads(await reader.readline())["id"]
        writer.write(json.dumps({"id": ping, "ok": True, "result": {}}).encode() + b"\n")
        await reader.read()

    async def body(agent: Agent) -> None:
        output = agent.exec(["x"], timeout=5)
        await anext(output)
        await agent.ping(5.0)
        with pytest.raises(Busy, match="does not read"):
            async for _ in output:
                pass

    scenario(tmp_path, peer, body)


def test_a_flood_leaves_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a guest says unasked, little of it is handled at once; what it is asked for
    still comes through."""
    handled, most = 0, 0
    receive_line = Agent._receive_line

    def counted(agent: Agent, line: bytes | None) -> bool:
        nonlocal handled
        handled += 1
        return receive_line(agent, line)

    monkeypatch.setattr(Agent, "_receive_line", counted)

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"id": -1, "ok": true}\n' * 3000 + b"\n" * 20000)
        number = json.loads(await reader.readline())["id"]
        writer.write(json.dumps({"id": number, "ok": True, "result": {}}).encode() + b"\n")
        await reader.read()

    async def body(agent: Agent) -> None:
        nonlocal most
        ping = asyncio.create_task(agent.ping(15.0))
        while not ping.done():
            before = handled
            await asyncio.sleep(0)
            most = max(most, handled - before)
        await ping
        assert handled > 3000
        assert most <= 2 * TURN

    scenario(tmp_path, peer, body)


def test_a_guest_that_takes_nothing(tmp_path: Path) -> None:
    """What is sent to it is not piled up here, and the connection ends all the same."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        await ended.wait()

    async def body(agent: Agent) -> None:
        for _ in range(8):
            with pytest.raises((Timeout, GuestError)) as failed:
                await agent.request("exec", 0.05, {"stdin": "x" * 800_000})
        assert "does not take" in failed.value.message
        assert agent._writer is not None
        assert agent._writer.transport.get_write_buffer_size() < 2 * MAX_LINE
        await agent.close()
        ended.set()

    async def main() -> None:
        async with asyncio.timeout(20), talking_to(peer, tmp_path) as agent:
            await body(agent)

    ended = asyncio.Event()
    asyncio.run(main())
