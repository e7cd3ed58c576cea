"""The registry of clones: who has which name, and how a clone ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping

from templated import failpoints
from templated.drivers.cgroups import Group
from templated.drivers.code import CodeFile
from templated.errors import Busy, Conflict, HostError, NotFound, StartError, TemplatedError
from templated.journal import CloneRow, now
from templated.model.api import CloneRequest
from templated.model.clone import CloneState, CloneView, StartPath
from templated.model.limits import UNLIMITED, Limits
from templated.model.names import check_clone_name, numbered
from templated.model.spec import TemplateSpec
from templated.services.clones.clone import Clone, Running, Started, Starting, adopted, known
from templated.services.clones.start import Start, Turns, over_memory
from templated.services.context import Context
from templated.services.machines.clock import PhaseClock
from templated.services.machines.generation import Generation, Holder
from templated.services.machines.vm import Vm, tail
from templated.services.pools.members import TIERS, Pools
from templated.services.tasks import Tasks
from templated.services.templates.catalog import Templates
from templated.timing import within

log = logging.getLogger(__name__)
_CLAIMS_PER_CPU = 2
_ADOPTIONS, _ADOPTION_TIMEOUT = 32, 10.0
_RECONNECT_EVERY = 5.0
LOG_BYTES = 256 << 10
"""The most that is shown of a console, in bytes."""


class Clones:
    """All clones of one daemon."""

    def __init__(self, context: Context, tasks: Tasks, templates: Templates, pools: Pools) -> None:
        self._context = context
        self._tasks = tasks
        self._templates = templates
        self._pools = pools
        self._clones: dict[str, Clone] = {}
        self._turns = Turns(
            # Claims are short: more at once than the CPUs can run would only make each longer.
            claims=asyncio.Semaphore(_CLAIMS_PER_CPU * (os.cpu_count() or 1)),
            starts=asyncio.Semaphore(context.config.limits.concurrent_starts),
        )
        self._closing = False
        context.metrics.count_clones(self.states)

    def __len__(self) -> int:
        return len(self._clones)

    def lasting(self) -> int:
        """How many go on without the daemon: all but the instances of functions."""
        return sum(not clone.function for clone in self._clones.values())

    # --- starting ---------------------------------------------------------------------------

    async def create(self, request: CloneRequest) -> list[CloneView]:
        """Start one clone, or NAME-1 to NAME-count side by side.

        All or nothing: when one fails, the others of the request are removed again. Raises
        InvalidRequest for a bad name, NotFound for a template, Conflict when a name is taken or the
        template has no cold starts,
        Busy beyond limits.clones, HostError when the template cannot serve, and StartError when
        a phase failed; leaves nothing of the request then.
        """
        clock = PhaseClock()
        names = numbered(request.name, request.count)
        demanded = StartPath(request.path) if request.path else None
        starting = self._reserve(names, request.template, demanded)
        with self._context.metrics.starting(len(names)):
            # The caller may go away; the starts still go on, or are undone.
            clones = await self._tasks.run(self._all_or_none(starting, demanded, clock.started))
        return [clone.view() for clone in clones]

    async def start_instance(
        self, name: str, template: str, code: CodeFile, function: str
    ) -> Running:
        """Start a clone with a function's code behind its second disk; `function` is as in hello:3.

        The daemon's next start ends it, whatever becomes of this one. Raises and leaves as
        `create` does, and Conflict for a template whose VMs take no code.
        """
        clock = PhaseClock()
        (clone,) = self._reserve([check_clone_name(name)], template, None)
        if clone.generation.code is None:
            del self._clones[name]
            await clone.lease.end()
            raise Conflict(
                f"VMs of {template} have no disk for code",
                hint=f"set `code: true` in its file, then: templated template build {template}",
            )
        clone.code, clone.function = code, function
        with self._context.metrics.starting(1):
            return await self._tasks.run(self._start(clone, None, clock.started))

    def _reserve(
        self, names: list[str], template: str | None, demanded: StartPath | None
    ) -> list[Starting]:
        """Take the names at once, so that of two requests for a name one fails early."""
        generation = self._templates.active(template)
        if not self._pools.ready((generation.template, StartPath.WARM)):
            self._templates.serving(generation.template)
        for name in names:
            if name in self._clones:
                raise Conflict(
                    f"a clone named {name} exists already",
                    hint=f"take another name, or: templated rm {name}",
                )
        if demanded is StartPath.COLD and generation.manifest.spec.image.seed is not None:
            raise Conflict(
                f"cloud-init would run again in a cold start of {generation.template}: its image "
                "has a seed",
                hint="take --path direct, or none",
            )
        limit = self._context.config.limits.clones
        if len(self._clones) + len(names) > limit:
            raise Busy(f"the limit of {limit} clones is reached", hint="see limits.clones")
        self._require_room(generation, len(names), demanded)
        path = demanded or StartPath.DIRECT
        starting = [_starting(name, generation, path) for name in names]
        self._clones.update({clone.name: clone for clone in starting})
        return starting

    def _require_room(self, generation: Generation, count: int, demanded: StartPath | None) -> None:
        """Raise Busy when the VMs that a request needs beside those of pools would be too many."""
        promise = generation.layer.promise
        taken = TIERS if demanded is None else (demanded,)
        ready = sum(len(self._pools.ready((generation.template, tier))) for tier in taken)
        if promise is not None and count > ready:
            self._context.admission.require(promise, count - ready)

    async def _all_or_none(
        self, starting: list[Starting], demanded: StartPath | None, requested: float
    ) -> list[Running]:
        if len(starting) == 1:
            return [await self._start(starting[0], demanded, requested)]
        starts = (self._start(clone, demanded, requested) for clone in starting)
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        up = [outcome for outcome in outcomes if isinstance(outcome, Running)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            removals = (self.remove(clone.name) for clone in up)
            for left in await asyncio.gather(*removals, return_exceptions=True):
                if left is not None:
                    log.error("cannot undo a start", exc_info=left)
            raise failures[0]
        return up

    async def _start(
        self, clone: Starting, demanded: StartPath | None, requested: float
    ) -> Running:
        clock = PhaseClock(requested)
        start = Start(self._context, self._templates, self._pools, self._turns, clone, clock)
        try:
            with self._pools.request():
                running = await start.run(demanded)
        except BaseException as error:
            del self._clones[clone.name]
            await clone.lease.end()
            raise self._failed(clone, clock, error) from error
        self._clones[clone.name] = running
        self._watch(running)
        if running.limits.controlled:
            self._limit(running)
        if failpoints.armed:
            failpoints.hit("clone.registered")
        self._context.metrics.observe_start(
            running.template, running.path, running.phases_ms, running.total_ms or 0.0
        )
        self._context.events.emit(
            "clone.running",
            running.name,
            template=running.template,
            path=running.path.value,
            total_ms=running.total_ms,
        )
        return running

    def _failed(self, clone: Clone, clock: PhaseClock, error: BaseException) -> BaseException:
        """Count and report a start that failed; returns the error to raise."""
        if not isinstance(error, Exception):  # cancelled: the daemon ends
            return error
        failure = clock.failure(error)
        failure = StartError(
            f"clone {clone.name}: {failure.message}",
            phase=failure.phase,
            reason=failure.reason,
            hint=failure.hint or f"see: templated template show {clone.template}",
        )
        self._context.metrics.failures.labels(clone.template, failure.reason).inc()
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

    # --- showing ----------------------------------------------------------------------------

    def views(self) -> list[CloneView]:
        """All clones, oldest first."""
        return [clone.view() for clone in self._clones.values()]

    def view(self, name: str) -> CloneView:
        """One clone. Raises NotFound."""
        return self._get(name).view()

    def function_of(self, name: str) -> str:
        """The function that a clone is an instance of; empty for none. Raises NotFound."""
        return self._get(name).function.partition(":")[0]

    def running(self, name: str) -> Vm:
        """The VM of a running clone. Raises NotFound, or Conflict when it does not run."""
        clone = self._get(name)
        if not isinstance(clone, Running) or clone.state is not CloneState.RUNNING:
            detail = f": {clone.reason}" if clone.reason else ""
            raise Conflict(
                f"clone {name} is {clone.state.value}{detail}",
                hint=f"see: templated logs {name}, or remove it: templated rm {name}",
            )
        return clone.vm

    def serial_log(self, name: str, lines: int) -> list[str]:
        """The last lines of a clone's console. Raises NotFound."""
        slot = self._get(name).allotted
        if slot is None:
            return []
        return tail(self._context.layout.vm(slot.id).serial_log, lines, LOG_BYTES)

    def states(self) -> Counter[tuple[str, str]]:
        """How many clones there are, by template and state."""
        return Counter((c.template, c.state.value) for c in self._clones.values())

    def running_clones(self) -> list[Running]:
        """The clones that have a VM."""
        return [clone for clone in self._clones.values() if isinstance(clone, Running)]

    def processes(self) -> Iterator[tuple[str, str, int]]:
        """Template, state and pid of each clone that has a VM."""
        for clone in self.running_clones():
            yield clone.template, clone.state.value, clone.pid

    def _get(self, name: str) -> Clone:
        check_clone_name(name)
        try:
            return self._clones[name]
        except KeyError:
            raise NotFound(f"there is no clone {name}", hint="see: templated ls") from None

    def _limit(self, clone: Running) -> None:
        """Set the limits that would have made the start longer, beside requests."""
        group = self._context.groups.group(clone.slot.id)
        if group is not None and not clone.vm.machine.placed:
            self._tasks.spawn(self._hold(clone, group), f"limits of {clone.name}")

    async def _hold(self, clone: Running, group: Group) -> None:
        try:
            await asyncio.to_thread(group.hold, clone.pid, clone.limits)
        except HostError as error:
            if clone.state is CloneState.RUNNING:
                log.error("clone %s runs without its limits: %s", clone.name, error.message)

    # --- ending -----------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """End a clone and give back all that it had.

        Raises NotFound, and Conflict while it starts. When giving back fails with a HostError,
        HypervisorError or Timeout, leaves the clone as removing, and `rm` can be tried again.
        """
        clone = self._get(name)
        if not isinstance(clone, Started):
            raise Conflict(f"clone {name} is still starting", hint="try again in a moment")
        if clone.state is not CloneState.REMOVING:
            clone.move(CloneState.REMOVING)
        if failpoints.armed:
            failpoints.hit("rm.moved")
        if isinstance(clone, Running):
            # A VM takes longer to end than its row to be written. When the daemon ends in
            # between, it leaves a dead clone, and `rm` can be tried again.
            clone.vm.machine.kill()
        if failpoints.armed:
            failpoints.hit("rm.killed")
        await self._context.journal.clone_state(clone.slot.id, CloneState.REMOVING)
        if isinstance(clone, Running):
            await clone.vm.destroy()
        if failpoints.armed:
            failpoints.hit("rm.ended")
        await self._context.slots.drop(clone.slot.id)
        if self._clones.get(name) is clone:
            del self._clones[name]
            self._context.events.emit("clone.removed", name, template=clone.template)
            await clone.lease.end()

    def _watch(self, clone: Running) -> None:
        """Notice the end of a running clone's VM at once, by its pidfd."""

        def ended(future: asyncio.Future[str]) -> None:
            if not self._closing and clone.state is CloneState.RUNNING and not future.cancelled():
                self._tasks.spawn(self._bury(clone, future.result()), f"burial of {clone.name}")

        clone.vm.machine.exited.add_done_callback(ended)

    async def _bury(self, clone: Running, how: str) -> None:
        """A clone's VM ended by itself: the name stays taken, its slot too, until `rm`."""
        group = self._context.groups.group(clone.slot.id)
        cause = await asyncio.to_thread(over_memory, group, clone.limits)
        if clone.state is not CloneState.RUNNING:
            return
        clone.move(CloneState.DEAD, f"its VM {how}{cause}")
        self._context.admission.died(clone.slot.id)
        if cause:
            self._context.metrics.limit_hits.labels(clone.template, "memory").inc()
        dead = self._clones[clone.name] = clone.without_vm()
        self._context.events.emit("clone.dead", clone.name, reason=clone.reason)
        await clone.vm.destroy()
        with contextlib.suppress(TemplatedError):
            await self._context.journal.clone_state(dead.slot.id, dead.state, dead.reason)

    # --- restart of the daemon --------------------------------------------------------------

    async def adopt(self, rows: list[CloneRow], specs: Mapping[str, TemplateSpec]) -> list[str]:
        """Take over the clones that an earlier daemon left running, with their templates by slot.

        Returns the ids of slots whose VM must not be kept: removals under way, and instances of
        functions, whose requests ended with that daemon. The caller destroys those. Raises
        HostError when the journal cannot be written.
        """
        lasting = (CloneState.RUNNING, CloneState.DEAD)
        kept = [row for row in rows if row.state in lasting and not row.function]
        at_once = asyncio.Semaphore(_ADOPTIONS)
        for row in kept:
            lease = self._templates.lease(row.slot.generation, Holder.CLONE)
            spec = specs.get(row.slot.id)
            self._clones[row.name] = known(row, lease, Limits.of(spec) if spec else UNLIMITED)
        # Side by side: one that does not answer must not hold up all others.
        running = [row for row in kept if row.state is CloneState.RUNNING]
        await asyncio.gather(
            *(self._adopt_one(row, specs.get(row.slot.id), at_once) for row in running)
        )
        return [row.slot.id for row in rows if row.name not in self._clones]

    async def _adopt_one(
        self, row: CloneRow, spec: TemplateSpec | None, at_once: asyncio.Semaphore
    ) -> None:
        places = self._context.layout.vm(row.slot.id)
        found = self._clones[row.name]
        assert isinstance(found, Started)
        machine = None
        if row.pid is not None and row.pid_start is not None:
            machine = self._context.hypervisor.adopt(
                row.pid,
                row.pid_start,
                places,
                row.slot.uuid,
                self._context.starter.user(row.slot),
            )
        if machine is None:
            group = self._context.groups.group(row.slot.id)
            cause = await asyncio.to_thread(over_memory, group, found.limits)
            found.move(CloneState.DEAD, f"its VM ended while the daemon was away{cause}")
            self._context.admission.died(row.slot.id)
            await self._context.journal.clone_state(row.slot.id, CloneState.DEAD, found.reason)
            return
        vm = Vm(row.slot, places, machine, agent=spec.identity.agent if spec else "templated")
        clone = self._clones[row.name] = adopted(found, vm)
        self._limit(clone)
        try:
            async with at_once, within(_ADOPTION_TIMEOUT, "its connection"):
                await clone.vm.connect(_ADOPTION_TIMEOUT)
        except TemplatedError as error:
            log.warning("clone %s runs but does not answer: %s", row.name, error.message)
            self._tasks.spawn(self._reconnect(clone), f"reconnecting {row.name}")
        self._watch(clone)
        self._context.events.emit("clone.adopted", row.name, template=row.template)

    async def _reconnect(self, clone: Running) -> None:
        """Try again and again to reach the VM of an adopted clone, while it runs."""
        while not clone.vm.machine.exited.done():
            await asyncio.sleep(_RECONNECT_EVERY)
            with contextlib.suppress(TemplatedError):
                async with within(_ADOPTION_TIMEOUT, "its connection"):
                    await clone.vm.reconnect(_ADOPTION_TIMEOUT)
                return

    async def release(self) -> None:
        """Release all VMs, which outlive the daemon. Raises nothing."""
        self._closing = True
        for clone in self.running_clones():
            await clone.vm.release()


def _starting(name: str, generation: Generation, path: StartPath) -> Starting:
    return Starting(
        name=name,
        template=generation.template,
        generation_id=generation.id,
        path=path,
        created=now(),
        lease=generation.leases.take(Holder.CLONE),
        limits=generation.limits,
        generation=generation,
    )
