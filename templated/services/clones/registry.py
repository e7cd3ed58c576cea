"""Clones: starting, showing, removing, and noticing their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from templated.drivers.image.store import Image
from templated.errors import (
    Busy,
    Conflict,
    HostError,
    NotFound,
    StartError,
    TemplatedError,
)
from templated.journal import CloneRow, now
from templated.model.api import CloneRequest
from templated.model.clone import TRANSITIONS, CloneState, CloneView, Identity, Slot, StartPath
from templated.model.names import check_clone_name, numbered
from templated.model.units import seconds
from templated.services.context import Context
from templated.services.machines.generation import Generation
from templated.services.machines.slots import Layer, PreparedSlot
from templated.services.machines.starter import start_bound
from templated.services.machines.vm import PhaseClock, Vm, tail
from templated.services.pools.members import TIERS, Member, Pools
from templated.services.tasks import Tasks
from templated.services.templates.build import boot_kernel, image_overlay
from templated.services.templates.catalog import Templates

log = logging.getLogger(__name__)
_CLAIMS_PER_CPU = 2
_TRIES = 3
"""Members of a tier that one request tries before it takes another way."""
_ADOPTIONS, _ADOPTION_TIMEOUT = 32, 10.0
LOG_BYTES = 256 << 10
"""What is shown of a console at most."""


@dataclass
class Clone:
    """A clone that exists or is about to."""

    name: str
    template: str
    generation: str
    path: StartPath
    created: str
    state: CloneState = CloneState.STARTING
    slot: Slot | None = None
    vm: Vm | None = None
    phases_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float | None = None
    reason: str = ""

    def move(self, state: CloneState, reason: str = "") -> None:
        """Change the state; a transition that the table does not have is a defect."""
        if state not in TRANSITIONS[self.state]:
            raise Conflict(f"clone {self.name} is {self.state.value}, it cannot become {state}")
        self.state = state
        self.reason = reason or self.reason

    def runs(self, vm: Vm, row: CloneRow) -> None:
        """The VM is up, and the journal says so."""
        self.vm, self.slot = vm, row.slot
        self.phases_ms, self.total_ms = row.phases, row.total_ms
        self.move(CloneState.RUNNING)

    def view(self) -> CloneView:
        """The clone as users see it; the slot's numbers once it has one."""
        slot = self.slot
        return CloneView(
            name=self.name,
            template=self.template,
            generation=self.generation,
            state=self.state,
            path=self.path,
            pid=self.vm.machine.pid if self.vm else None,
            uuid=slot.uuid if slot else "",
            identity=Identity(
                mac=slot.mac if slot else "",
                ip=slot.ip if slot else "",
                hostname=self.name,
                machine_id=slot.machine_id if slot else "",
                boot_id=slot.boot_id if slot else "",
            ),
            phases_ms=self.phases_ms,
            total_ms=self.total_ms,
            created=self.created,
            reason=self.reason,
        )


class Clones:
    """All clones of one daemon."""

    def __init__(self, context: Context, tasks: Tasks) -> None:
        self._context = context
        self._tasks = tasks
        self._clones: dict[str, Clone] = {}
        self._starts = asyncio.Semaphore(context.config.limits.concurrent_starts)
        # Claims are short: more at once than the CPUs can run would only make each one longer.
        self._claims = asyncio.Semaphore(_CLAIMS_PER_CPU * (os.cpu_count() or 1))
        self.templates = Templates(context, self)
        self.pools = Pools(context, tasks, self.templates)
        context.metrics.count_clones(self.states)
        self._closing = False

    def __len__(self) -> int:
        return len(self._clones)

    def in_use(self, generation: str) -> int:
        """How many clones map a generation."""
        return sum(1 for clone in self._clones.values() if clone.generation == generation)

    async def drain(self, generation: str) -> None:
        """Give back slots and pool members of a generation that serves no more."""
        await self.pools.retire(generation)
        await self._context.slots.retire(generation)

    def served(self) -> None:
        """A generation serves from now on: its pools can be filled."""
        self.pools.refresh()

    async def remove_template(self, name: str) -> None:
        """Remove a template's generations, and the sizes that were set for its pools."""
        await self.templates.remove(name)
        await self.pools.forget(name)

    # --- starting ---------------------------------------------------------------------------

    async def create(self, request: CloneRequest) -> list[CloneView]:
        """Start one clone, or NAME-1 to NAME-count side by side.

        All or nothing: when one fails, the others of the request are removed again. Raises
        Conflict when a name is taken, StartError when a phase failed; nothing is left then.
        """
        clock = PhaseClock()
        names = numbered(request.name, request.count)
        forced = StartPath(request.path) if request.path else None
        self._reserve(names, request, forced)
        # Whoever asked may go away; the starts go on, or are undone, all the same.
        work = self._all_or_none(names, forced, clock.started)
        outcome = await asyncio.shield(self._tasks.start(work))
        if isinstance(outcome, TemplatedError):
            raise outcome
        return [clone.view() for clone in outcome]

    async def _all_or_none(
        self, names: list[str], forced: StartPath | None, requested: float
    ) -> list[Clone] | TemplatedError:
        if len(names) == 1:
            outcomes = [await self._outcome(names[0], forced, requested)]
        else:
            tasks = [self._tasks.start(self._outcome(name, forced, requested)) for name in names]
            outcomes = await asyncio.gather(*tasks)
        started = [outcome for outcome in outcomes if isinstance(outcome, Clone)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, TemplatedError)]
        if failures:
            await asyncio.gather(*(self._remove_quietly(clone.name) for clone in started))
            return failures[0]
        return started

    async def _outcome(
        self, name: str, forced: StartPath | None, requested: float
    ) -> Clone | TemplatedError:
        """A started clone or why there is none: a task of the daemon's group must not raise."""
        try:
            return await self._start(name, forced, requested)
        except TemplatedError as error:
            return error

    def _reserve(self, names: list[str], request: CloneRequest, forced: StartPath | None) -> None:
        """Take the names at once, so that of two requests for a name one fails early."""
        generation = self.templates.known(request.template)
        if not self.pools.ready((generation.manifest.template, StartPath.WARM)):
            self.templates.serving(request.template)
        for name in names:
            if name in self._clones:
                raise Conflict(
                    f"a clone named {name} exists already",
                    hint=f"take another name, or: templated rm {name}",
                )
        limit = self._context.config.limits.clones
        if len(self._clones) + len(names) > limit:
            raise Busy(f"the limit of {limit} clones is reached", hint="see limits.clones")
        for name in names:
            path = forced or StartPath.DIRECT
            self._clones[name] = Clone(
                name, generation.manifest.template, generation.id, path, now()
            )

    async def _start(self, name: str, forced: StartPath | None, requested: float) -> Clone:
        clone = self._clones[name]
        clock = PhaseClock()
        clock.started = requested
        try:
            generation = self.templates.known(clone.template)
            clone.generation = generation.id
            with self.pools.request():
                if not await self._from_pool(clone, generation, clock, forced):
                    async with self._starts:
                        await self._bring_up(clone, generation, clock)
            self._started(clone)
        except BaseException as error:
            self._clones.pop(name, None)
            raise self._failed(clone, clock, error) from error
        return clone

    def _failed(self, clone: Clone, clock: PhaseClock, error: BaseException) -> BaseException:
        if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
            return error
        failure = clock.failure(error)
        failure = StartError(
            f"clone {clone.name}: {failure.message}",
            phase=failure.phase,
            reason=failure.reason,
            hint=failure.hint or f"see: templated template show {clone.template}",
        )
        metrics = self._context.metrics
        metrics.failures.labels(clone.template, failure.reason).inc()
        self._context.events.emit(
            "clone.failed",
            clone.name,
            template=clone.template,
            phase=failure.phase,
            reason=failure.message,
        )
        if failure.reason == "internal":
            log.error("start of %s failed", clone.name, exc_info=error)
        return failure

    async def _from_pool(
        self, clone: Clone, generation: Generation, clock: PhaseClock, forced: StartPath | None
    ) -> bool:
        """Start from a member of the fastest pool that has one; false when there is none.

        A member that fails is ended, and the next one is tried. Raises Busy when the path was
        demanded and there is no member, or what failed last.
        """
        failed: TemplatedError | TimeoutError | None = None
        usable = await self._usable(generation)
        for tier in (forced,) if forced else TIERS:
            tries = 0
            while tier in usable and tries < _TRIES:
                member = self.pools.take(generation, tier)
                if member is None:
                    break
                tries += 1
                try:
                    await self._claim(clone, member, clock)
                    return True
                except HostError:  # the disk, the saved state: another member would fare alike
                    raise
                except (TemplatedError, TimeoutError) as error:
                    failed = error
                    self.pools.lost(member, "claim", str(error) or "it took too long")
        if forced not in TIERS:
            clock.phases_ms.clear()
            clone.path = forced or StartPath.DIRECT
            return False
        raise failed or Busy(
            f"no {forced} VM of {clone.template} is ready",
            hint="see: templated pool ls; without --path the fastest way that is ready is taken",
        )

    async def _usable(self, generation: Generation) -> tuple[StartPath, ...]:
        """The tiers whose members still can be started; a damaged state leaves the warm ones."""
        try:
            self.templates.serving(generation.manifest.template)
            await self.templates.recheck_if_touched(generation)
        except HostError:
            return (StartPath.WARM,) if generation.runs_on() else ()
        return TIERS

    async def _claim(self, clone: Clone, member: Member, clock: PhaseClock) -> None:
        """Make a pool's member this clone; on failure nothing is left of the member."""
        vm, generation = member.vm, member.generation
        spec, starter = generation.manifest.spec, self._context.starter
        warm = member.tier is StartPath.WARM
        bound = seconds(spec.identity.timeout) if warm else start_bound(spec)
        begin = clock.total_ms()
        clone.path = member.tier
        clock.phases_ms.clear()
        try:
            async with self._claims, asyncio.timeout(bound):
                clock.phases_ms["allocate"] = round(clock.total_ms() - begin, 3)
                if warm:
                    await starter.claim(vm, spec, clone.name, member.lag, clock)
                else:
                    await starter.finish(vm, generation, clone.name, clock)
                row = await self._write_down(clone, vm, clock)
        except BaseException:
            await asyncio.shield(self.pools.discard(member))
            raise
        clone.runs(vm, row)

    async def _bring_up(self, clone: Clone, generation: Generation, clock: PhaseClock) -> None:
        slots = self._context.slots
        begin = clock.total_ms()
        layer, image = await self._layer(clone, generation)
        prepared = await slots.take(layer)
        try:
            clone.slot = prepared.slot
            clock.phases_ms["allocate"] = round(clock.total_ms() - begin, 3)
            clone.vm = await self._start_vm(clone, generation, image, prepared, clock)
            row = await self._write_down(clone, clone.vm, clock)
        except BaseException:
            await asyncio.shield(self._give_back(clone, prepared))
            raise
        clone.runs(clone.vm, row)

    async def _write_down(self, clone: Clone, vm: Vm, clock: PhaseClock) -> CloneRow:
        """The guest has confirmed its identity: from here on a restart keeps its VM."""
        pid, pid_start = vm.process
        row = CloneRow(
            name=clone.name,
            slot=vm.slot,
            template=clone.template,
            state=CloneState.RUNNING,
            path=clone.path,
            created=clone.created,
            pid=pid,
            pid_start=pid_start,
            phases=dict(clock.phases_ms),
            total_ms=clock.total_ms(),
        )
        await self._context.journal.new_clone(row)
        return row

    def _started(self, clone: Clone) -> None:
        """A clone runs: watch it and tell."""
        assert clone.total_ms is not None
        self._watch(clone)
        metrics = self._context.metrics
        metrics.observe_start(clone.template, clone.path, clone.phases_ms, clone.total_ms)
        self._context.events.emit(
            "clone.running",
            clone.name,
            template=clone.template,
            path=clone.path.value,
            total_ms=clone.total_ms,
        )

    async def _layer(self, clone: Clone, generation: Generation) -> tuple[Layer, Image | None]:
        if clone.path is StartPath.DIRECT:
            self.templates.serving(clone.template)
            await self.templates.recheck_if_touched(generation)
            return generation.layer, None
        image = self._context.images.get(generation.manifest.image)
        if image is None:
            raise HostError(
                f"image {generation.manifest.image} is gone",
                hint=f"run: templated template build {clone.template}",
            )
        # Not a layer that slots are kept ready for.
        return Layer(f"cold-{image.digest}", await image_overlay(self._context, image)), image

    async def _start_vm(
        self,
        clone: Clone,
        generation: Generation,
        image: Image | None,
        prepared: PreparedSlot,
        clock: PhaseClock,
    ) -> Vm:
        starter = self._context.starter
        if image is None:
            return await starter.direct(prepared, generation, clone.name, clock)
        spec = generation.manifest.spec
        launch = starter.launch(prepared, generation.hardware)
        kernel = boot_kernel(image, spec, generation.manifest.accel)
        return await starter.boot(prepared, launch, kernel, spec, clone.name, clock)

    async def _give_back(self, clone: Clone, prepared: PreparedSlot) -> None:
        if clone.vm is not None:
            await clone.vm.destroy()
        prepared.close()
        await self._context.slots.drop(prepared.slot.id)

    # --- showing ----------------------------------------------------------------------------

    def views(self) -> list[CloneView]:
        """All clones, oldest first."""
        return [clone.view() for clone in self._clones.values()]

    def view(self, name: str) -> CloneView:
        """One clone; NotFound."""
        return self._get(name).view()

    def running(self, name: str) -> Vm:
        """The VM of a running clone; NotFound, or Conflict when it does not run."""
        clone = self._get(name)
        if clone.state is not CloneState.RUNNING or clone.vm is None:
            detail = f": {clone.reason}" if clone.reason else ""
            raise Conflict(
                f"clone {name} is {clone.state.value}{detail}",
                hint=f"see: templated logs {name}, or remove it: templated rm {name}",
            )
        return clone.vm

    def serial_log(self, name: str, lines: int) -> list[str]:
        """The last lines of a clone's console."""
        clone = self._get(name)
        if clone.slot is None:
            return []
        return tail(self._context.layout.vm(clone.slot.id).serial_log, lines, LOG_BYTES)

    def _get(self, name: str) -> Clone:
        check_clone_name(name)
        try:
            return self._clones[name]
        except KeyError:
            raise NotFound(f"there is no clone {name}", hint="see: templated ls") from None

    # --- ending -----------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """End a clone and give back all that it had; NotFound, Conflict while it starts.

        When giving back fails the clone stays, as removing, and `rm` can be tried again.
        """
        clone = self._get(name)
        if clone.state is CloneState.STARTING:
            raise Conflict(f"clone {name} is still starting", hint="try again in a moment")
        if clone.state is not CloneState.REMOVING:
            clone.move(CloneState.REMOVING)
        assert clone.slot is not None
        if clone.vm is not None:
            # Its end takes longer than the row. Should the daemon end in between, a dead clone is
            # left, for `rm` to be tried again.
            clone.vm.machine.kill()
        await self._context.journal.clone_state(clone.slot.id, CloneState.REMOVING)
        if clone.vm is not None:
            await clone.vm.destroy()
        await self._context.slots.drop(clone.slot.id)
        if self._clones.get(name) is clone:
            del self._clones[name]
            self._context.events.emit("clone.removed", name, template=clone.template)
            await self.templates.clone_ended(clone.generation)

    async def _remove_quietly(self, name: str) -> None:
        try:
            await self.remove(name)
        except Exception:  # whatever it is, a task of the daemon's group must not raise
            log.exception("cannot remove %s", name)

    def _watch(self, clone: Clone) -> None:
        """Notice the end of a running clone's VM at once, by its pidfd."""

        def ended(future: asyncio.Future[str]) -> None:
            if not self._closing and clone.state is CloneState.RUNNING and not future.cancelled():
                self._tasks.start(self._died(clone, future.result()))

        assert clone.vm is not None
        clone.vm.machine.exited.add_done_callback(ended)

    async def _died(self, clone: Clone, how: str) -> None:
        try:
            await self._bury(clone, how)
        except Exception:
            log.exception("cannot take down what is left of %s", clone.name)

    async def _bury(self, clone: Clone, how: str) -> None:
        if clone.state is not CloneState.RUNNING:
            return
        clone.move(CloneState.DEAD, f"its VM {how}")
        self._context.events.emit("clone.dead", clone.name, reason=clone.reason)
        assert clone.vm is not None and clone.slot is not None
        slot_id = clone.slot.id
        await clone.vm.destroy()
        clone.vm = None
        with contextlib.suppress(TemplatedError):
            await self._context.journal.clone_state(slot_id, CloneState.DEAD, clone.reason)

    def states(self) -> Counter[tuple[str, str]]:
        """How many clones there are, by template and state."""
        return Counter((c.template, c.state.value) for c in self._clones.values())

    def processes(self) -> Iterator[tuple[str, str, int]]:
        """Template, state and pid of each clone that has a VM."""
        for clone in self._clones.values():
            if clone.vm is not None:
                yield clone.template, clone.state.value, clone.vm.machine.pid

    # --- restart of the daemon --------------------------------------------------------------

    async def adopt(self, rows: list[CloneRow]) -> list[str]:
        """Take over the clones that an earlier daemon left running.

        Returns the ids of slots whose VM is not to be kept: removals under way. The caller
        destroys those.
        """
        orphans: list[str] = []
        kept: list[tuple[Clone, CloneRow]] = []
        for row in rows:
            if row.state in (CloneState.RUNNING, CloneState.DEAD):
                kept.append((self._known(row), row))
            else:
                orphans.append(row.slot.id)
        # Side by side: one that does not answer must not hold up all others.
        running = [found for found in kept if found[0].state is CloneState.RUNNING]
        at_once = asyncio.Semaphore(_ADOPTIONS)
        await asyncio.gather(*(self._adopt_one(*found, at_once) for found in running))
        return orphans

    def _known(self, row: CloneRow) -> Clone:
        clone = self._clones[row.name] = Clone(
            row.name,
            row.template,
            row.slot.generation,
            row.path,
            row.created,
            state=row.state,
            slot=row.slot,
            phases_ms=row.phases,
            total_ms=row.total_ms,
            reason=row.reason,
        )
        return clone

    async def _adopt_one(self, clone: Clone, row: CloneRow, at_once: asyncio.Semaphore) -> None:
        places = self._context.layout.vm(row.slot.id)
        machine = None
        if row.pid is not None and row.pid_start is not None:
            machine = self._context.hypervisor.adopt(row.pid, row.pid_start, places, row.slot.uuid)
        if machine is None:
            clone.move(CloneState.DEAD, "its VM ended while the daemon was away")
            await self._context.journal.clone_state(row.slot.id, CloneState.DEAD, clone.reason)
            return
        clone.vm = Vm(row.slot, places, machine)
        try:
            async with at_once:
                await clone.vm.connect(_ADOPTION_TIMEOUT)
        except TemplatedError as error:
            log.warning("clone %s runs but does not answer: %s", row.name, error.message)
        self._watch(clone)
        self._context.events.emit("clone.adopted", row.name, template=row.template)

    async def release(self) -> None:
        """Let go of all VMs, which outlive the daemon."""
        self._closing = True
        for clone in self._clones.values():
            if clone.vm is not None:
                await clone.vm.release()
