"""Slots: everything that a clone needs and that can be made before anyone asks for it.

A slot has its numbers (UUID, MAC, IP, machine-id), its directories, listening sockets, network
port and disk layer 3. Some per generation are kept ready; taking one is a pop from a deque.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from pathlib import Path

from templated import failpoints
from templated.drivers import disk
from templated.drivers.cgroups import ControlGroups, Group
from templated.drivers.guest import HostKey
from templated.drivers.host.files import remove_directory
from templated.drivers.hostkeys import make_host_keys
from templated.drivers.hypervisor.base import Places
from templated.drivers.network import Network, Port
from templated.errors import HostError, TemplatedError
from templated.journal import Journal
from templated.model.clone import Slot
from templated.model.limits import UNLIMITED, Limits
from templated.model.network import Addresses, AddressPlan, Elsewhere
from templated.services.machines.admission import Admission, Promise
from templated.services.machines.vm import Vm
from templated.services.places import Layout
from templated.timing import within

log = logging.getLogger(__name__)
_RETRY_AFTER = 5.0
_APPENDED = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_LATE = 2.0
"""Seconds that one who gave up waits for a slot that is being made, to leave nothing of it."""


@dataclass(frozen=True)
class OwnNetwork:
    """A network of libvirt that a template names, and what its VMs may have of it."""

    name: str
    addresses: Addresses


@dataclass(frozen=True)
class GuestParts:
    """What the guests of some templates have beside their disk."""

    seed: Path | None = None
    """A read-only disk for cloud-init, the same for all."""
    variables: Path | None = None
    """A store of UEFI's variables, of which each VM gets a copy."""
    host_keys: bool = False
    """Each VM gets keys for its SSH server."""


@dataclass(frozen=True)
class Layer:
    """What a slot is made from: an empty overlay to copy, the layers below it, and limits."""

    generation: str
    empty: Path
    backing: tuple[Path, ...]
    """The highest first. The VM follows this and not what the overlay's header says."""
    limits: Limits = UNLIMITED
    promise: Promise | None = None
    """What the slot's VM counts for; None: for nothing, as one of a build."""
    guest: GuestParts = GuestParts()
    own_network: OwnNetwork | None = None
    """None: the daemon's."""
    groups: tuple[str, ...] = ()
    """Whose policy holds for the slot's port, as `Network.make_port` has it."""


@dataclass(frozen=True)
class Inheritance:
    """What a VM inherits: its listening sockets, and its files, by their paths."""

    control: socket.socket
    agent: socket.socket
    opened: dict[Path, int]
    """The layers of the disk, and the log of the console."""

    def close(self) -> None:
        """Close our copies. Idempotent."""
        self.control.close()
        self.agent.close()
        while self.opened:
            os.close(self.opened.popitem()[1])


@dataclass
class PreparedSlot:
    """A slot with its things, and its VM once one was started on it.

    `close` gives back the descriptors that only the parent needs.
    """

    slot: Slot
    places: Places
    overlay: Path
    port: Port
    files: Inheritance
    backing: tuple[Path, ...]
    group: Group | None
    limits: Limits
    plan: AddressPlan
    """Of the network that it is on."""
    network_name: str | None = None
    """Of libvirt's network; None: it is on the daemon's, by its port."""
    guest: GuestParts = GuestParts()
    """With the VM's own store of variables."""
    host_keys: tuple[HostKey, ...] = ()
    vm: Vm | None = None

    def close(self) -> None:
        """Close our copies; a QEMU that was started has its own."""
        self.files.close()
        self.port.close()


class Slots:
    """Makes slots, keeps some ready, and gives back what they hold."""

    def __init__(
        self,
        journal: Journal,
        layout: Layout,
        network: Network,
        plan: AddressPlan,
        groups: ControlGroups,
        admission: Admission,
        *,
        ready: int,
        capacity: int,
        stall: float,
    ) -> None:
        """`stall`: seconds that removing a slot's files and rows may take."""
        self._journal = journal
        self._layout = layout
        self._network = network
        self._plan = plan
        self._groups = groups
        self._admission = admission
        self._target = ready
        self._capacity = capacity
        self._stall = stall
        self._late: set[asyncio.Task[None]] = set()
        self._left: dict[str, Vm | None] = {}
        self._ready: dict[str, deque[PreparedSlot]] = defaultdict(deque)
        self._layers: dict[str, Layer] = {}
        self._resting: dict[str, float] = {}
        """Generations whose slots could not be made, and when to try again."""
        self._wanted = asyncio.Event()

    async def take(self, layer: Layer) -> PreparedSlot:
        """A ready slot, or one made now; the caller gives it back with `give_back`.

        Raises as `make` does.
        """
        self._wanted.set()
        waiting = self._ready.get(layer.generation)
        if not waiting:
            return await self.make(layer)
        with self._admission.entering(layer.promise) as hold:
            prepared = waiting.popleft()
            hold(prepared.slot.id)
        return prepared

    async def make(self, layer: Layer) -> PreparedSlot:
        """Make a slot with all its things, for a VM that is started now.

        Raises HostError, and Busy when the subnet has no address left or the VM would be one too
        many; leaves nothing of the slot then, nor when it is cancelled: what takes too long for
        that is given back once it is there.
        """
        with self._admission.entering(layer.promise) as hold:
            prepared = await self._prepare(layer)
            hold(prepared.slot.id)
        return prepared

    async def _prepare(self, layer: Layer) -> PreparedSlot:
        """As `make`, of a slot that counts for nothing yet."""
        # Threads cannot be cancelled, and what they make would be lost: this runs to its end.
        making = asyncio.ensure_future(self._make(layer))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            late = asyncio.create_task(self._unmake(making))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
            await asyncio.wait({late}, timeout=_LATE)
            raise

    async def _unmake(self, making: asyncio.Future[PreparedSlot]) -> None:
        """Give back a slot that nobody waits for any more, once it is made."""
        with contextlib.suppress(TemplatedError):
            await self.give_back(await making)

    async def _make(self, layer: Layer) -> PreparedSlot:
        # One thread for row and files: handing over from thread to thread costs more than either.
        slot, files = await asyncio.to_thread(self._numbered, layer)
        with contextlib.ExitStack() as undo:
            undo.callback(files.close)
            places, overlay = self._layout.vm(slot.id), self._layout.overlay(slot.id)
            try:
                keys = await make_host_keys(places.sockets) if layer.guest.host_keys else ()
                if layer.own_network is None:
                    port = await self._network.make_port(slot.id, slot.index, layer.groups)
                else:
                    port = Port(slot.id)
            except BaseException:
                await self.give_up(slot.id)
                raise
            undo.pop_all()
        guest = layer.guest
        if guest.variables is not None:
            guest = replace(guest, variables=places.variables)
        return PreparedSlot(
            slot=slot,
            places=places,
            overlay=overlay,
            port=port,
            files=files,
            backing=layer.backing,
            group=self._groups.group(slot.id),
            limits=layer.limits,
            plan=self._plan_of(layer),
            network_name=layer.own_network.name if layer.own_network else None,
            guest=guest,
            host_keys=keys,
        )

    async def drop(self, slot_id: str) -> None:
        """Give back everything that a slot holds, its journal rows last. Idempotent.

        Raises HostError or Timeout; leaves the rows then, so that it can be tried again.
        """
        async with within(self._stall, f"giving back slot {slot_id}"):
            await self._network.drop_port(slot_id)
            await asyncio.to_thread(self._forget, slot_id)
            self._admission.release(slot_id)

    async def give_back(self, prepared: PreparedSlot) -> None:
        """End the VM of a slot that gets no owner, and drop the slot; to the end, once begun.

        Raises nothing, as nobody waits for it. Leaves the slot's row when the VM does not end or
        a part cannot be removed: its address is not used again before `refill`, or the daemon's
        next start, has succeeded with that.
        """
        prepared.close()
        await self.give_up(prepared.slot.id, prepared.vm)

    async def give_up(self, slot_id: str, vm: Vm | None = None) -> None:
        """As `give_back`, of a slot that was not made to its end or is not ours."""
        await asyncio.shield(self._take_down(slot_id, vm))

    def leave(self, slot_id: str) -> None:
        """Have `refill` give back a slot whose VM has ended."""
        self._left[slot_id] = None

    async def _take_down(self, slot_id: str, vm: Vm | None) -> None:
        try:
            if vm is not None:
                await vm.destroy()
            await self.drop(slot_id)
            self._left.pop(slot_id, None)
        except (TemplatedError, OSError) as error:
            if slot_id not in self._left:
                log.warning("cannot take down slot %s, will try again: %s", slot_id, error)
            self._left[slot_id] = vm

    def serve(self, layer: Layer) -> None:
        """Keep slots of this generation ready from now on."""
        self._layers[layer.generation] = layer
        self._wanted.set()

    async def retire(self, generation: str) -> None:
        """Give back the ready slots of a generation that is not used any more.

        Raises nothing; leaves the rows of slots that cannot be given back now.
        """
        self._layers.pop(generation, None)
        self._resting.pop(generation, None)
        for prepared in self._ready.pop(generation, ()):
            await self.give_back(prepared)

    async def refill(self) -> None:
        """Keep the deques filled until cancelled.

        Raises nothing: a failure is logged, and tried again later. So are slots that could not
        be given back.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_AFTER):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                for slot_id, vm in list(self._left.items()):
                    await self.give_up(slot_id, vm)
                for layer in list(self._layers.values()):
                    if self._resting.get(layer.generation, 0.0) <= time.monotonic():
                        await self._fill(layer)
            except Exception:  # whatever it is, requests still make their own slots
                log.exception("cannot look after the slots")
                await asyncio.sleep(_RETRY_AFTER)
                self._wanted.set()

    async def _fill(self, layer: Layer) -> None:
        """Make a generation's slots ready; one whose slots fail rests, and keeps up no other."""
        generation = layer.generation
        self._resting.pop(generation, None)
        try:
            while generation in self._layers and len(self._ready[generation]) < self._target:
                prepared = await self._prepare(layer)
                if generation not in self._layers:  # retired meanwhile
                    await self.give_back(prepared)
                else:
                    self._ready[generation].append(prepared)
        except Exception as error:  # whatever it is, requests still make their own slots
            known = isinstance(error, TemplatedError)
            log.warning("cannot make slots of %s ready: %s", generation, error, exc_info=not known)
            self._resting[generation] = time.monotonic() + _RETRY_AFTER

    async def close(self) -> None:
        """Give back all ready slots, as `retire` does. Raises nothing."""
        for generation in list(self._ready):
            await self.retire(generation)
        if self._late:
            await asyncio.wait(set(self._late), timeout=_LATE)

    def _plan_of(self, layer: Layer) -> AddressPlan:
        own = layer.own_network
        return self._plan if own is None else self._plan.elsewhere(own.addresses)

    def _numbers(self, index: int, layer: Layer) -> Slot:
        return Slot(
            id=secrets.token_hex(5),
            index=index,
            generation=layer.generation,
            uuid=str(uuid.uuid4()),
            mac=self._plan.mac(index),
            ip=self._plan.ip(index),  # on another network the journal's, who knows what is free
            machine_id=uuid.uuid4().hex,
            boot_id=str(uuid.uuid4()),
        )

    def _numbered(self, layer: Layer) -> tuple[Slot, Inheritance]:
        """A slot's row, and its files; on failure `refill` removes what cannot be removed here."""
        own = layer.own_network
        slot = self._journal.new_slot(
            layer.generation,
            lambda index: self._numbers(index, layer),
            self._capacity,
            None if own is None else Elsewhere(own.name, self._plan_of(layer)),
        )
        try:
            places, overlay = self._layout.vm(slot.id), self._layout.overlay(slot.id)
            if group := self._groups.group(slot.id):
                group.make(layer.limits)
            return slot, _files(places, layer, overlay)
        except BaseException:
            self._left[slot.id] = None
            with contextlib.suppress(TemplatedError):
                self._forget(slot.id)
                self._left.pop(slot.id, None)
            raise

    def _forget(self, slot_id: str) -> None:
        if group := self._groups.group(slot_id):
            group.remove()
        _remove(self._layout.vm(slot_id))
        self._journal.drop_slot(slot_id)


def _files(places: Places, layer: Layer, overlay: Path) -> Inheritance:
    with contextlib.ExitStack() as undo:
        try:
            if failpoints.armed:
                failpoints.hit("slot.files")
            places.directory.mkdir(mode=0o700)
            places.sockets.mkdir(mode=0o700)
            disk.copy_overlay(layer.empty, overlay)
            control = undo.enter_context(_listen(places.control))
            agent = undo.enter_context(_listen(places.agent))
            files = Inheritance(control, agent, opened={})
            undo.callback(files.close)
            if failpoints.armed:
                failpoints.hit("slot.open")
            files.opened[overlay] = os.open(overlay, os.O_RDWR | os.O_CLOEXEC)
            for lower in (*layer.backing, *([layer.guest.seed] if layer.guest.seed else [])):
                files.opened[lower] = os.open(lower, os.O_RDONLY | os.O_CLOEXEC)
            if layer.guest.variables is not None:
                disk.copy_overlay(layer.guest.variables, places.variables)
                files.opened[places.variables] = os.open(places.variables, os.O_RDWR | os.O_CLOEXEC)
            files.opened[places.serial_log] = os.open(places.serial_log, _APPENDED, 0o600)
        except OSError as error:
            raise HostError(
                f"cannot prepare a slot: {error}", hint="see `templated doctor`"
            ) from error
        undo.pop_all()
        return files


def _listen(path: Path) -> socket.socket:
    """A socket that QEMU inherits: a client that connects early waits in its backlog."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if failpoints.armed:
            failpoints.hit("slot.listen")
        listener.bind(str(path))
        listener.listen(2)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove(places: Places) -> None:
    remove_directory(places.sockets)
    remove_directory(places.directory)
