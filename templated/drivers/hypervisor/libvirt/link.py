"""A connection to libvirt that is opened when it is needed, and QEMU's monitor behind it.

virDomainQemuMonitorCommandWithFiles (libvirt 8.2, https://libvirt.org/html/libvirt-libvirt-qemu.html)
hands QEMU one descriptor with a QMP command, over libvirtd's unix socket: so a VM gets what its own
user, and libvirt's confinement, would not let it open.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from templated.drivers.libvirt.connection import Connection, connect_async
from templated.errors import HypervisorError, Timeout
from templated.timing import within

T = TypeVar("T")

_SHORTEST, _LONGEST = 0.001, 0.05


class Link:
    """A connection that outlives libvirtd: it is opened with the first call, and again later."""

    def __init__(self, uri: str) -> None:
        """Nothing is opened yet."""
        self._uri = uri
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()

    async def ask(self, what: str, work: Callable[[Any], T], *, bound: float) -> T:
        """Run `work` with a virConnect in a thread, and return what it returns.

        `work` may run twice, when libvirtd was restarted since the last call. `bound` in seconds is
        for opening, for a turn and for the call, each. Raises as `Connection.ask`, and HostError
        when nothing answers.
        """
        connection = await self._opened(bound)
        try:
            return await connection.ask(what, work, bound=bound)
        except HypervisorError:
            # That libvirtd has closed a connection shows in the next call only.
            if connection.alive:
                raise
        return await (await self._opened(bound)).ask(what, work, bound=bound)

    async def ask_domain(
        self, uuid: str, what: str, work: Callable[[Any], T], *, bound: float
    ) -> T:
        """As `ask`, with a virDomain; `work` runs once at most. NotFound when there is none."""
        begun = False

        def run(connection: Any) -> T:
            nonlocal begun
            if begun:
                raise HypervisorError(f"{what}: libvirtd ended meanwhile")
            domain = connection.lookupByUUIDString(uuid)
            begun = True
            return work(domain)

        return await self.ask(what, run, bound=bound)

    async def _opened(self, bound: float) -> Connection:
        if self._connection is not None and self._connection.alive:
            return self._connection
        if (loop := asyncio.get_running_loop()) is not self._loop:
            self._loop, self._opening = loop, asyncio.Lock()
        async with within(2 * bound, f"the wait for a connection to {self._uri}"), self._opening:
            if self._connection is None or not self._connection.alive:
                self._connection = await connect_async(self._uri, bound=bound)
            return self._connection


@dataclass(frozen=True)
class Command:
    """A QMP command, and a descriptor that goes with it: QEMU gets a duplicate."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    fd: int | None = None


def execute(domain: Any, *commands: Command) -> Any:
    """Run QMP commands in turn through a virDomain, and return what the last one returned. Blocks.

    Raises libvirtError, and HypervisorError when QEMU refuses one; those after it do not run.
    """
    qemu, returned = importlib.import_module("libvirt_qemu"), None
    for command in commands:
        text = json.dumps({"execute": command.name, "arguments": command.arguments})
        files = [] if command.fd is None else [command.fd]
        said, _ = qemu.qemuMonitorCommandWithFiles(domain, text, files)
        answer = json.loads(said)
        if "error" in answer:
            raise HypervisorError(f"QEMU refused the {command.name}: {answer['error']['desc']}")
        returned = answer.get("return")
    return returned


def await_migration(domain: Any, what: str, timeout: float) -> None:
    """Wait until QEMU has loaded or saved its state, which it is at already. Blocks.

    By asking: an event would need libvirt's own event loop beside ours. Raises as `execute`,
    HypervisorError when it failed, and Timeout.
    """
    deadline, pause = time.monotonic() + timeout, _SHORTEST
    while (status := execute(domain, Command("query-migrate")).get("status")) != "completed":
        if status in ("failed", "cancelled"):
            raise HypervisorError(f"QEMU reports that the state {status}")
        if time.monotonic() > deadline:
            raise Timeout(f"no {what} within {timeout:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
