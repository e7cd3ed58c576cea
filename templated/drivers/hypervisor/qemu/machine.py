"""QEMU, by QMP. QMP reference: QEMU 7.2, "QEMU QMP Reference Manual"."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from templated import failpoints
from templated.drivers.host import procfs
from templated.drivers.hypervisor import process
from templated.drivers.hypervisor.base import Places, SavedState
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu.command import (
    CODE_FILE,
    CODE_SET,
    STATE_FILE,
    STATE_SET,
    UPLINK,
)
from templated.drivers.hypervisor.qemu.features import Features
from templated.drivers.hypervisor.states import (
    ANSWERS,
    HELD,
    LIVE,
    STANDS,
    WAITS,
    Life,
    MachineState,
)
from templated.errors import HostError, HypervisorError, Timeout

T = TypeVar("T")
log = logging.getLogger(__name__)
_REPLY_TIMEOUT = 10.0
# Bytes of QMP that may wait to be read, which is more than any answer has.
_READ_LIMIT = 256 << 10
# Events that are read before a look at the time, and in a second; and how many more than usual in a
# second there may be before it is a flood: for five seconds at the pace.
_EVENTS, _PACE, _USUAL, _FLOOD = 64, 2000, 1000, 5000
# The states that QEMU reports of a VM (RunState of its QMP reference) in which it can be used.
STATUSES = {
    "inmigrate": MachineState.WAITING,
    "paused": MachineState.PAUSED,
    "running": MachineState.RUNNING,
    # The event that tells the end of a save may come before the state that follows.
    "finish-migrate": MachineState.SAVED,
    "postmigrate": MachineState.SAVED,
}
# Bytes at the end of the log that are searched for its last line, and characters of that line.
_LOG_END, _LINE = 2000, 300
# The library reports an unexpected disconnect as critical; here it is how a VM's end looks.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class _Client(QMPClient):
    """The library's client, without its debug log: it would format every message for nothing.

    Events that nobody listens for are passed over unread, and at a pace: a guest causes some of
    them as often as it likes, and the library would keep each for ever. What is not read grows in
    QEMU. So for one that causes them without end, `flooded` is called.
    """

    def __init__(self, name: str, flooded: Callable[[], None]) -> None:
        super().__init__(name, _READ_LIMIT)
        self._flooded = flooded
        self._passed, self._since, self._level = 0, time.monotonic(), 0.0

    async def _do_recv(self) -> Message:
        while _passed_over(line := await self._readline()):
            self._passed += 1
            if self._passed % _EVENTS == 0:
                await self._rest()
        return Message(line, eager=True)

    async def _rest(self) -> None:
        """Take as long for the last events as they may take."""
        took = time.monotonic() - self._since
        await asyncio.sleep(max(0.0, _EVENTS / _PACE - took))
        before, self._since = self._since, time.monotonic()
        self._level = max(0.0, self._level + _EVENTS - (self._since - before) * _USUAL)
        if self._level > _FLOOD:
            self._level = 0.0
            self._flooded()

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def send_fd(self, fd: int) -> None:
        """Send a descriptor, for a `getfd` that follows. The library's own needs asyncio's loop."""
        assert self._writer is not None
        number = os.dup(self._writer.get_extra_info("socket").fileno())
        with socket.socket(fileno=number) as connection:
            # QEMU's parser skips the space; nothing else is under way on an idle connection.
            socket.send_fds(connection, [b" "], [fd])

    def _get_exec_id(self) -> str:
        # QEMU takes some 4 us for each byte that it reads of QMP.
        self._execute_id += 1
        return str(self._execute_id)


class QemuMachine(Life):
    """One QEMU process and its QMP connection."""

    placed = False

    def __init__(
        self, child: Process, places: Places, can: Features, first: MachineState | None
    ) -> None:
        """`first` is what its VM does once it is connected; None: QEMU is asked for it."""
        self._process = child
        self._places = places
        self._can = can
        self._first = first
        self._qmp = _Client(places.sockets.name, self._end_flood)
        self.pid = child.pid
        self.exited = child.exited

    @property
    def start_time(self) -> int:
        return self._process.start_time

    async def connect(self, timeout: float) -> None:
        self._require(MachineState.SPAWNED)
        await self._guarded(self._qmp.connect(str(self._places.control)), timeout, "QMP greeting")
        _ = self.start_time  # remembered now: execve is over, so nobody waits for it
        try:
            self._move(self._first or await self._found())
        except BaseException:
            await self._disconnect()  # so that it can be tried again
            raise

    async def expect_state(self) -> None:
        self._require(MachineState.WAITING)
        await self._ignore_shared_memory()
        self._move(MachineState.EXPECTING)

    async def restore(self, state: SavedState, timeout: float) -> None:
        self._require(*WAITS)
        state.check()
        agreed = self.state is MachineState.EXPECTING
        self._move(MachineState.LOADING)
        uri = incoming_uri(state, self._can)
        async with self._migration_events() as events:
            commands = [] if agreed else [self._ignore_shared_memory()]
            commands.append(self._migrate_incoming(uri))
            # QEMU takes them one by one: no need to wait for the answers in between.
            await asyncio.gather(*commands)
            await self._guarded(self._completed(events), timeout, "restore")
        self._move(MachineState.PAUSED)

    async def resume(self) -> None:
        self._require(MachineState.PAUSED)
        await self._execute("cont")
        self._move(MachineState.RUNNING)

    async def pause(self) -> None:
        self._require(MachineState.RUNNING)
        await self._execute("stop")
        self._move(MachineState.PAUSED)

    async def status(self) -> MachineState | None:
        self._require(*ANSWERS)
        return STATUSES.get(await self._query_status())

    async def set_link(self, up: bool) -> None:
        self._require(*LIVE)
        await self._execute("set_link", {"name": "nic0", "up": up})

    async def exchange_code(self, file: Path) -> None:
        self._require(*STANDS)
        try:
            with open(file, "rb", buffering=0) as image:
                self._qmp.send_fd(image.fileno())
        except OSError as error:
            raise HostError(f"cannot hand {file} to QEMU: {error.strerror}") from error
        name = {"driver": "file", "node-name": "code-given", "filename": CODE_FILE}
        drive = {"driver": "raw", "node-name": "code", "read-only": True, "file": "code-given"}
        # One after the other in QEMU, so none waits here for the answer to the one before.
        await asyncio.gather(
            self._execute("add-fd", {"fdset-id": CODE_SET}),
            self._execute("blockdev-add", {**name, "read-only": True, "locking": "off"}),
            self._execute("blockdev-reopen", {"options": [drive]}),
        )

    async def detach_network(self) -> None:
        self._require(MachineState.PAUSED)
        await self._execute("netdev_del", {"id": UPLINK})

    async def save(self, target: Path, timeout: float) -> None:
        self._require(MachineState.PAUSED)
        self._move(MachineState.SAVING)
        await self._ignore_shared_memory()
        uri = await self._handed(target)
        async with self._migration_events() as events:
            await self._execute("migrate", {"uri": uri})
            await self._guarded(self._completed(events), timeout, "save")
        self._move(MachineState.SAVED)

    async def _handed(self, target: Path) -> str:
        """Hand a file to QEMU by its descriptor, and return how `migrate` knows it.

        QEMU itself may be unable to open the path, as a user of its own.
        """
        try:
            with open(target, "wb", buffering=0) as file:
                self._qmp.send_fd(file.fileno())
                if self._can.file_uri:
                    await self._execute("add-fd", {"fdset-id": STATE_SET})
                    return f"file:{STATE_FILE}"
                await self._execute("getfd", {"fdname": "state"})
                return "fd:state"
        except OSError as error:
            raise HypervisorError(f"cannot hand {target} to QEMU: {error.strerror}") from error

    async def quit(self, timeout: float) -> None:
        self._require(*ANSWERS)
        await self._execute("quit")
        await self._end(timeout)

    def kill(self) -> None:
        self._process.kill()

    async def destroy(self) -> None:
        self._require(*HELD)
        self.kill()
        await self._end(_REPLY_TIMEOUT)

    async def release(self) -> None:
        if self.state not in (MachineState.ENDED, MachineState.RELEASED):
            self._move(MachineState.RELEASED)
        await self._disconnect()
        self._process.close()

    def announce(self, name: str) -> None:
        """Nobody looks at QEMU itself."""

    def last_words(self) -> str:
        try:
            with open(self._places.log, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_END))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip()[:_LINE] if lines else ""

    def cpu_seconds(self) -> float:
        return procfs.cpu_seconds(self.pid)

    def private_bytes(self) -> int:
        mapped = procfs.mapped_bytes(self.pid)
        # The kernel shows another user's mappings only to who may trace it.
        return mapped.private if mapped else procfs.anonymous_bytes(self.pid) or 0

    def background(self, on: bool) -> None:
        process.background(self.pid, on)

    def limit_files(self, size: int) -> None:
        process.limit_files(self.pid, size)

    def _end_flood(self) -> None:
        log.error("QEMU %d is ended: its guest causes events without end", self.pid)
        self.kill()

    async def _end(self, timeout: float) -> None:
        """Wait for the end of the process, and release it; Timeout leaves it as it was."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self.exited)
        except TimeoutError:
            raise Timeout(
                f"QEMU (pid {self.pid}) did not end within {timeout:g} s",
                hint="see the host's log: a process that waits for a disk cannot be ended",
            ) from None
        await self._disconnect()

    async def _found(self) -> MachineState:
        """What the VM of an adopted process does; HypervisorError when it is of no use."""
        said = await self._query_status()
        if said not in STATUSES:
            raise HypervisorError(f"QEMU says of its VM: {said}", hint="remove the clone")
        return STATUSES[said]

    async def _query_status(self) -> str:
        answer = await self._execute("query-status")
        return str(answer["status"]) if isinstance(answer, dict) else ""

    async def _disconnect(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._qmp.disconnect()
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # the connection has ended, whatever the reason

    async def _ignore_shared_memory(self) -> None:
        """The template's memory is a shared file and stays out of the stream; both ends say so."""
        capability = {"capability": "x-ignore-shared", "state": True}
        await self._execute("migrate-set-capabilities", {"capabilities": [capability]})

    async def _migrate_incoming(self, uri: str) -> None:
        await self._execute("migrate-incoming", {"uri": uri})

    @asynccontextmanager
    async def _migration_events(self) -> AsyncIterator[EventListener]:
        with self._qmp.listener("MIGRATION") as events:
            yield events

    async def _completed(self, events: EventListener) -> None:
        async for event in events:
            data = event["data"]
            status = data["status"] if isinstance(data, dict) else None
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                words = self.last_words()
                why = f": {words}" if words else ""
                raise HypervisorError(f"QEMU reports that the state {status}{why}")

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        log.debug("QEMU %d is asked: %s %s", self.pid, command, arguments or "")
        return await self._guarded(self._qmp.execute(command, arguments), _REPLY_TIMEOUT, command)

    async def _guarded(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        """Run `work` until it is done, the process ends, or `timeout` seconds have passed."""
        if failpoints.armed:
            work = failpoints.around(f"qmp.{what.split()[-1]}", work)
        try:
            async with asyncio.timeout(timeout) as bound:
                with self._exit_expires(bound):
                    return await work
        except TimeoutError:
            if not self.exited.done():
                raise Timeout(f"no {what} within {timeout:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            # A connection breaks a moment before the process is seen to end.
            if isinstance(error, ExecuteError) or not await self._ends_soon():
                raise HypervisorError(f"QEMU refused the {what}: {error}") from error
        raise HypervisorError(self._ending())


def _passed_over(line: bytes) -> bool:
    """Whether it is an event that nobody listens for; QEMU writes `timestamp` first."""
    return line.startswith(b'{"timestamp"') and b'"event": "MIGRATION"' not in line


def incoming_uri(state: SavedState, can: Features) -> str:
    """Where QEMU reads a saved state from: the argument of `migrate-incoming`."""
    if state.transport != "fd":
        inherited = f"/proc/$PPID/fd/{state.fd}"
        return f"exec:exec cat {shlex.quote(str(state.path)) if state.fd is None else inherited}"
    return f"file:{STATE_FILE}" if can.file_uri else f"fd:{state.fd}"
