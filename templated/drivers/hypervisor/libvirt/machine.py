"""One domain of libvirt as a machine: started by libvirt, and told the rest through its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from templated.drivers.host import procfs
from templated.drivers.hypervisor import process
from templated.drivers.hypervisor.base import SavedState
from templated.drivers.hypervisor.libvirt.domain import NAMESPACE, OUR_NIC, Label
from templated.drivers.hypervisor.libvirt.lending import GIVEN, Held, Lent
from templated.drivers.hypervisor.libvirt.link import Command, Link, await_migration, execute
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu.command import (
    CODE_FILE,
    CODE_SET,
    STATE_FILE,
    STATE_SET,
    UPLINK,
)
from templated.drivers.hypervisor.qemu.features import Features
from templated.drivers.hypervisor.qemu.machine import STATUSES
from templated.drivers.hypervisor.states import (
    ANSWERS,
    HELD,
    LIVE,
    STANDS,
    WAITS,
    Life,
    MachineState,
)
from templated.drivers.libvirt.connection import binding
from templated.errors import (
    Conflict,
    HostError,
    HypervisorError,
    NotFound,
    TemplatedError,
    Timeout,
)

T = TypeVar("T")
log = logging.getLogger(__name__)
_REPLY_TIMEOUT = 10.0
START_TIMEOUT = 60.0
"""Seconds in which libvirt has a VM up, or says that it has not."""
# Seconds: for libvirt to forget a domain that has ended; for a removal to wait for that, the rest
# of which is in the background; between two questions.
_FORGETS_WITHIN, _CONFIRMS_WITHIN = 10.0, 0.25
_SHORTEST, _LONGEST = 0.01, 0.5


class LibvirtMachine(Life):
    """A domain that libvirt starts, or that was found; see `base.Machine`.

    The process is watched by its pidfd and killed through it, so that a VM ends whatever libvirtd
    does. All else goes through libvirtd, and is refused while that is away.
    """

    placed = True

    def __init__(
        self, link: Link, uuid: str, label: Label, can: Features, lent: Lent, held: Held | None
    ) -> None:
        """`start` or `found` says which process it is."""
        self._link = link
        self._uuid = uuid
        self._label = label
        self._can = can
        self._lent = lent
        self._held = held
        self._first: MachineState | None = None
        self._creation: asyncio.Task[None] | None = None
        self._failed: TemplatedError | None = None
        self._process: Process | None = None
        self._taken_back: asyncio.Future[None] | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self.asked = False
        """Whether libvirt was asked to start it, so that it may come up whatever we heard; of one
        that was found, it was."""
        self._killed = self._behind = False
        self._file_size: int | None = None
        self.nic = OUR_NIC
        """How QEMU knows the NIC."""
        self.pid = 0
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def start(self, creation: Coroutine[Any, Any, None], first: MachineState) -> None:
        """Have libvirt start the domain, in a task that nobody's end ends; `first` follows."""
        self._first = first
        self._creation = asyncio.create_task(self._come_up(creation))

    def found(self, running: Process) -> None:
        """Take over the process of a domain that runs."""
        self._process, self.pid = running, running.pid
        if self._file_size is not None:
            process.limit_files(self.pid, self._file_size)
        if self._behind:
            process.background(self.pid, True)
        running.exited.add_done_callback(lambda ended: self._ended(ended.result()))
        if self._killed:
            running.kill()

    async def _come_up(self, creation: Coroutine[Any, Any, None]) -> None:
        try:
            await creation
        except Exception as error:  # noqa: BLE001 - who waits for it raises it
            failed = self._failed = self._known(error)
            if self._process is None and not self.asked:
                self._ended(f"was not started: {failed.message}")
            elif self._process is None:
                with contextlib.suppress(TemplatedError):
                    await self._make_sure(failed.message)
        finally:
            assert self._held is not None
            self._held.given()
            if self.exited.done():
                self._held.close()

    def _known(self, error: Exception) -> TemplatedError:
        if isinstance(error, TemplatedError):
            return error
        log.error("cannot start the domain %s", self._uuid, exc_info=error)
        return HypervisorError(f"its start failed: {error!r}", hint="see the log")

    def _ended(self, how: str) -> None:
        if not self.exited.done():
            self.exited.set_result(how)
            loop = asyncio.get_running_loop()
            self._taken_back = loop.run_in_executor(None, self._lent.take_back)
            # While it comes up, a thread may be handing over what is held.
            if self._held is not None and self._creation is not None and self._creation.done():
                self._held.close()

    @property
    def start_time(self) -> int:
        return self._process.start_time if self._process else 0

    async def connect(self, timeout: float) -> None:
        self._require(MachineState.SPAWNED)
        if self._creation is None:
            self._move(await self._found_state(timeout))
            return
        try:
            await self._within(asyncio.shield(self._creation), timeout, "domain of libvirt")
        except HypervisorError:  # it has ended, which is less than why
            if self._failed is None:
                raise
        if self._failed is not None:
            raise self._failed
        assert self._first is not None
        _ = self.start_time  # remembered now, as it is asked for on the start path
        self._move(self._first)

    async def _found_state(self, timeout: float) -> MachineState:
        """What an adopted VM does; HypervisorError when it is of no use."""
        said = await self._query_status(timeout)
        if said not in STATUSES:
            raise HypervisorError(f"QEMU says of its VM: {said}", hint="remove the clone")
        return STATUSES[said]

    async def expect_state(self) -> None:
        self._require(MachineState.WAITING)
        await self._execute(_IGNORE_SHARED)
        self._move(MachineState.EXPECTING)

    async def restore(self, state: SavedState, timeout: float) -> None:
        self._require(*WAITS)
        state.check()
        agreed = self.state is MachineState.EXPECTING
        self._move(MachineState.LOADING)

        def load(domain: Any) -> None:
            # Taken here: it stays held, and is closed with the rest, when this never runs.
            held = self._held.take_state() if self._held and state.fd is not None else None
            with contextlib.ExitStack() as files:
                fd = _memory_copy(state.path, held, files)
                commands = [] if agreed else [_IGNORE_SHARED]
                execute(domain, *commands, *self._migration("migrate-incoming", fd))
                await_migration(domain, "restore", timeout)

        await self._ask("restore", load, timeout)
        self._move(MachineState.PAUSED)

    def _migration(self, command: str, fd: int) -> tuple[Command, Command]:
        """Hand over the file of a state, and read or write it."""
        if self._can.file_uri:
            handed, uri = Command("add-fd", {"fdset-id": STATE_SET}, fd), f"file:{STATE_FILE}"
        else:
            handed, uri = Command("getfd", {"fdname": "state"}, fd), "fd:state"
        return handed, Command(command, {"uri": uri})

    async def resume(self) -> None:
        self._require(MachineState.PAUSED)
        await self._ask("resume", lambda domain: domain.resume())
        self._move(MachineState.RUNNING)

    async def pause(self) -> None:
        self._require(MachineState.RUNNING)
        await self._ask("suspend", lambda domain: domain.suspend())
        self._move(MachineState.PAUSED)

    async def status(self) -> MachineState | None:
        self._require(*ANSWERS)
        return STATUSES.get(await self._query_status(_REPLY_TIMEOUT))

    async def _query_status(self, timeout: float) -> str:
        command = Command("query-status")
        answer = await self._ask(command.name, lambda domain: execute(domain, command), timeout)
        return str(answer["status"]) if isinstance(answer, dict) else ""

    async def set_link(self, up: bool) -> None:
        self._require(*LIVE)
        await self._execute(Command("set_link", {"name": self.nic, "up": up}))

    async def exchange_code(self, file: Path) -> None:
        self._require(*STANDS)
        name = {"driver": "file", "node-name": "code-given", "filename": CODE_FILE}
        drive = {"driver": "raw", "node-name": "code", "read-only": True, "file": "code-given"}

        def exchange(domain: Any) -> None:
            try:
                with open(self._lent.lend_more(GIVEN, file), "rb", buffering=0) as image:
                    execute(
                        domain,
                        Command("add-fd", {"fdset-id": CODE_SET}, image.fileno()),
                        Command("blockdev-add", {**name, "read-only": True, "locking": "off"}),
                        Command("blockdev-reopen", {"options": [drive]}),
                    )
            except OSError as error:
                raise HostError(f"cannot hand {file} to QEMU: {error.strerror}") from error

        await self._ask("exchange of code", exchange)

    async def detach_network(self) -> None:
        self._require(MachineState.PAUSED)
        # A tap of libvirt's own leaves nothing in a saved state, as any tap.
        if self.nic == OUR_NIC:
            await self._execute(Command("netdev_del", {"id": UPLINK}))

    async def save(self, target: Path, timeout: float) -> None:
        self._require(MachineState.PAUSED)
        self._move(MachineState.SAVING)

        def store(domain: Any) -> None:
            try:
                with open(target, "wb", buffering=0) as file, contextlib.ExitStack() as files:
                    memory = os.memfd_create("templated-state", os.MFD_CLOEXEC)
                    files.callback(os.close, memory)
                    fd = _opened_again(memory, os.O_WRONLY, files)
                    execute(domain, _IGNORE_SHARED, *self._migration("migrate", fd))
                    await_migration(domain, "save", timeout)
                    _copy(memory, file.fileno())
            except OSError as error:
                raise HypervisorError(f"cannot write {target}: {error.strerror}") from error

        await self._ask("save", store, timeout)
        self._move(MachineState.SAVED)

    async def quit(self, timeout: float) -> None:
        self._require(*ANSWERS)
        try:
            await self._execute(Command("quit"))
        except HypervisorError:
            # libvirt sees QEMU's end before its answer, and takes that for an error.
            if not self.exited.done():
                raise
        await self._end(timeout)

    def kill(self) -> None:
        self._killed = True
        if self._process is not None and self.state is not MachineState.RELEASED:
            self._process.kill()

    async def destroy(self) -> None:
        self._require(*HELD)
        if self._creation is not None and not self._creation.done():
            self._killed = True
            await asyncio.wait({self._creation}, timeout=_REPLY_TIMEOUT)
            if not self._creation.done():
                raise Timeout("libvirt is still starting the VM", hint="see whether libvirtd hangs")
        self.kill()
        if self._process is None:
            if not self.exited.done():
                await self._make_sure("libvirt did not answer")
            await self._end(_REPLY_TIMEOUT)
            return
        await self._end(_REPLY_TIMEOUT)
        if self._confirming is None and self.asked:
            self._confirming = asyncio.create_task(self._confirm())
            await asyncio.wait({self._confirming}, timeout=_CONFIRMS_WITHIN)

    async def _confirm(self) -> None:
        """The process has ended: have libvirt end what it may have of the domain beside it.

        We know the process by its user and arguments, libvirt by its own child. It forgets a domain
        by itself, at once or when its host's init has reaped QEMU, and to ask it for that would
        take one of its turns until then. Raises nothing, as no end depends on libvirtd.
        """
        deadline, pause = time.monotonic() + _FORGETS_WITHIN, _SHORTEST
        try:
            with contextlib.suppress(NotFound):
                while time.monotonic() < deadline:
                    await self._of_domain(lambda domain: None)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST)
            await self._destroy_domain()
        except TemplatedError as error:
            log.warning("libvirt does not say that %s has ended: %s", self._uuid, error)

    async def _make_sure(self, why: str) -> None:
        """A start failed, and libvirt may have the domain all the same: see that it has not."""
        await self._destroy_domain()
        self._ended(f"was not started: {why}")

    async def _destroy_domain(self) -> None:
        """Have libvirt end the domain, unless it knows of none that runs. Raises as `Link.ask`."""
        with contextlib.suppress(NotFound, Conflict):
            await self._of_domain(lambda domain: domain.destroy())

    async def _of_domain(self, work: Callable[[Any], object]) -> None:
        await self._link.ask_domain(self._uuid, "the domain's end", work, bound=_REPLY_TIMEOUT)

    async def release(self) -> None:
        if self.state not in (MachineState.ENDED, MachineState.RELEASED):
            self._move(MachineState.RELEASED)
        if self._process is not None:
            self._process.close()
        if self._held is not None:
            self._held.close()

    def announce(self, name: str) -> None:
        label = replace(self._label, name=name)
        self._announcing = asyncio.create_task(self._announce(label))

    async def _announce(self, label: Label) -> None:
        """Show a name in the domain's title and metadata. Raises nothing: the VM runs without."""

        def work(domain: Any) -> None:
            libvirt = binding()
            live = libvirt.VIR_DOMAIN_AFFECT_LIVE
            domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, label.name, None, None, live)
            kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
            domain.setMetadata(kind, label.text(), "templated", NAMESPACE, live)

        try:
            await self._ask("metadata", work)
        except TemplatedError as error:
            if not self.exited.done():
                log.warning(
                    "libvirt does not show that %s is %s: %s", self._uuid, label.name, error
                )

    def last_words(self) -> str:
        # How a start failed is part of how it ended; what QEMU says later is in libvirt's log.
        return ""

    def cpu_seconds(self) -> float:
        return procfs.cpu_seconds(self.pid)

    def private_bytes(self) -> int:
        mapped = procfs.mapped_bytes(self.pid)
        return mapped.private if mapped else procfs.anonymous_bytes(self.pid) or 0

    def background(self, on: bool) -> None:
        self._behind = on
        if self.pid:
            process.background(self.pid, on)

    def limit_files(self, size: int) -> None:
        self._file_size = size
        if self.pid:
            process.limit_files(self.pid, size)

    async def _end(self, timeout: float) -> None:
        """Wait for the end, and for the files to be ours again; Timeout leaves it as it was."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self.exited)
        except TimeoutError:
            raise Timeout(
                f"QEMU (pid {self.pid}) did not end within {timeout:g} s",
                hint="see the host's log: a process that waits for a disk cannot be ended",
            ) from None
        if self._taken_back is not None:
            await asyncio.shield(self._taken_back)

    async def _execute(self, command: Command) -> object:
        return await self._ask(command.name, lambda domain: execute(domain, command))

    async def _ask(self, what: str, work: Callable[[Any], T], timeout: float | None = None) -> T:
        """Run `work` with the virDomain in a thread."""
        bound = _REPLY_TIMEOUT if timeout is None else timeout
        asked = self._link.ask_domain(self._uuid, f"libvirt's {what}", work, bound=bound)
        return await self._within(asked, None, what)

    async def _within(
        self, work: Coroutine[Any, Any, T] | asyncio.Future[T], timeout: float | None, what: str
    ) -> T:
        """Run `work` until it is done, the process ends, or `timeout` seconds have passed."""
        try:
            async with asyncio.timeout(timeout) as bound:
                with self._exit_expires(bound):
                    return await work
        except TimeoutError:
            if not self.exited.done():
                raise Timeout(f"no {what} within {timeout:g} s") from None
        except (Conflict, NotFound, HypervisorError) as error:
            # libvirt knows of an end a moment before or after we do.
            if not await self._ends_soon():
                raise HypervisorError(error.message) from error
        raise HypervisorError(self._ending())


_IGNORE_SHARED = Command(
    # The template's memory is a file of its own and stays out of the stream; both ends say so.
    "migrate-set-capabilities",
    {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
)


def _memory_copy(path: Path, fd: int | None, files: contextlib.ExitStack) -> int:
    """A state's content in memory, to be read. Blocks; raises HypervisorError.

    It has no path that a confinement of libvirt's (AppArmor) could know, and needs none.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        files.callback(os.close, source)
        memory = os.memfd_create("templated-state", os.MFD_CLOEXEC)
        files.callback(os.close, memory)
        _copy(source, memory)
        return _opened_again(memory, os.O_RDONLY, files)
    except OSError as error:
        raise HypervisorError(f"cannot read {path}: {error.strerror}") from error


def _opened_again(fd: int, flags: int, files: contextlib.ExitStack) -> int:
    """The same file with a position and a mode of its own: QEMU asks for that very mode."""
    again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    files.callback(os.close, again)
    return again


def _copy(source: int, target: int) -> None:
    offset, size = 0, os.fstat(source).st_size
    while offset < size:
        offset += os.sendfile(target, source, offset, size - offset)
