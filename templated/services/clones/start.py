"""How a clone starts: one start of one clone, from its request to its confirmed identity.

    warm      a paused VM of the pool is woken and named
    standby   a hypervisor of the pool, which waits for its state, is restored, woken and named
    direct    a hypervisor is started on a slot, restored, woken and named
    cold      a VM boots from its image, as the template's base VM did

`Start.run` tries them in turn, the fastest first, unless one was demanded. What a way takes is on
one exit stack: when it fails, everything is given back before the next one is tried. A clone
exists from the moment that its row is in the journal, which is after its guest has confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType

from templated.errors import Busy, HostError, TemplatedError
from templated.journal import CloneRow
from templated.model.clone import CloneState, Phase, StartPath
from templated.services.clones.clone import Running, Starting, started
from templated.services.context import Context
from templated.services.machines.boot import boot_kernel, image_overlay
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

        Raises what the last way failed by: a TemplatedError, Busy when a pool was demanded that
        has no member; leaves nothing of the clone then, neither a row nor a VM nor a slot.
        """
        failed: TemplatedError | None = None
        for path in (demanded,) if demanded else FASTEST_FIRST:
            for _ in range(_TRIES.get(path, 1)):
                try:
                    return await self._by(path)
                except _NoneReady as error:
                    failed = failed or error
                    break
                except HostError:  # the disk, a frozen file: another way would fare alike
                    raise
                except TemplatedError as error:
                    failed = error
        assert failed is not None
        raise failed

    async def _by(self, path: StartPath) -> Running:
        way: Callable[[Undo], Awaitable[Vm]] = getattr(self, path.value)
        self.clone.path = path
        self.clock.again()
        async with contextlib.AsyncExitStack() as undo:
            vm = await way(undo)
            row = self._row(vm)
            await self.context.journal.new_clone(row)
            undo.pop_all()
        return started(self.clone, row, vm)

    # --- the ways -----------------------------------------------------------------------------
    # Each raises HostError, HypervisorError, GuestError, IdentityError or Timeout, and leaves
    # what it took on `undo`.

    async def warm(self, undo: Undo) -> Vm:
        """Wake and name a paused VM."""
        member = await self._member(StartPath.WARM, undo)
        terms, starter = self.clone.generation.terms, self.context.starter
        async with self._turn(self.turns.claims, terms.identify_s):
            await self._check(loads_state=False)
            await starter.claim(member.vm, terms, self.clone.name, member.lag, self.clock)
        return member.vm

    async def standby(self, undo: Undo) -> Vm:
        """Restore into a hypervisor that waits for it."""
        member = await self._member(StartPath.STANDBY, undo)
        generation, starter = self.clone.generation, self.context.starter
        async with self._turn(self.turns.claims, generation.terms.restored_s):
            await self._check(loads_state=True)
            await starter.finish(member.vm, generation, self.clone.name, self.clock)
        return member.vm

    async def direct(self, undo: Undo) -> Vm:
        """Start a hypervisor, and restore into it."""
        generation, starter = self.clone.generation, self.context.starter
        async with self._turn(self.turns.starts, generation.terms.restored_s):
            await self._check(loads_state=True)
            prepared = await self._slot(generation.layer, undo)
            return await starter.direct(prepared, generation, self.clone.name, self.clock)

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
        async with self._turn(self.turns.starts, terms.booted_s):
            empty = await image_overlay(self.context.layout, image)
            # Not a layer that slots are kept ready for.
            prepared = await self._slot(Layer(f"cold-{image.digest}", empty), undo)
            launch = starter.launch(prepared, generation.hardware)
            kernel = boot_kernel(self.context.hypervisor, image, manifest.spec, manifest.accel)
            return await starter.boot(prepared, launch, kernel, terms, self.clone.name, self.clock)

    # --- what they take -----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _turn(self, turns: asyncio.Semaphore, bound_s: float) -> AsyncIterator[None]:
        """Wait for a turn, then bound what is done in it."""
        with self.clock(Phase.ALLOCATE):
            await turns.acquire()
        try:
            async with within(bound_s, "the start", hint="see start_timeout, identity.timeout"):
                yield
        finally:
            turns.release()

    async def _check(self, *, loads_state: bool) -> None:
        """Refuse frozen files that are no longer what was frozen: a few stat calls."""
        with self.clock(Phase.ALLOCATE):
            await self.templates.check(self.clone.generation, loads_state=loads_state)

    async def _slot(self, layer: Layer, undo: Undo) -> PreparedSlot:
        with self.clock(Phase.ALLOCATE):
            prepared = await self.context.slots.take(layer)
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
        """A member that was taken and is of no more use."""
        if isinstance(error, TemplatedError) and not isinstance(error, HostError):
            self.pools.lost(member, "claim", error.message)
        await asyncio.shield(self.pools.discard(member))

    def _row(self, vm: Vm) -> CloneRow:
        """What the journal keeps: from here on a restart keeps the VM."""
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
        )
