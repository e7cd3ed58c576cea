"""libvirt as one more way to start QEMU: what `hypervisor: libvirt` in a template asks for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from templated.drivers.host import procfs
from templated.drivers.hypervisor.base import Launch, Places
from templated.drivers.hypervisor.libvirt.domain import (
    SERIAL_BUS,
    Label,
    domain_xml,
    memory_options,
    nic_of,
)
from templated.drivers.hypervisor.libvirt.lending import MEMORY, Held, Lent, User, fill, hold
from templated.drivers.hypervisor.libvirt.link import Command, Link, execute
from templated.drivers.hypervisor.libvirt.machine import START_TIMEOUT, LibvirtMachine
from templated.drivers.hypervisor.libvirt.network import addresses_of
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu.command import AGENT_PORTS, UPLINK
from templated.drivers.hypervisor.qemu.features import features
from templated.drivers.hypervisor.states import MachineState
from templated.drivers.libvirt.connection import binding
from templated.errors import HostError, HypervisorError, NotFound, TemplatedError, host_errors
from templated.model.network import Addresses, Tap

_MARK = "domain.xml"
"""In a VM's directory: that libvirt has started it, and what it was told."""
_BOUND, _PAUSE = 10.0, 0.05


@dataclass(frozen=True)
class LentPlaces:
    """Where VMs are lent files: below state_dir, and below shm_dir for their memory."""

    disk: Path
    memory: Path

    def of(self, uuid: str) -> Lent:
        """Those of one VM."""
        return Lent(self.disk / uuid, self.memory / uuid)


class Libvirt:
    """Starts and finds transient domains, which libvirt forgets when they end.

    Two connections: starting a domain takes long, and what others ask must not wait for that.
    """

    def __init__(self, uri: str, places: LentPlaces) -> None:
        """`uri` is of a libvirt on this host. Nothing is connected before a VM is started."""
        self._starts, self._asks = Link(uri), Link(uri)
        self._places = places
        self._user: tuple[User | None] | None = None

    def sweep(self) -> None:
        """Remove what is lent to VMs that have ended, as those of an earlier daemon. Blocks."""
        lent = {path.name for path in _entries(self._places.disk, self._places.memory)}
        running = {uuid for uuid, _ in procfs.with_argument(lent)}
        for uuid in lent - running:
            self._places.of(uuid).take_back()

    @staticmethod
    def has(places: Places) -> bool:
        """Whether the VM of a slot was started by libvirt."""
        # False, too, of a directory that cannot be entered: nothing was started in that.
        return os.path.exists(places.directory / _MARK)

    async def addresses(self, network: str) -> Addresses:
        """See `base.Hypervisor.addresses`."""

        def work(connection: Any) -> tuple[str, bool]:
            found = connection.networkLookupByName(network)
            return found.XMLDesc(), bool(found.isActive())

        try:
            xml, active = await self._asks.ask("libvirt's network", work, bound=_BOUND)
        except NotFound:
            raise HostError(
                f"libvirt has no network {network}", hint="see: virsh net-list --all"
            ) from None
        if not active:
            hint = f"virsh net-start {network}; net-autostart {network} does it at each boot"
            raise HostError(f"network {network} of libvirt is not active", hint=hint)
        return addresses_of(network, xml)

    def describe(self, launch: Launch, emulator: str) -> tuple[str, ...]:
        """The domain's XML, line by line."""
        lent = self._places.of(launch.uuid)
        return tuple(domain_xml(launch, emulator, lent, None, _options(launch, lent)).splitlines())

    def spawn(self, launch: Launch, emulator: str) -> LibvirtMachine:
        """Have a domain started, and return at once. Raises HostError; nothing runs then.

        Its pid is known, and how its start failed, once `connect` returns.
        """
        tap = launch.network.fd if isinstance(launch.network, Tap) else None
        held, lent = hold(launch, tap), self._places.of(launch.uuid)
        label = Label(launch.slot, launch.template, launch.generation)
        can = features(launch.hardware.version)
        machine = LibvirtMachine(self._asks, launch.uuid, label, can, lent, held)
        machine.nic = nic_of(launch)
        first = MachineState.WAITING if launch.boot is None else MachineState.RUNNING
        machine.start(self._start(machine, launch, emulator, held, lent), first)
        return machine

    def adopt(self, pid: int, start_time: int, places: Places, uuid: str) -> LibvirtMachine | None:
        """See `base.Hypervisor.adopt`."""
        if not _runs(pid, uuid, places):
            return None
        found = Process.adopt(pid, start_time, uuid)
        if found is None:
            return None
        lent, label = self._places.of(uuid), Label(places.directory.name, "", "")
        # Which QEMU it is nobody needs to know any more: it neither loads nor saves a state.
        machine = LibvirtMachine(self._asks, uuid, label, features(""), lent, None)
        machine.asked = True
        machine.found(found)
        return machine

    async def settle(self, places: Mapping[str, Places]) -> None:
        """Wait for domains that an earlier daemon asked for and libvirt is still starting.

        Ten seconds at most. Raises nothing: where libvirt does not answer, it starts nothing.
        """
        asked = {uuid for uuid, where in places.items() if self.has(where)}
        deadline = time.monotonic() + _BOUND
        with contextlib.suppress(TemplatedError):
            while asked and time.monotonic() < deadline:
                running = await asyncio.to_thread(procfs.with_argument, asked)
                asked -= {uuid for uuid, pid in running if _runs(pid, uuid, places[uuid])}
                work = partial(_known, asked=asked)
                asked = await self._asks.ask("libvirt's domains", work, bound=_BOUND)
                if asked:
                    await asyncio.sleep(_PAUSE)

    async def _start(
        self, machine: LibvirtMachine, launch: Launch, emulator: str, held: Held, lent: Lent
    ) -> None:
        """From the launch to a domain that stands, or boots. Raises TemplatedError.

        A domain that is there then is the machine's, whatever failed after that.
        """
        user = await self._run_as()
        xml = domain_xml(launch, emulator, lent, user, _options(launch, lent))
        target = await asyncio.to_thread(_lend, launch, held, lent, user, xml)
        create = partial(_create, xml=xml, machine=machine)
        async with _filling(target, held, launch):
            await self._starts.ask("the domain's start", create, bound=START_TIMEOUT)
            uid = user.uid if user else os.geteuid()
            found = await asyncio.to_thread(_found, launch.uuid, uid)
            running = Process.adopt(*found, launch.uuid) if found else None
            if running is None:
                raise HypervisorError("the VM ended as soon as libvirt had started it")
            machine.found(running)
            setup = partial(_set_up, launch=launch, held=held)
            await self._asks.ask_domain(launch.uuid, "the domain's sockets", setup, bound=_BOUND)
        await asyncio.to_thread(lent.forget_memory)

    async def _run_as(self) -> User | None:
        """Whom libvirt runs QEMU as; None: this process's own user."""
        if self._user is None:
            text = await self._starts.ask(
                "libvirt's capabilities", lambda c: c.getCapabilities(), bound=START_TIMEOUT
            )
            self._user = (user_of(text),)
        return self._user[0]


def user_of(capabilities: str) -> User | None:
    """Whom QEMU is run as, by libvirt's capabilities (https://libvirt.org/formatcaps.html).

    None when it changes nobody's rights: it runs VMs as its own user then, who is ours.
    """
    told = ET.fromstring(capabilities)  # noqa: S314 - by libvirtd, which is root
    for model in told.iter("secmodel"):
        label = model.findtext("baselabel") or ""
        found = re.fullmatch(r"\+(\d+):\+(\d+)", label)
        if model.findtext("model") == "dac" and found:
            return User(int(found[1]), int(found[2]))
    return None


def _copies(launch: Launch) -> bool:
    """Whether the VM gets a copy of the memory: QEMU before 8.2 opens it for writing, too."""
    shared = launch.memory is None or launch.memory_shared
    return not shared and not features(launch.hardware.version).read_only_memory


def _options(launch: Launch, lent: Lent) -> str:
    if launch.memory is None:
        return ""
    shared = launch.memory_shared or _copies(launch)
    size = launch.hardware.memory_bytes
    return memory_options(lent.path(MEMORY), size, shared=shared, read_only=not shared)


def _lend(launch: Launch, held: Held, lent: Lent, user: User | None, xml: str) -> int | None:
    """Mark the VM as libvirt's, and lend its files; the descriptor of an empty memory file, where
    a copy is wanted. Blocks; raises HostError."""
    with host_errors(f"cannot write {launch.places.directory / _MARK}"):
        (launch.places.directory / _MARK).write_text(xml)
    if not _copies(launch):
        lent.lend(held.files, user)
        return None
    lent.lend({name: fd for name, fd in held.files.items() if name != MEMORY}, user)
    return lent.lend_copy(launch.hardware.memory_bytes, user)


def _create(connection: Any, *, xml: str, machine: LibvirtMachine) -> None:
    # A closed connection shows here, before anything was asked for.
    connection.getLibVersion()
    if machine.asked:
        raise HypervisorError("libvirtd ended while it started the VM")
    machine.asked = True
    connection.createXML(xml, binding().VIR_DOMAIN_START_PAUSED)


def _runs(pid: int, uuid: str, places: Places) -> bool:
    """Whether a process is a domain's, and not one of anybody who names it. Blocks for a moment."""
    try:
        started = ET.parse(places.directory / _MARK)  # noqa: S314 - we wrote it
    except (OSError, ET.ParseError):
        return False
    label = re.fullmatch(r"\+(\d+):\+\d+", started.findtext("seclabel/label") or "")
    return procfs.has_option(pid, "-uuid", uuid, int(label[1]) if label else os.geteuid())


@asynccontextmanager
async def _filling(target: int | None, held: Held, launch: Launch) -> AsyncIterator[None]:
    """Fill a VM's own memory beside what is done in here: QEMU touches none of it before it has a
    state. Raises HostError at the end.
    """
    if target is None:
        yield
        return
    size = launch.hardware.memory_bytes
    copying = asyncio.gather(
        asyncio.to_thread(fill, held.files[MEMORY], target, size), return_exceptions=True
    )
    try:
        yield
    finally:
        (failed,) = await copying
    if failed is not None:
        raise failed


def _found(uuid: str, uid: int) -> tuple[int, int] | None:
    """Pid and start time of a domain's process, by whom libvirt runs it as. Blocks."""
    pid = procfs.newest_with_option("-uuid", uuid, uid)
    started = None if pid is None else procfs.start_time(pid)
    return None if pid is None or started is None else (pid, started)


def _set_up(domain: Any, *, launch: Launch, held: Held) -> None:
    """Give a domain that stands what libvirt could not: the agent's port, whose socket is ours, and
    a tap of ours, by their descriptors. No guest has looked yet, so they are as if always there.
    """
    address = {"type": "fd", "data": {"str": "agent"}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    port = {"driver": "virtserialport", "id": "agent0", "bus": SERIAL_BUS, "nr": 1}
    name = AGENT_PORTS[launch.hardware.agent]
    execute(
        domain,
        Command("getfd", {"fdname": "agent"}, held.agent),
        Command("chardev-add", {"id": "agent", "backend": backend}),
        Command("device_add", {**port, "chardev": "agent", "name": name}),
    )
    if held.tap is not None:
        hub = {"type": "hubport", "id": "hub0", "hubid": 0, "netdev": UPLINK}
        execute(
            domain,
            Command("getfd", {"fdname": "tap"}, held.tap),
            Command("netdev_add", {"type": "tap", "id": UPLINK, "fd": "tap"}),
            Command("netdev_add", hub),
        )
    if launch.boot is not None:
        domain.resume()


def _known(connection: Any, *, asked: set[str]) -> set[str]:
    """Those of some UUIDs that libvirt has a domain of."""
    known = set()
    for uuid in asked:
        with contextlib.suppress(binding().libvirtError):
            connection.lookupByUUIDString(uuid)
            known.add(uuid)
    return known


def _entries(*directories: Path) -> list[Path]:
    return [path for directory in directories if directory.is_dir() for path in directory.iterdir()]
