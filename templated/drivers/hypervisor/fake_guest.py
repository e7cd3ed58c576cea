"""The guest of a fake machine: the real agent, over a kernel that only remembers.

It answers on a listening socket, as QEMU does for a guest. Errors that a test wants are put into
the answers before they are sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

from templated.guest.agent.commands import Agent
from templated.guest.agent.kernel import System
from templated.guest.agent.wire import IDENTIFY, PACKED, SEEN

_SERVED = ("ping", "identify", "clock", "quiesce")
_FUNCTION: dict[str, dict[str, Any]] = {
    "load": {"mount_ms": 1.0, "init_ms": 2.0},
    "part": {},
    "rehearse": {},
}
"""Of a function there is no more than these answers, and an `invoke` that returns its payload."""
_TEXTS = ("hostname", "machine_id", "boot_id", "uuid")


class FakeGuest:
    """One agent, and the connections to it. Must be made on a running event loop.

    `fails` is asked at every answer: identify and claim read back another `mismatch`, nonsense is
    no JSON, silence is no answer, clock stays at 1970.
    """

    def __init__(self, listener: socket.socket, fails: Callable[[], str], mismatch: str) -> None:
        self._listener, self._fails, self._mismatch = listener, fails, mismatch
        self._loop = asyncio.get_running_loop()
        self._connections: dict[socket.socket, bytearray] = {}
        self._port, self._far_end = socket.socketpair()
        for end in (listener, self._port, self._far_end):
            end.setblocking(False)
        self._agent = Agent(self._far_end.fileno(), self._far_end.fileno(), FakeSystem())
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """End the agent and its connections; the listener stays open."""
        self._loop.remove_reader(self._listener)
        for connection in list(self._connections):
            self._hang_up(connection)
        self._agent.close()
        self._port.close()
        self._far_end.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections[connection] = bytearray()
        self._loop.add_reader(connection, self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(1 << 16)
            received = self._connections[connection]
            received += data
            while (end := received.find(b"\n") + 1) > 0:
                connection.send(self._answer(bytes(received[:end])))
                del received[:end]
        except ConnectionError:
            data = b""
        if not data:
            self._hang_up(connection)

    def _hang_up(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        del self._connections[connection]
        connection.close()

    def _answer(self, line: bytes) -> bytes:
        fail = self._fails()
        if fail == "silence":
            return b""
        if not line.strip():
            return self._ask(line)
        if fail == "nonsense":
            return b"{nonsense\n"
        request = json.loads(line)
        if request["cmd"] in _FUNCTION or request["cmd"] == "invoke":
            result = _FUNCTION.get(request["cmd"], {"payload": request.get("payload", "null")})
            return json.dumps({"id": request["id"], "ok": True, "result": result}).encode() + b"\n"
        if request["cmd"] not in _SERVED:
            raise NotImplementedError("it would be done to the host")
        return self._distort(fail, request, json.loads(self._ask(line)))

    def _ask(self, line: bytes) -> bytes:
        """The agent's answer, which it gives at once; empty when it has none."""
        self._port.sendall(line)
        self._agent.turn(0)
        with contextlib.suppress(BlockingIOError):
            return self._port.recv(1 << 20)
        return b""

    def _distort(self, fail: str, request: dict[str, Any], reply: dict[str, Any]) -> bytes:
        result = reply.get("result", {})
        if "time" in result and fail == "clock":
            result["time"] = 1.0
        if "seen" in result:
            step, *_ = PACKED.unpack(bytes.fromhex(request["packed"]))
            wrong = fail == "identify" or (fail == "claim" and step != IDENTIFY)
            seen = self._see(bytes.fromhex(result["seen"]), wrong, clock=fail != "clock")
            result["seen"] = seen.hex()
        return json.dumps(reply).encode() + b"\n"

    def _see(self, seen: bytes, wrong: bool, *, clock: bool) -> bytes:
        mac, ip, netmask, now = SEEN.unpack_from(seen)
        numbers = {"mac": mac, "ip": ip, "prefix": netmask}
        texts = dict(zip(_TEXTS, seen[SEEN.size :].splitlines(), strict=True))
        if wrong:
            (numbers if self._mismatch in numbers else texts)[self._mismatch] = b"other"
        kernel = SEEN.pack(*numbers.values(), now if clock else 1.0)
        return kernel + b"\n".join(texts.values())


class FakeSystem(System):
    """A kernel that remembers the values it was given, and does nothing."""

    def __init__(self) -> None:
        self._texts: dict[str, bytes] = {}
        self._name = self._hardware = b""
        self._numbers = (b"", b"")

    def write(self, name: str, data: bytes) -> None:
        self._texts[name] = data

    def read(self, name: str) -> bytes:
        return self._texts[name]

    def forget(self) -> None:
        """It keeps its texts; the next identity replaces them."""

    def add_entropy(self, request: bytes) -> None:
        """It has no pool."""

    def set_clock(self, seconds: float) -> None:
        """Its clock is the host's."""

    def set_hostname(self, name: bytes) -> None:
        self._name = name

    def hostname(self) -> bytes:
        return self._name + b"\n"

    def set_mac(self, mac: bytes) -> None:
        self._hardware = mac

    def mac(self) -> bytes:
        return self._hardware

    def set_address(self, ip: bytes, prefix: bytes, gateway: bytes) -> None:
        self._numbers = (ip, IPv4Network((0, prefix[0])).netmask.packed)

    def clear_address(self) -> None:
        self._numbers = (b"", b"")

    def address(self) -> tuple[bytes, bytes]:
        return self._numbers

    def hooks(self) -> list[str]:
        return []

    def sync(self) -> None:
        """It has no disk."""
