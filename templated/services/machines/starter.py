"""The start path: from a prepared slot to a guest that has confirmed its own identity.

Everything here is on the path of a clone's start. Whatever could be done before was done in
`slots` (overlay, sockets, port) and `generations` (digests, manifest).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from templated.drivers.guest import ENTROPY_BYTES, Confirmation, IdentityOrder, Step
from templated.drivers.hypervisor.base import Hardware, Hypervisor, Kernel, Launch
from templated.drivers.network import Forward, Network
from templated.errors import IdentityError
from templated.model.clone import Phase
from templated.model.network import AddressPlan
from templated.model.spec import TemplateSpec
from templated.model.units import seconds
from templated.services.machines.generation import Generation
from templated.services.machines.slots import PreparedSlot
from templated.services.machines.vm import PhaseClock, Vm, spawn

# What a claim does, it has done before. A shorter name than the one before takes another way.
REHEARSED = ("a-name-that-is-longer-than-most-names-of-clones", "a")
REHEARSALS = 2
REST = 0.1
"""Seconds that a guest has to finish what follows, so that it need not when it is woken."""


@dataclass(frozen=True)
class Starter:
    """How this host starts VMs."""

    hypervisor: Hypervisor
    network: Network
    plan: AddressPlan
    transport: str

    def launch(
        self,
        prepared: PreparedSlot,
        hardware: Hardware,
        *,
        forwards: tuple[Forward, ...] = (),
    ) -> Launch:
        """The launch of a VM on a slot, with memory of its own and nothing to boot."""
        slot = prepared.slot
        netdev, fds = self.network.netdev(prepared.port, slot.index, forwards)
        return Launch(
            slot=slot.id,
            uuid=slot.uuid,
            mac=slot.mac,
            hardware=hardware,
            places=prepared.places,
            memory=None,
            memory_shared=False,
            disk=prepared.overlay,
            netdev=netdev,
            qmp_fd=prepared.qmp.fileno(),
            agent_fd=prepared.agent.fileno(),
            fds=fds,
        )

    async def direct(
        self,
        prepared: PreparedSlot,
        generation: Generation,
        hostname: str,
        clock: PhaseClock,
        *,
        forwards: tuple[Forward, ...] = (),
    ) -> Vm:
        """The path `direct`. On failure no process is left; the slot's things still are."""
        spec = generation.manifest.spec
        async with asyncio.timeout(start_bound(spec)), contextlib.AsyncExitStack() as undo:
            with clock(Phase.SPAWN):
                vm = await self.spawn(prepared, generation, forwards=forwards)
                undo.push_async_callback(vm.destroy)
            await self.finish(vm, generation, hostname, clock)
            undo.pop_all()
            return vm

    async def spawn(
        self,
        prepared: PreparedSlot,
        generation: Generation,
        *,
        forwards: tuple[Forward, ...] = (),
        background: bool = False,
    ) -> Vm:
        """A hypervisor that waits for the generation's state. On failure no process is left.

        `background` is for one that nobody waits for yet: it yields to all else, and is asked
        now what `restore` would else ask.
        """
        launch = self.launch(prepared, generation.hardware, forwards=forwards)
        launch = replace(launch, memory=generation.memory)
        state = generation.state(self.transport)
        with contextlib.ExitStack() as files:
            if self.transport == "fd":
                state = replace(state, fd=os.open(state.path, os.O_RDONLY | os.O_CLOEXEC))
                assert state.fd is not None
                files.callback(os.close, state.fd)
                launch = replace(launch, fds=(*launch.fds, state.fd))
            vm = self._spawn(prepared, launch)
        if background:
            vm.machine.background(True)
        vm.state = state
        try:
            await vm.connect(seconds(generation.manifest.spec.start_timeout))
            if background:
                await vm.machine.expect_state()
        except BaseException:
            await asyncio.shield(vm.destroy())
            raise
        return vm

    async def finish(
        self, vm: Vm, generation: Generation, hostname: str, clock: PhaseClock
    ) -> None:
        """From a hypervisor that waits for its state to a clone: the rest of every start.

        On failure the VM is of no more use; the caller destroys it.
        """
        spec = generation.manifest.spec
        await self._restore(vm, generation, clock)
        await self._wake(vm, spec, hostname, generation.manifest.freeze_lag_s, clock)
        with clock(Phase.LINK):
            await vm.machine.set_link(True)

    async def warm(self, vm: Vm, generation: Generation, hostname: str) -> float:
        """From a hypervisor that waits for its state to a paused VM that only lacks its name.

        The guest has its slot's identity and the placeholder `hostname`, and has rehearsed what
        a claim does, which under TCG makes the next one several times faster. Returns the lag:
        seconds that the guest ran after it set the mark which its clock will be set by.
        On failure the VM is of no more use; the caller destroys it.
        """
        spec = generation.manifest.spec
        clock = PhaseClock()
        await self._restore(vm, generation, clock)
        await self._wake(vm, spec, hostname, generation.manifest.freeze_lag_s, clock)
        for name in REHEARSED * REHEARSALS:
            await identify(vm, self.plan, spec, name, time.time(), Step.REHEARSAL)
        marked = time.monotonic()
        await asyncio.sleep(REST)
        await vm.machine.pause()
        return time.monotonic() - marked

    async def claim(
        self, vm: Vm, spec: TemplateSpec, hostname: str, lag: float, clock: PhaseClock
    ) -> None:
        """The path `warm`: wake a paused VM, name it, plug its link.

        On failure the VM is of no more use; the caller destroys it.
        """
        await self._wake(vm, spec, hostname, lag, clock, Step.CLAIM)
        with clock(Phase.LINK):
            await vm.machine.set_link(True)

    async def boot(
        self,
        prepared: PreparedSlot,
        launch: Launch,
        kernel: Kernel,
        spec: TemplateSpec,
        hostname: str,
        clock: PhaseClock,
    ) -> Vm:
        """The path `cold`, also of the base VM. On failure no process is left."""
        bound = start_bound(spec) + seconds(spec.boot_timeout)
        async with asyncio.timeout(bound), contextlib.AsyncExitStack() as undo:
            with clock(Phase.SPAWN):
                vm = self._spawn(prepared, replace(launch, boot=kernel))
                undo.push_async_callback(vm.destroy)
                await vm.connect(seconds(spec.start_timeout))
            await vm.machine.set_link(False)
            with clock(Phase.BOOT):
                await vm.boot(seconds(spec.boot_timeout))
            with clock(Phase.IDENTIFY):
                await identify(vm, self.plan, spec, hostname, time.time())
            with clock(Phase.LINK):
                await vm.machine.set_link(True)
            undo.pop_all()
            return vm

    def _spawn(self, prepared: PreparedSlot, launch: Launch) -> Vm:
        vm = spawn(self.hypervisor, prepared.slot, launch)
        prepared.close()
        return vm

    async def _restore(self, vm: Vm, generation: Generation, clock: PhaseClock) -> None:
        """Load the state; the guest does not run yet."""
        assert vm.state is not None
        timeout = seconds(generation.manifest.spec.start_timeout)
        with clock(Phase.RESTORE):
            await vm.machine.restore(vm.state, timeout)

    async def _wake(
        self,
        vm: Vm,
        spec: TemplateSpec,
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
            asking = group.create_task(identify(vm, self.plan, spec, hostname, stopped - lag, step))
            with clock(Phase.RESUME):
                await vm.machine.resume()
            took = time.time() - stopped
            with clock(Phase.IDENTIFY):
                await asking
        if took > seconds(spec.identity.clock_tolerance):
            # The guest was told the time of before it ran: it may be late by as much.
            await _correct_clock(vm, spec)


@asynccontextmanager
async def _one_failure() -> AsyncIterator[None]:
    """Raise what failed first, in place of the group that a TaskGroup makes of it."""
    try:
        yield
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several


def start_bound(spec: TemplateSpec) -> float:
    """Seconds that a start from a generation may take."""
    return seconds(spec.start_timeout) + seconds(spec.identity.timeout)


async def identify(
    vm: Vm,
    plan: AddressPlan,
    spec: TemplateSpec,
    hostname: str,
    time_at_mark: float,
    step: Step = Step.IDENTIFY,
) -> Confirmation:
    """Give the guest its identity; return only when it has read all of it back.

    `time_at_mark` is what the host's wall clock would have said when the guest set its mark, had
    the guest not been stopped since: it can tell the time from it, however long this message
    takes. Raises IdentityError, GuestError or Timeout; the VM must then be destroyed.
    """
    slot = vm.slot
    identity = IdentityOrder(
        hostname=hostname,
        machine_id=slot.machine_id,
        boot_id=slot.boot_id,
        uuid=slot.uuid,
        mac=slot.mac,
        ip=slot.ip,
        prefix=plan.prefix,
        gateway=plan.gateway,
        dns=spec.network.dns,
        step=step,
        time=time_at_mark,
        entropy=secrets.token_bytes(ENTROPY_BYTES),
    )
    sent = time.time()
    confirmed = await vm.agent.identify(seconds(spec.identity.timeout), identity)
    received = time.time()
    for key in ("hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix"):
        seen, wanted = getattr(confirmed, key), getattr(identity, key)
        if seen != wanted:
            raise IdentityError(
                f"the guest has {key} {seen!r}, not {wanted!r}",
                hint="see `templated logs` and the hooks in the guest's identity.d",
            )
    await _confirm_clock(vm, confirmed.time, sent, received, spec)
    return confirmed


async def _confirm_clock(
    vm: Vm, guest_time: float, sent: float, received: float, spec: TemplateSpec
) -> None:
    """Correct a guest's clock that is off by more than the tolerance, and check it again."""
    tolerance = seconds(spec.identity.clock_tolerance)
    error = _clock_error(guest_time, sent, received)
    for _ in range(3):
        if error <= tolerance:
            return
        sent, guest_time, received = await _shift_clock(vm, spec, received - guest_time)
        error = _clock_error(guest_time, sent, received)
    if error > tolerance:
        raise IdentityError(
            f"the guest's clock stays {error * 1000:.0f} ms off the host's",
            hint="the host may be overloaded; see identity.clock_tolerance",
        )


async def _correct_clock(vm: Vm, spec: TemplateSpec) -> None:
    """Set a guest's clock to the middle of the time around its answer, and confirm it."""
    sent, guest_time, received = await _shift_clock(vm, spec, 0.0)
    sent, guest_time, received = await _shift_clock(vm, spec, (sent + received) / 2 - guest_time)
    await _confirm_clock(vm, guest_time, sent, received, spec)


async def _shift_clock(vm: Vm, spec: TemplateSpec, shift: float) -> tuple[float, float, float]:
    """Shift a guest's clock; returns the time of asking, the guest's, and that of its answer."""
    sent = time.time()
    guest_time = await vm.agent.adjust_clock(shift, seconds(spec.identity.timeout))
    return sent, guest_time, time.time()


def _clock_error(guest_time: float, sent: float, received: float) -> float:
    """Seconds by which the guest's answer lies outside of the time it was asked in."""
    return max(sent - guest_time, guest_time - received, 0.0)
