"""The host's end of the agent in the guest: newline JSON over a virtio serial port.

Requests carry an id and may overlap; `exec` streams its output before its reply. The agent's own
end is `templated/guest/agent`.
"""

from __future__ import annotations

import asyncio
import base64
import enum
import itertools
import math
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec

from templated import failpoints
from templated.drivers.guest_functions import (
    Answer,
    InvokeOrder,
    Loaded,
    LoadOrder,
    converted,
    keep_part,
)
from templated.drivers.pace import MAX_LINE, READ, TURN, Lines, Pace
from templated.drivers.port import close_port, open_port
from templated.errors import Busy, GuestError, InvalidRequest, TemplatedError, Timeout
from templated.guest.agent.wire import CLAIM, IDENTIFY, PACKED, REHEARSAL, SEEN

CHUNK = 32768
MAX_FILE = 64 << 20
ENTROPY_BYTES = 64
# Output, in bytes, that waits for a slow reader before it is given up; a piece has its own size.
MAX_UNREAD = 32 << 20
_PIECE = 64
# Seconds for all parts of a file; each has the caller's bound.
_WHOLE_FILE = 600.0
Sink = Callable[["Output"], None]
"""Gets the output of a command, or of a function, as it comes."""


class Output(msgspec.Struct, frozen=True):
    """A piece of the output of a command in the guest."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a command in the guest ended. One of `exit_code` and `signal` is set."""

    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, msgspec.Meta(ge=1, le=127)] | None = None
    timed_out: bool = False
    # A word: it reaches a terminal.
    error: Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,40}$(?!\n)")] | None = None


class _Clock(msgspec.Struct, frozen=True):
    """The agent's reply to a shift of its clock, in seconds since the epoch."""

    time: float


class _Seen(msgspec.Struct, frozen=True):
    """The agent's reply to an identify: the wire's SEEN and four lines, in hex."""

    seen: str


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the guest read back after it applied an identity."""

    hostname: str
    machine_id: str
    boot_id: str
    uuid: str
    mac: str
    ip: str
    prefix: int
    time: float
    """The guest's wall clock at its answer, seconds since the epoch."""
    asked: float = 0.0
    """The host's, when the guest was asked for that; 0: when it was asked for all of it."""

    @classmethod
    def of(cls, raw: msgspec.Raw) -> Confirmation:
        """Read the agent's reply; GuestError when it is none."""
        try:
            seen = bytes.fromhex(converted(raw, _Seen).seen)
            mac, ip, netmask, clock = SEEN.unpack_from(seen)
            hostname, machine_id, boot_id, uid = seen[SEEN.size :].decode().splitlines()
            if not math.isfinite(clock):
                raise ValueError("its clock is no number")
        except (ValueError, struct.error) as error:
            raise GuestError(f"the agent answered nonsense: {error}") from error
        return cls(
            hostname=hostname,
            machine_id=machine_id,
            boot_id=boot_id,
            uuid=uid,
            mac=mac.hex(":"),
            ip=str(IPv4Address(ip)),
            prefix=int.from_bytes(netmask).bit_count(),
            time=clock,
        )


@dataclass(frozen=True)
class HostKey:
    """A key of an SSH server: `kind` as in ssh_host_KIND_key, and its two files."""

    kind: str
    private: str = field(repr=False)
    public: str


class Step(enum.Enum):
    """How much of an identity a guest is given."""

    IDENTIFY = IDENTIFY
    """All of it."""
    REHEARSAL = REHEARSAL
    """What a claim gives, without the hooks, before the guest is paused."""
    CLAIM = CLAIM
    """Name, time and entropy, to a guest that has the rest."""


@dataclass(frozen=True, kw_only=True)
class IdentityOrder:
    """All that makes a guest unique; `time` is the wall clock at its last mark, in seconds."""

    step: Step = Step.IDENTIFY
    hostname: str
    machine_id: str
    boot_id: str
    uuid: str
    mac: str
    ip: str
    prefix: int
    gateway: str | None
    dns: Sequence[str]
    time: float
    entropy: bytes
    host_keys: Sequence[HostKey] = ()
    """For a guest with an SSH server, as far as its agent can replace them."""

    def fields(self) -> dict[str, str]:
        """The request's only field; PACKED says what it holds."""
        texts = {
            "hostname": self.hostname,
            "machine_id": self.machine_id,
            "boot_id": self.boot_id,
            "uuid": self.uuid,
            "mac": self.mac,
            "ip": self.ip,
        }
        count = len(self.entropy)
        packed = PACKED.pack(
            self.step.value,
            struct.pack("<ii", count * 8, count) + self.entropy,
            self.time,
            bytes.fromhex(self.mac.replace(":", "")),
            IPv4Address(self.ip).packed,
            bytes([self.prefix]),
            IPv4Address(self.gateway or 0).packed,
            self.hostname.encode().ljust(64),
            f"127.0.0.1 localhost\n{self.ip} {self.hostname}".encode().ljust(128),
            self.machine_id.encode(),
            self.boot_id.encode(),
            self.uuid.encode(),
            "\n".join(f"nameserver {server}" for server in self.dns).encode().ljust(256),
            msgspec.json.encode(texts).ljust(384),
        )
        return {"packed": packed.hex()}


class FileChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a file in the guest."""

    data: str
    eof: bool
    size: int
    mode: int


class _Reply(msgspec.Struct, frozen=True):
    id: int | None = None
    ok: bool | None = None
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: dict[str, Any] | None = None
    stream: Literal["stdout", "stderr", "payload"] | None = None
    data: str = ""


class _Pending:
    """A request under way: its reply, and where its output goes, and the parts of a payload."""

    def __init__(self, sink: Sink | None, parts: bytearray | None) -> None:
        self.reply: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        # It may come when nobody waits for it any more, and is no news then.
        self.reply.add_done_callback(lambda reply: reply.cancelled() or reply.exception())
        self.sink = sink
        self.parts = parts


_decoder = msgspec.json.Decoder(_Reply)


class Agent:
    """A connection to one guest's agent. `close` ends it; every wait is bounded by the caller.

    The socket is QEMU's, so connecting says nothing about the guest; only a reply does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not from 1: a late reply to an earlier connection must not match a request of this one.
        self._ids = itertools.count(secrets.randbelow(1 << 30))
        self._pending: dict[int, _Pending] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._receiver: asyncio.Task[None] | None = None
        self.marked = time.monotonic()
        self.asked = time.time()
        self._broken: str = "the agent's connection is closed"

    async def connect(self) -> None:
        """Connect to QEMU's end of the port; GuestError when it is not there."""
        reader, self._writer = await open_port(self._path)
        # The first newline ends a line that an earlier connection left half-written. The second
        # tells the agent that this connection is new.
        self._writer.write(b"\n\n")
        work = self._receive(reader, cast(asyncio.Transport, self._writer.transport))
        self._receiver = asyncio.create_task(work, name=f"agent {self._path}")

    @property
    def connected(self) -> bool:
        """Whether its end of the port is open, as far as is known."""
        return self._receiver is not None and not self._receiver.done()

    @property
    def absence(self) -> str:
        """What may be wrong with a guest whose agent never answers."""
        return ""

    async def close(self) -> None:
        """End the connection; requests under way fail with GuestError."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait({self._receiver})
        if self._writer is not None:
            await close_port(self._writer)
            self._writer = None

    async def request(
        self,
        command: str,
        timeout: float,
        arguments: dict[str, Any] | None = None,
        sink: Sink | None = None,
        parts: bytearray | None = None,
    ) -> msgspec.Raw:
        """Send one request and wait for its reply, at most `timeout` seconds.

        `sink` gets its output, `parts` what belongs to its reply and comes before it.
        Raises Timeout, or GuestError when the agent reports an error, when the guest does not take
        what it was sent before, or when the connection ends.
        """
        if self._writer is None or not self.connected:
            raise GuestError(self._broken)
        number = next(self._ids)
        body = msgspec.json.encode({"id": number, "cmd": command, **(arguments or {})})
        if len(body) >= MAX_LINE:
            raise InvalidRequest(
                f"{command} is too large for one message to the guest",
                hint=f"at most {MAX_LINE >> 20} MiB fit, base64 included; use `templated cp`",
            )
        if self._writer.transport.get_write_buffer_size() >= MAX_LINE:
            raise GuestError("the guest does not take what it was sent before")
        pending = self._pending[number] = _Pending(sink, parts)
        try:
            async with asyncio.timeout(timeout):
                if failpoints.armed:
                    await failpoints.reach(f"agent.{command}")
                self._writer.write(body + b"\n")
                await self._writer.drain()
                return await pending.reply
        except TimeoutError:
            raise Timeout(f"the guest did not answer {command!r} within {timeout:g} s") from None
        except OSError as error:
            raise GuestError(f"the agent's connection broke: {error}") from error
        finally:
            self._pending.pop(number, None)

    async def ping(self, timeout: float) -> None:
        await self.request("ping", timeout)

    async def settle(self, timeout: float) -> None:
        """Nothing: it starts when all of that is done."""

    async def identify(self, timeout: float, identity: IdentityOrder) -> Confirmation:
        """Give the guest its identity; returns the identity that it then reads back."""
        raw = await self.request("identify", timeout, identity.fields())
        self.marked = time.monotonic()
        return Confirmation.of(raw)

    async def adjust_clock(self, seconds: float, timeout: float) -> float:
        """Shift the guest's wall clock; returns its time after that."""
        self.asked = time.time()
        raw = await self.request("clock", timeout, {"adjust": seconds})
        return converted(raw, _Clock).time

    async def quiesce(self, timeout: float) -> None:
        """Prepare the guest to be frozen: address dropped, file systems synced."""
        await self.request("quiesce", timeout)
        self.marked = time.monotonic()

    async def exec(
        self,
        argv: list[str],
        *,
        timeout: float,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
    ) -> AsyncGenerator[Output | ExecResult, None]:
        """Run a command in the guest: its output as it comes, and at last how it ended.

        The agent ends the command after `timeout` seconds; the wait here ends a little later. When
        the caller stops earlier, the command goes on. Raises what `request` raises, and Busy when
        the caller does not read the output; then the command goes on too.
        """
        arguments: dict[str, Any] = {"argv": argv, "timeout": timeout, "env": env or {}}
        if stdin:
            arguments["stdin"] = base64.b64encode(stdin).decode()
        unread: asyncio.Queue[Output | None] = asyncio.Queue()
        waiting = 0

        def keep(output: Output) -> None:
            nonlocal waiting
            if waiting > MAX_UNREAD:
                raise Busy("the client does not read the command's output")
            waiting += len(output.data) + _PIECE
            unread.put_nowait(output)

        request = asyncio.create_task(self.request("exec", timeout + 5.0, arguments, keep))
        request.add_done_callback(lambda _: unread.put_nowait(None))
        try:
            while (output := await unread.get()) is not None:
                waiting -= len(output.data) + _PIECE
                yield output
            yield converted(await request, ExecResult)
        finally:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    async def put(self, path: str, content: bytes, mode: int, timeout: float) -> None:
        """Write a file in the guest; it appears under its name only when it is complete."""
        offset = 0
        while True:
            chunk = content[offset : offset + CHUNK]
            eof = offset + len(chunk) >= len(content)
            data = base64.b64encode(chunk).decode()
            part = {
                "path": path,
                "mode": mode,
                "data": data,
                "offset": offset,
                "eof": eof,
            }
            await self.request("put", timeout, part)
            offset += len(chunk)
            if eof:
                return

    async def get(self, path: str, timeout: float) -> bytes:
        """Read a file of the guest. Its parts come within `timeout` seconds each."""
        content = bytearray()
        try:
            async with asyncio.timeout(_WHOLE_FILE):
                while not await self._get_part(path, timeout, content):
                    if len(content) > MAX_FILE:
                        raise GuestError(f"{path} in the guest has more than {MAX_FILE >> 20} MiB")
        except TimeoutError:
            raise Timeout(f"{path} in the guest has no end after {_WHOLE_FILE:g} s") from None
        return bytes(content)

    async def _get_part(self, path: str, timeout: float, content: bytearray) -> bool:
        """Add the next part of a file; whether it was the last."""
        part = {"path": path, "offset": len(content), "length": CHUNK}
        chunk = converted(await self.request("get", timeout, part), FileChunk)
        try:
            data = base64.b64decode(chunk.data, validate=True)
        except ValueError as error:
            raise GuestError(f"the agent answered nonsense: {error}") from error
        if not data and not chunk.eof:
            raise GuestError("the agent answered nonsense: a part of a file that is empty")
        content += data
        return chunk.eof

    async def load(self, order: LoadOrder, timeout: float, sink: Sink | None = None) -> Loaded:
        """Attach a function's code and start it; `sink` gets what it prints meanwhile.

        Raises InitFailed when the function did not come up, and what `request` raises, also when
        the code cannot be attached or is not the right one.
        """
        parts = bytearray()
        return Loaded.of(await self.request("load", timeout, order.fields(), sink, parts), parts)

    async def invoke(self, order: InvokeOrder, timeout: float, sink: Sink | None = None) -> Answer:
        """Give the function one request, and wait for its answer, at most `timeout` seconds.

        `sink` gets what was printed since the last one. Raises InvalidRequest for a payload that
        cannot be sent, and what `request` raises. A part of a large payload has `timeout`, too.
        """
        for part in order.parts():
            await self.request("part", timeout, part)
        parts = bytearray()
        raw = await self.request("invoke", timeout, order.fields(), sink, parts)
        return Answer.of(raw, parts)

    async def rehearse_code(self, timeout: float) -> None:
        """Do once what a function's start and a request do, with the code that is there.

        That is the placeholder; nothing of it is left. Raises what `request` raises.
        """
        await self.request("rehearse", timeout)

    async def _receive(
        self, reader: asyncio.StreamReader, transport: asyncio.ReadTransport
    ) -> None:
        pace, lines = Pace(transport), Lines()
        try:
            while data := await reader.read(READ):
                with pace.work(bool(self._pending)) as work:
                    waiting = lines.feed(data)
                    work.lines += 1
                while waiting:
                    with pace.work(True) as work:
                        for line in waiting[:TURN]:
                            asked = self._receive_line(line)
                            work.asked &= asked
                            work.lines += asked
                    del waiting[:TURN]
                    await pace.rest()
                await pace.rest()
            self._broken = "the agent's connection was closed by the hypervisor"
        except OSError as error:
            self._broken = f"the agent's connection broke: {error}"
        finally:
            self._fail_pending(self._broken)

    def _receive_line(self, line: bytes | None) -> bool:
        """Handle a line; whether it was asked for. A bad one fails only the requests under way."""
        try:
            if line is None:
                raise ValueError(f"a line is longer than {MAX_LINE >> 20} MiB")
            return self._dispatch(_decoder.decode(line))
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._fail_pending(f"the agent answered nonsense: {error}")
            return False

    def _fail_pending(self, why: str) -> None:
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(GuestError(why))

    def _dispatch(self, reply: _Reply) -> bool:
        """Give a line to who waits for it; false when nobody does, or not any more."""
        pending = self._pending.get(reply.id) if reply.id is not None else None
        if pending is None or pending.reply.done():
            return False
        if reply.stream is not None:
            try:
                self._stream(pending, reply.stream, base64.b64decode(reply.data))
            except TemplatedError as error:  # the receiver refuses more output
                pending.reply.set_exception(error)
        elif reply.ok:
            pending.reply.set_result(reply.result)
        else:
            message = (reply.error or {}).get("message", "no reason given")
            pending.reply.set_exception(GuestError(f"the guest's agent refused: {message}"))
        return True

    def _stream(self, pending: _Pending, stream: str, data: bytes) -> None:
        if stream == "payload":
            if pending.parts is None:
                raise GuestError("the agent answered nonsense: a payload that nobody asked for")
            keep_part(pending.parts, data)
        elif pending.sink is not None:
            pending.sink(Output("stdout" if stream == "stdout" else "stderr", data))
