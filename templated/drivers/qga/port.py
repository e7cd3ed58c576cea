"""The protocol of the QEMU guest agent: one command at a time, answered in turn.

It has no numbers: an answer belongs to the command before it. So whenever one was not waited for
to its end, the two ends agree anew on where they are. Source: QEMU's docs/interop/qemu-ga-ref and
qga/qapi-schema.json (`guest-sync-delimited`), of 7.2 and 10.0.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from templated.drivers.guest_functions import converted
from templated.drivers.pace import READ, TURN, Lines, Pace
from templated.drivers.port import close_port, open_port
from templated.errors import GuestError, UnfitAgent
from templated.timing import within

T = TypeVar("T")
MAX_REPLY = 4 << 20
"""Bytes; an answer is one line, also with all that a command printed."""
_DELIMITER = b"\xff"
_LATE = 1 << 20
"""Bytes that a guest may be behind with what it was sent before."""


class _Refusal(msgspec.Struct, frozen=True):
    desc: str = "no reason given"
    kind: str = msgspec.field(default="", name="class")


class _Reply(msgspec.Struct, frozen=True):
    answer: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b""), name="return")
    error: _Refusal | None = None


_decoder = msgspec.json.Decoder(_Reply)


class GaPort:
    """A connection to one qemu-ga. `close` ends it; every wait is bounded by the caller."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = asyncio.Lock()
        self._agreed = False
        self._sync: bytes | None = None
        """While both ends agree anew: the only answer that counts."""
        self._reply: asyncio.Future[_Reply] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._broken = "the agent's connection is closed"

    async def connect(self) -> None:
        """Connect to the hypervisor's end of the port; GuestError when it is not there."""
        reader, self._writer = await open_port(self._path)
        self._agreed = False
        work = self._receive(reader, cast(asyncio.Transport, self._writer.transport))
        self._receiver = asyncio.create_task(work, name=f"qemu-ga {self._path}")

    @property
    def connected(self) -> bool:
        """Whether its end of the port is open, as far as is known."""
        return self._receiver is not None and not self._receiver.done()

    async def close(self) -> None:
        """End the connection; a command under way fails with GuestError. Idempotent."""
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait({self._receiver})
        if self._writer is not None:
            await close_port(self._writer)
            self._writer = None

    async def agree(self, timeout: float) -> None:
        """Have the agent answer, whatever it was asked before. Raises as `command` does."""
        async with _answered("guest-sync-delimited", timeout), self._turn:
            self._agreed = False
            await self._agree()

    async def command(self, name: str, kind: type[T], timeout: float, **arguments: object) -> T:
        """Give the agent a command, and return its answer; `_` in names stands for `-`.

        Raises Timeout after `timeout` seconds, UnfitAgent when the agent does not take this
        command, GuestError when the command fails or the connection ends.
        """
        body: dict[str, Any] = {"execute": name}
        if arguments:
            body["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        async with _answered(name, timeout), self._turn:
            if not self._agreed:
                await self._agree()
            self._agreed = False  # until the answer is here
            reply = await self._exchange(msgspec.json.encode(body))
            self._agreed = True
        if reply.error is None:
            return converted(reply.answer, kind)
        if reply.error.kind == "CommandNotFound":
            raise forbidden(name)
        raise GuestError(f"the guest's agent refused {name}: {reply.error.desc}")

    async def _agree(self) -> None:
        """Pass over all that the agent still says of earlier commands.

        The delimiter ends what of an earlier command it has in part.
        """
        number = secrets.randbelow(1 << 30)
        self._sync = str(number).encode()
        body = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        try:
            await self._exchange(_DELIMITER + msgspec.json.encode(body))
        finally:
            self._sync = None
        self._agreed = True

    async def _exchange(self, line: bytes) -> _Reply:
        if self._writer is None or not self.connected:
            raise GuestError(self._broken)
        if self._writer.transport.get_write_buffer_size() >= _LATE:
            raise GuestError("the guest does not take what it was sent before")
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(line + b"\n")
            await self._writer.drain()
            return await self._reply
        except OSError as error:
            raise GuestError(f"the agent's connection broke: {error}") from error
        finally:
            self._reply = None

    async def _receive(
        self, reader: asyncio.StreamReader, transport: asyncio.ReadTransport
    ) -> None:
        pace, lines = Pace(transport), Lines(MAX_REPLY)
        try:
            while data := await reader.read(READ):
                with pace.work(self._reply is not None) as work:
                    waiting = lines.feed(data)
                    work.lines += 1
                while waiting:
                    with pace.work(True) as work:
                        for line in waiting[:TURN]:
                            work.asked &= self._take(line)
                    del waiting[:TURN]
                    await pace.rest()
                await pace.rest()
            self._broken = "the agent's connection was closed by the hypervisor"
        except OSError as error:
            self._broken = f"the agent's connection broke: {error}"
        finally:
            self._fail(self._broken)

    def _take(self, line: bytes | None) -> bool:
        """Handle a line; whether it was asked for."""
        if self._reply is None or self._reply.done():
            return False
        try:
            if line is None:
                raise ValueError(f"it is longer than {MAX_REPLY >> 20} MiB")
            reply = _decoder.decode(line.rpartition(_DELIMITER)[2])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            if self._sync is None:
                self._fail(f"the agent answered nonsense: {error}")
            return False
        if self._sync is not None and bytes(reply.answer) != self._sync:
            return False
        self._reply.set_result(reply)
        return True

    def _fail(self, why: str) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(GuestError(why))


def _answered(name: str, timeout: float) -> AbstractAsyncContextManager[None]:
    return within(timeout, f"the guest agent's answer to {name}")


def forbidden(name: str) -> UnfitAgent:
    """The error for an agent that does not take a command that is needed."""
    return UnfitAgent(
        f"the guest's agent does not allow {name}",
        hint="allow it in the guest: block-rpcs or allow-rpcs of /etc/qemu/qemu-ga.conf or "
        "/etc/sysconfig/qemu-ga; then restart qemu-guest-agent and build the template again",
    )
