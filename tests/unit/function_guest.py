"""A guest with a function, without a guest: the real agent and runtime, as processes of this host.

The disk of the code is a folder. Used by the tests of the agent's functions.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from templated.drivers.guest import Agent, Output
from templated.drivers.guest_functions import Answer, InvokeOrder, Loaded, LoadOrder
from templated.guest.agent import commands
from templated.guest.agent.code import Drive
from templated.guest.agent.rehearsal import Rehearsed
from templated.guest.agent.wire import Refused
from templated.model.function import Runtime
from tests.unit.test_agent import Recorder

ROOT = Path(__file__).parents[2]
UUID = "0123456789abcdef" * 2
RESIDENT = (sys.executable, "-IB", str(ROOT / "templated/guest/runtime"))
ECHO = "def handler(event, context):\n    return event\n"
T = TypeVar("T")


class Folder(Drive):
    """A disk that is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.uuid = bytes.fromhex(UUID)
        self.calls: list[str] = []

    def attach(self, uuid: bytes | None) -> None:
        if uuid is not None and uuid != self.uuid:
            raise Refused("code", "the code is not the right one")
        self.calls.append("attach")

    def detach(self) -> None:
        self.calls.append("detach")


class Guest:
    """An agent that knows functions, in a thread; `code` is what is on its disk."""

    def __init__(self, folder: Path) -> None:
        self.code = folder / "code"
        self.code.mkdir()
        self.write("templated_rehearsal.py", ECHO)
        self.system = Recorder(folder)
        self.drive = Folder(self.code)
        self.path = folder / "agent"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        near, self._host = socket.socketpair()
        self._near = near
        near.setblocking(False)
        self.agent = commands.Agent(near.fileno(), near.fileno(), self.system)
        self.functions = Rehearsed(
            self.agent, self.drive, address=("127.0.0.1", 0), resident=RESIDENT, user=None
        )
        host, port = self.functions._server.address.split(":")
        self.address = (host, int(port))
        self._threads = [threading.Thread(target=self._serve), threading.Thread(target=self._join)]
        for thread in self._threads:
            thread.start()

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """Put a file onto the disk."""
        path = self.code / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def _serve(self) -> None:
        while not self.agent.stop:
            self.agent.turn(0.05)

    def _join(self) -> None:
        """Pass on what goes between the host's connection and the agent, as QEMU does."""
        connection, _ = self._listener.accept()

        def pump(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(1 << 16):
                target.sendall(data)

        back = threading.Thread(target=pump, args=(self._host, connection))
        back.start()
        pump(connection, self._host)
        self._host.shutdown(socket.SHUT_RDWR)
        back.join()
        connection.close()

    def close(self) -> None:
        """End all of it."""
        with socket.socket(socket.AF_UNIX) as last:
            if self._threads[1].is_alive():
                last.connect(str(self.path))
        for thread in (self._threads[1], self._threads[0]):
            self.agent.stop = not self._threads[1].is_alive()
            thread.join()
        self.functions.close()
        self.agent.close()
        self.system.close()
        for end in (self._listener, self._near, self._host):
            end.close()


@contextmanager
def functions_in(folder: Path) -> Iterator[Guest]:
    """A guest that is there meanwhile."""
    guest = Guest(folder)
    try:
        yield guest
    finally:
        guest.close()


class Caller:
    """The host's end: the real one, and what was printed."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.printed: list[Output] = []

    def text(self, stream: str = "stdout") -> str:
        """All that was printed to a stream."""
        return b"".join(one.data for one in self.printed if one.stream == stream).decode()

    async def load(self, handler: str = "app.handler", **changes: Any) -> Loaded:
        """Load a handler."""
        values = {"uuid": UUID, "runtime": Runtime.PYTHON, "env": {}, "init_timeout": 20.0}
        order = LoadOrder(**{**values, "handler": handler, **changes})
        return await self.agent.load(order, 30.0, self.printed.append)

    async def invoke(self, payload: bytes = b"{}", **changes: Any) -> Answer:
        """Invoke what was loaded."""
        values: dict[str, Any] = {
            "request": "r-1",
            "arn": "arn:x",
            "deadline_ms": 2_000_000_000_000,
        }
        order = InvokeOrder(**{**values, "payload": payload, **changes})
        return await self.agent.invoke(order, 30.0, self.printed.append)


def calling(guest: Guest, body: Callable[[Caller], Awaitable[T]]) -> T:
    """Run `body` with the host's end of the guest's agent; returns what it returns."""

    async def main() -> T:
        agent = Agent(guest.path)
        async with asyncio.timeout(60):
            await agent.connect()
            try:
                return await body(Caller(agent))
            finally:
                await agent.close()

    return asyncio.run(main())


def open_files() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
