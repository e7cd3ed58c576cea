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
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace

from templated.drivers.guest import ENTROPY_BYTES, Confirmation, Identity
from templated.drivers.hypervisor.base import Hardware, Hypervisor, Kernel, Launch
from templated.drivers.network import Forward, Network
from templated.errors import IdentityError
from templated.model.clone import Phase
from templated.model.network import AddressPlan
from templated.model.spec import TemplateSpec
from templated.model.units import seconds
from templated.services.generations import Generation
from templated.services.slots import PreparedSlot
from templated.services.vm import PhaseClock, Vm, spawn

Spawned = Callable[[Vm], Coroutine[None, None, None]]
"""Called as soon as the process exists, to write its pid down."""


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

    async def restore(
        self,
        prepared: PreparedSlot,
        generation: Generation,
        hostname: str,
        clock: PhaseClock,
        spawned: Spawned,
        *,
        forwards: tuple[Forward, ...] = (),
    ) -> Vm:
        """The path `direct`. On failure no process is left; the slot's things still are."""
        launch = self.launch(prepared, generation.hardware, forwards=forwards)
        launch = replace(launch, memory=generation.memory)
        state = generation.state(self.transport)
        with contextlib.ExitStack() as files:
            if self.transport == "fd":
                state = replace(state, fd=os.open(state.path, os.O_RDONLY))
                assert state.fd is not None
                files.callback(os.close, state.fd)
                launch = replace(launch, fds=(*launch.fds, state.fd))
            spec = generation.manifest.spec
            lag = generation.manifest.freeze_lag_s

            async def wake(vm: Vm) -> float:
                with clock(Phase.RESTORE):
                    await vm.machine.restore(state, seconds(spec.start_timeout))
                with clock(Phase.RESUME):
                    await vm.machine.resume()
                    return time.time() - lag

            return await self._bring_up(prepared, launch, spec, hostname, clock, spawned, wake)

    async def boot(
        self,
        prepared: PreparedSlot,
        launch: Launch,
        kernel: Kernel,
        spec: TemplateSpec,
        hostname: str,
        clock: PhaseClock,
        spawned: Spawned,
    ) -> Vm:
        """The path `cold`, also of the base VM. On failure no process is left."""

        async def wake(vm: Vm) -> float:
            with clock(Phase.BOOT):
                await vm.boot(seconds(spec.boot_timeout))
            return time.time()

        launch = replace(launch, boot=kernel)
        return await self._bring_up(prepared, launch, spec, hostname, clock, spawned, wake)

    async def _bring_up(
        self,
        prepared: PreparedSlot,
        launch: Launch,
        spec: TemplateSpec,
        hostname: str,
        clock: PhaseClock,
        spawned: Spawned,
        wake: Callable[[Vm], Awaitable[float]],
    ) -> Vm:
        async with (
            asyncio.timeout(_bound(spec, launch.boot is not None)),
            contextlib.AsyncExitStack() as undo,
        ):
            with clock(Phase.SPAWN):
                vm = spawn(self.hypervisor, prepared.slot, launch)
                undo.push_async_callback(vm.destroy)
                prepared.close()
                await _connected(vm, spec, spawned)
            if launch.boot is not None:
                await vm.machine.set_link(False)
            resumed_at = await wake(vm)
            with clock(Phase.IDENTIFY):
                await identify(vm, self.plan, spec, hostname, resumed_at)
            with clock(Phase.LINK):
                await vm.machine.set_link(True)
            undo.pop_all()
            return vm


async def _connected(vm: Vm, spec: TemplateSpec, spawned: Spawned) -> None:
    """Write the process down while its control channel comes up; raises what failed first."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(spawned(vm))
            await vm.connect(seconds(spec.start_timeout))
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several


def _bound(spec: TemplateSpec, boots: bool) -> float:
    """Seconds that a whole start may take."""
    start = seconds(spec.start_timeout) + seconds(spec.identity.timeout)
    return start + (seconds(spec.boot_timeout) if boots else 0.0)


async def identify(
    vm: Vm, plan: AddressPlan, spec: TemplateSpec, hostname: str, resumed_at: float
) -> Confirmation:
    """Give the guest its identity; return only when it has read all of it back.

    `resumed_at` is the host's wall clock when the guest's own clock ran on, so that the guest
    can tell the time from it without counting how long this message took.
    Raises IdentityError, GuestError or Timeout; the VM must then be destroyed.
    """
    slot = vm.slot
    identity = Identity(
        hostname=hostname,
        machine_id=slot.machine_id,
        boot_id=slot.boot_id,
        uuid=slot.uuid,
        mac=slot.mac,
        ip=slot.ip,
        prefix=plan.prefix,
        gateway=plan.gateway,
        dns=spec.network.dns,
        time=resumed_at,
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
        sent = time.time()
        guest_time = await vm.agent.adjust_clock(
            received - guest_time, seconds(spec.identity.timeout)
        )
        received = time.time()
        error = _clock_error(guest_time, sent, received)
    if error > tolerance:
        raise IdentityError(
            f"the guest's clock stays {error * 1000:.0f} ms off the host's",
            hint="the host may be overloaded; see identity.clock_tolerance",
        )


def _clock_error(guest_time: float, sent: float, received: float) -> float:
    """Seconds by which the guest's answer lies outside of the time it was asked in."""
    return max(sent - guest_time, guest_time - received, 0.0)
