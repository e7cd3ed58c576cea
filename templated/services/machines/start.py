"""How one VM comes up: from a prepared slot to a guest that has confirmed its own identity.

Everything here is on the path of a clone's start. All that can be done earlier is done in
`slots` (overlay, sockets, port) and `generation` (digests, manifest, bounds).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from templated.drivers.guest import Step
from templated.drivers.hypervisor.base import Hardware, Hypervisor, Kernel, Launch, OwnLoader
from templated.drivers.network import Network
from templated.errors import HostError
from templated.model.clone import Phase, Slot
from templated.model.network import Forward, OfLibvirt
from templated.model.uids import UidRange
from templated.services.machines.clock import PhaseClock
from templated.services.machines.generation import Generation, Terms
from templated.services.machines.identify import correct_clock, identify
from templated.services.machines.slots import PreparedSlot
from templated.services.machines.vm import Vm

# Each of these names is set once before a warm VM is paused, so that its claim only runs code
# that has run before. A name that is shorter than the last one runs other code in the guest than
# a longer one, so there is one of each.
REHEARSED = ("a-name-that-is-longer-than-most-names-of-clones", "a")
REHEARSALS = 2
REST = 0.1
"""Seconds for a guest to finish its work before it is paused, so that its claim is not slower."""


@dataclass(frozen=True)
class Starter:
    """How this host brings a VM up.

    A method that raises or is cancelled leaves the VM on its slot. The slot's owner gives back
    both (`Slots.give_back`), and bounds the time of the whole.
    """

    hypervisor: Hypervisor
    network: Network
    transport: str
    confine: bool
    uids: UidRange | None
    """Each VM gets the one of its slot's index; None: all run as this process's user."""

    def launch(
        self,
        prepared: PreparedSlot,
        hardware: Hardware,
        template: str = "",
        *,
        forwards: tuple[Forward, ...] = (),
        code: Path | None = None,
    ) -> Launch:
        """The launch of a VM on a slot, with memory of its own and nothing to boot."""
        slot = prepared.slot
        return Launch(
            slot=slot.id,
            uuid=slot.uuid,
            mac=slot.mac,
            hardware=hardware,
            places=prepared.places,
            memory=None,
            memory_shared=False,
            disk=prepared.overlay,
            network=OfLibvirt(prepared.network_name)
            if prepared.network_name
            else self.network.attach(prepared.port, slot.index, forwards),
            control_fd=prepared.files.control.fileno(),
            agent_fd=prepared.files.agent.fileno(),
            code=code,
            seed=prepared.guest.seed,
            variables=prepared.guest.variables,
            confined=self.confine,
            opened=dict(prepared.files.opened),
            backing=prepared.backing,
            uid=None if self.uids is None else self.uids[slot.index],
            template=template,
            generation=slot.generation,
        )

    def user(self, slot: Slot) -> int | None:
        """Who the VM of a slot of an earlier daemon runs as, unless `uids` was another then."""
        return self.uids[slot.index] if self.uids and slot.index < self.uids.count else None

    async def spawn(
        self,
        prepared: PreparedSlot,
        generation: Generation,
        *,
        forwards: tuple[Forward, ...] = (),
        background: bool = False,
        code: Path | None = None,
    ) -> Vm:
        """A hypervisor that waits for the generation's state.

        `background` is for one that nobody waits for yet: it runs at the lowest priority, and
        prepares now what `restore` would otherwise do first. `code` is in place of the image that
        holds none, for a generation with a disk for it. Raises HostError, HypervisorError or
        Timeout.
        """
        code = code or generation.code
        launch = self.launch(
            prepared, generation.hardware, generation.template, forwards=forwards, code=code
        )
        opened = {**launch.opened, generation.memory: generation.memory_fd}
        launch = replace(launch, memory=generation.memory, opened=opened)
        state = generation.state(self.transport)
        with contextlib.ExitStack() as files:
            # Opened for each VM: who shares a descriptor shares its position, too.
            fd = _opened(state.path, files)
            state = replace(state, fd=fd)
            if self.transport == "fd":
                launch = replace(launch, state_fd=fd)
            else:
                opened[state.path] = fd
            if code is not None:
                opened[code] = _opened(code, files)
            vm = self._spawn(prepared, launch)
        if background:
            vm.machine.background(True)
        vm.state = state
        await self._connect(vm, prepared, generation.terms.start_s, background=background)
        if background:
            await vm.machine.expect_state()
        return vm

    async def direct(
        self,
        prepared: PreparedSlot,
        generation: Generation,
        hostname: str,
        clock: PhaseClock,
        *,
        forwards: tuple[Forward, ...] = (),
        code: Path | None = None,
    ) -> Vm:
        """The path `direct`: a hypervisor is started now, and restored into.

        Raises as `spawn` and `finish` do.
        """
        with clock(Phase.SPAWN):
            vm = await self.spawn(prepared, generation, forwards=forwards, code=code)
        await self.finish(vm, generation, hostname, clock)
        return vm

    async def foreground(self, prepared: PreparedSlot, vm: Vm) -> None:
        """Give a VM that `spawn` has started in the background the usual priority.

        Raises HostError.
        """
        vm.machine.background(False)
        if prepared.group is not None:
            await asyncio.to_thread(prepared.group.weigh)

    async def finish(
        self, vm: Vm, generation: Generation, hostname: str, clock: PhaseClock
    ) -> None:
        """The path `standby`, and the rest of every start: restore, identify, plug the link.

        Raises HostError, HypervisorError, GuestError, IdentityError or Timeout.
        """
        await self._restore(vm, generation, clock)
        await self._wake(vm, generation.terms, hostname, generation.lag, clock)
        with clock(Phase.LINK):
            await vm.machine.set_link(True)
        vm.machine.announce(hostname)

    async def warm(self, vm: Vm, generation: Generation, hostname: str) -> float:
        """From a hypervisor that waits for its state to a paused VM that only lacks its name.

        The guest has its slot's identity and the placeholder `hostname`, and has rehearsed what
        a claim does, which under TCG makes the next one several times faster. Returns the lag:
        seconds that the guest ran after it set the mark from which its clock will be set.
        Raises as `finish` does.
        """
        clock, terms = PhaseClock(), generation.terms
        await self._restore(vm, generation, clock)
        await self._wake(vm, terms, hostname, generation.lag, clock)
        if generation.code is not None:
            await vm.agent.rehearse_code(terms.start_s)
        for name in REHEARSED * REHEARSALS:
            at_mark = time.time() - (time.monotonic() - vm.agent.marked)
            await identify(vm, terms, name, at_mark, Step.REHEARSAL)
        await asyncio.sleep(REST)
        await vm.machine.pause()
        return time.monotonic() - vm.agent.marked

    async def claim(
        self, vm: Vm, terms: Terms, hostname: str, lag: float, clock: PhaseClock
    ) -> None:
        """The path `warm`: wake a paused VM, name it, plug its link.

        Raises HypervisorError, GuestError, IdentityError or Timeout.
        """
        await self._wake(vm, terms, hostname, lag, clock, Step.CLAIM)
        with clock(Phase.LINK):
            await vm.machine.set_link(True)
        vm.machine.announce(hostname)

    async def boot(
        self,
        prepared: PreparedSlot,
        launch: Launch,
        boot: Kernel | OwnLoader,
        terms: Terms,
        hostname: str,
        clock: PhaseClock,
        *,
        linked: bool = False,
    ) -> Vm:
        """The path `cold`, also of the base VM.

        `linked`: its link is up while it boots, and not only once it is confirmed. Raises
        HostError, HypervisorError, GuestError, IdentityError or Timeout.
        """
        with clock(Phase.SPAWN):
            with contextlib.ExitStack() as files:
                paths = [*boot.files(), *([launch.code] if launch.code else [])]
                parts = {path: _opened(path, files) for path in paths}
                launch = replace(launch, boot=boot, opened={**launch.opened, **parts})
                vm = self._spawn(prepared, launch)
            await self._connect(vm, prepared, terms.start_s)
        if not linked:
            await vm.machine.set_link(False)
        with clock(Phase.BOOT):
            await vm.boot(terms.boot_s)
        with clock(Phase.IDENTIFY):
            await identify(vm, terms, hostname, time.time())
        with clock(Phase.LINK):
            await vm.machine.set_link(True)
        vm.machine.announce(hostname)
        return vm

    def _spawn(self, prepared: PreparedSlot, launch: Launch) -> Vm:
        machine = self.hypervisor.spawn(launch)
        prepared.vm = Vm(
            prepared.slot,
            launch.places,
            machine,
            agent=launch.hardware.agent,
            host_keys=prepared.host_keys,
            plan=prepared.plan,
        )
        if prepared.limits.disk is not None:
            machine.limit_files(prepared.limits.disk)
        prepared.close()
        return prepared.vm

    async def _connect(
        self, vm: Vm, prepared: PreparedSlot, timeout: float, *, background: bool = False
    ) -> None:
        """Wait for the control channel, and meanwhile put the VM into its group.

        The kernel may take some milliseconds for that, as long as a hypervisor takes to answer;
        and memory of a VM that is in no group yet would count for nobody.
        """
        group = prepared.group
        if group is None or vm.machine.placed:
            await vm.connect(timeout)
            return
        async with _one_failure(), asyncio.TaskGroup() as tasks:
            joining = asyncio.to_thread(group.join, vm.machine.pid, background=background)
            tasks.create_task(joining)
            await vm.connect(timeout)

    async def _restore(self, vm: Vm, generation: Generation, clock: PhaseClock) -> None:
        """Load the state; the guest does not run yet."""
        assert vm.state is not None
        with clock(Phase.RESTORE):
            await vm.machine.restore(vm.state, generation.terms.start_s)

    async def _wake(
        self,
        vm: Vm,
        terms: Terms,
        hostname: str,
        lag: float,
        clock: PhaseClock,
        step: Step = Step.IDENTIFY,
    ) -> None:
        """Let a stopped guest run, and give it its identity: it finds the request waiting.

        `lag` is how long the guest ran on after its clock's mark, in seconds.
        """
        async with _one_failure(), asyncio.TaskGroup() as group:
            stopped = time.time()
            work = identify(vm, terms, hostname, stopped - lag, step)
            asking = group.create_task(work)
            with clock(Phase.RESUME):
                await vm.machine.resume()
            took = time.time() - stopped
            with clock(Phase.IDENTIFY):
                await asking
        if took > terms.clock_tolerance_s:
            # The guest's time was taken before it ran: its clock may be late by that much.
            await correct_clock(vm, terms)


def _opened(path: Path, files: contextlib.ExitStack) -> int:
    """A file that a VM inherits; closed with `files`. Raises HostError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    files.callback(os.close, descriptor)
    return descriptor


@asynccontextmanager
async def _one_failure() -> AsyncIterator[None]:
    """Raise what failed first, in place of the group that a TaskGroup makes of it."""
    try:
        yield
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several
