"""How a clone starts: one start of one clone, from its request to its confirmed identity.

    warm      a paused VM of the pool is woken and named
    standby   a hypervisor of the pool, which waits for its state, is restored, woken and named
    direct    a hypervisor is started on a slot, restored, woken and named
    cold      a VM boots from its image, as the template's base VM did

`Start.run` tries them in turn, the fastest first, unless one was demanded. All that a way takes is
on one exit stack: when it fails, everything is given back before the next one is tried. A clone
exists as soon as its row is in the journal, which is after its guest has confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from templated import failpoints
from templated.drivers.cgroups import Group
from templated.errors import (
    Busy,
    Conflict,
    GuestError,
    HostError,
    HypervisorError,
    TemplatedError,
    Timeout,
    host_errors,
)
from templated.journal import CloneRow
from templated.model.clone import CloneState, Phase, StartPath
from templated.model.limits import Limits
from templated.model.policy import PolicyOwner
from templated.services.clones.clone import Running, Starting, started
from templated.services.context import Context
from templated.services.machines.boot import full_boot, image_overlay, image_parts
from templated.services.machines.clock import PhaseClock
from templated.services.machines.slots import Layer, PreparedSlot
from templated.services.machines.vm import Vm
from templated.services.pools.members import Member, Pools
from templated.services.templates.catalog import Templates
from templated.timing import within

FASTEST_FIRST = (StartPath.WARM, StartPath.STANDBY, StartPath.DIRECT)
_TRIES = {StartPath.WARM: 3, StartPath.STANDBY: 3}
"""Members of a tier that one request tries before it takes another way."""
Undo = contextlib.AsyncExitStack


class _NoneReady(Busy):
    """A pool has no member now."""


@dataclass(frozen=True)
class Turns:
    """How many starts run at once. Claims are short, so they have a queue of their own."""

    claims: asyncio.Semaphore
    starts: asyncio.Semaphore


@dataclass
class Start:
    """One start of one clone. `run` does it, once."""

    context: Context
    templates: Templates
    pools: Pools
    turns: Turns
    clone: Starting
    clock: PhaseClock

    async def run(self, demanded: StartPath | None) -> Running:
        """Bring the clone up by the fastest way that works, or by the one demanded.

        Raises the error of the last way, a TemplatedError: Busy when a pool was demanded that has
        no member. Leaves nothing of the clone then, neither a row nor a VM nor a slot.
        """
        failed: TemplatedError | None = None
        for path in (demanded,) if demanded else FASTEST_FIRST:
            for _ in range(_TRIES.get(path, 1)):
                if failed is not None:
                    self.clock.again()
                try:
                    return await self._by(path)
                except _NoneReady as error:
                    failed = failed or error
                    break
                except HostError:  # the disk, a frozen file: another way would fail as well
                    raise
                except TemplatedError as error:
                    failed = error
        assert failed is not None
        raise failed

    async def _by(self, path: StartPath) -> Running:
        way: Callable[[Undo], Awaitable[Vm]] = getattr(self, path.value)
        self.clone.path = path
        async with contextlib.AsyncExitStack() as undo:
            try:
                with host_errors():  # no descriptor left, a full disk
                    vm = await way(undo)
            except (HypervisorError, GuestError, Timeout) as error:
                raise await self._explained(error) from error
            if failpoints.armed:
                failpoints.hit("start.confirmed")
            row = self._row(vm)
            await self.context.journal.new_clone(row)
            if failpoints.armed:
                failpoints.hit("start.recorded")
            undo.pop_all()
        return started(self.clone, row, vm)

    async def _explained(self, error: TemplatedError) -> TemplatedError:
        """The error, with the limit that has ended the VM."""
        slot = self.clone.slot
        group = self.context.groups.group(slot.id) if slot else None
        cause = await asyncio.to_thread(over_memory, group, self.clone.limits)
        return type(error)(f"{error.message}{cause}", hint=error.hint) if cause else error

    # --- the ways -----------------------------------------------------------------------------
    # Each raises HostError, HypervisorError, GuestError, IdentityError or Timeout, and leaves
    # what it took on `undo`.

    async def warm(self, undo: Undo) -> Vm:
        """Wake and name a paused VM."""
        member = await self._member(StartPath.WARM, undo)
        generation, starter = self.clone.generation, self.context.starter
        async with self.turns.claims, _bound(generation.terms.identify_s):
            await self.templates.check(generation, loads_state=False)
            self.clock.allotted()
            await self._attach(member.vm)
            await starter.claim(
                member.vm, generation.terms, self.clone.name, member.lag, self.clock
            )
        return member.vm

    async def standby(self, undo: Undo) -> Vm:
        """Restore into a hypervisor that waits for it."""
        member = await self._member(StartPath.STANDBY, undo)
        generation, starter = self.clone.generation, self.context.starter
        async with self.turns.claims, _bound(generation.terms.restored_s):
            await self.templates.check(generation, loads_state=True)
            self.clock.allotted()
            await self._attach(member.vm)
            await starter.finish(member.vm, generation, self.clone.name, self.clock)
        return member.vm

    async def direct(self, undo: Undo) -> Vm:
        """Start a hypervisor, and restore into it."""
        generation, starter = self.clone.generation, self.context.starter
        async with self.turns.starts, _bound(generation.terms.restored_s):
            await self.templates.check(generation, loads_state=True)
            prepared = await self._slot(generation.layer, undo)
            await self._police()
            self.clock.allotted()
            return await starter.direct(
                prepared, generation, self.clone.name, self.clock, code=self._code
            )

    async def cold(self, undo: Undo) -> Vm:
        """Boot from the image."""
        generation, starter = self.clone.generation, self.context.starter
        manifest, terms = generation.manifest, generation.terms
        image = self.context.images.get(manifest.image)
        if image is None:
            raise HostError(
                f"image {manifest.image} is gone",
                hint=f"run: templated template build {generation.template}",
            )
        async with self.turns.starts, _bound(terms.booted_s):
            empty = await image_overlay(self.context.layout, image)
            # Not a layer that slots are kept ready for.
            layer = replace(
                generation.layer,
                generation=f"cold-{image.digest}",
                empty=empty,
                backing=(image.disk,),
                guest=image_parts(self.context.hypervisor, image, manifest.spec),
            )
            prepared = await self._slot(layer, undo)
            code = self._code or generation.code
            launch = starter.launch(prepared, generation.hardware, generation.template, code=code)
            boot = full_boot(self.context.hypervisor, image, manifest.spec, manifest.accel)
            self.clock.allotted()
            return await starter.boot(prepared, launch, boot, terms, self.clone.name, self.clock)

    @property
    def _code(self) -> Path | None:
        return self.clone.code.path if self.clone.code else None

    async def _attach(self, vm: Vm) -> None:
        """Put a function's code behind the second disk of a VM that stands, and its port under
        the function's policy; one beside the other."""
        if self._code is None:
            return
        with self.clock(Phase.ATTACH):
            exchanged = vm.machine.exchange_code(self._code)
            # Both come to their end: what one has taken is given back when nothing is under way.
            for error in await asyncio.gather(exchanged, self._police(), return_exceptions=True):
                if error is not None:
                    raise error

    async def _police(self) -> None:
        """Hold the port of a function's instance to the function's policy, before it runs.

        Raises Conflict when the template's VMs have no port of the daemon's, and it has one.
        """
        clone, policies = self.clone, self.context.policies
        if not clone.function:
            return
        name = clone.function.partition(":")[0]
        if clone.generation.own_network is not None:
            if policies.keys(PolicyOwner("function", name)).any:
                raise Conflict(f"VMs of {clone.template} are on a network without policies")
            return
        assert clone.slot is not None
        groups = await policies.hold(name, clone.template)
        await self.context.network.move_port(clone.slot.id, groups)

    # --- what they take -----------------------------------------------------------------------

    async def _slot(self, layer: Layer, undo: Undo) -> PreparedSlot:
        prepared = await self.context.slots.take(layer)
        if failpoints.armed:
            failpoints.hit("start.taken")
        undo.push_async_callback(self.context.slots.give_back, prepared)
        self.clone.slot = prepared.slot
        return prepared

    async def _member(self, tier: StartPath, undo: Undo) -> Member:
        generation = self.clone.generation
        member = self.pools.take(generation, tier)
        if member is None:
            raise _NoneReady(
                f"no {tier} VM of {generation.template} is ready",
                hint="see: templated pool ls; without --path the fastest way that is ready is "
                "taken",
            )
        undo.push_async_exit(functools.partial(self._spoiled, member))
        if failpoints.armed:
            failpoints.hit("start.taken")
        # The clone's own lease holds the generation from here on.
        await member.lease.end()
        self.clone.slot = member.prepared.slot
        return member

    async def _spoiled(
        self,
        member: Member,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Discard a member whose start failed, and count it when the member was at fault."""
        if isinstance(error, TemplatedError) and not isinstance(error, HostError):
            self.pools.lost(member, "claim", error.message)
        await asyncio.shield(self.pools.discard(member))

    def _row(self, vm: Vm) -> CloneRow:
        """The clone's row for the journal. Once it is written, a restart keeps the VM."""
        clone = self.clone
        return CloneRow(
            name=clone.name,
            slot=vm.slot,
            template=clone.template,
            state=CloneState.RUNNING,
            path=clone.path,
            created=clone.created,
            pid=vm.machine.pid,
            pid_start=vm.machine.start_time,
            phases=dict(self.clock.phases_ms),
            total_ms=self.clock.total_ms(),
            function=clone.function,
        )


def over_memory(group: Group | None, limits: Limits) -> str:
    """What to say after how a VM ended, when a limit has ended it; else empty. Blocks."""
    if group is None or limits.memory is None or not group.killed_for_memory():
        return ""
    return f": it wanted more than its limits.memory, {limits.memory >> 20} MiB"


def _bound(seconds: float) -> AbstractAsyncContextManager[None]:
    return within(seconds, "the start", hint="see start_timeout and identity.timeout")
