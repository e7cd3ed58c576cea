"""Keeps the pools at their sizes, beside requests and never in front of them.

Few members are made at once, with the lowest priority, and none while the host is under pressure.
A pool whose members fail is tried again later and later. Members that are too old or do not
answer are replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass

from templated import failpoints
from templated.drivers.host.pressure import RESOURCES
from templated.drivers.hypervisor.states import MachineState
from templated.errors import Busy, HostError, TemplatedError, Timeout
from templated.model.clone import StartPath
from templated.model.units import seconds
from templated.services.context import Context
from templated.services.machines.clock import PhaseClock
from templated.services.machines.generation import Generation, Holder
from templated.services.machines.slots import PreparedSlot
from templated.services.machines.vm import Vm
from templated.services.pools.capacity import shortages
from templated.services.pools.members import Member, Pool, Pools
from templated.services.tasks import Tasks
from templated.services.templates.catalog import Templates
from templated.timing import within

log = logging.getLogger(__name__)
_SOON = 1.0
_LONGEST_BACKOFF = 60.0
_HEALTH_TIMEOUT = 5.0
# Seconds that a member gives way to all others. It needs about one; where other work keeps all CPUs
# busy it would get a few per cent of one for ever, and come to the bound of its start.
_GIVES_WAY = 2.0
_WELL = {StartPath.WARM: MachineState.PAUSED, StartPath.STANDBY: MachineState.WAITING}


@dataclass
class _Backoff:
    """A pool whose members fail: how often in a row, and when to try again."""

    generation: str
    failures: int = 0
    until: float = 0.0
    why: str = ""

    def failed(self, why: str) -> None:
        """Count one more failure: wait twice as long as the last time."""
        self.failures, self.why = self.failures + 1, why
        self.until = time.monotonic() + min(_LONGEST_BACKOFF, 2.0 ** (self.failures - 1))


class Refill:
    """Makes members while pools lack some. `run` goes on until it is cancelled."""

    def __init__(self, context: Context, tasks: Tasks, pools: Pools, templates: Templates) -> None:
        self._context = context
        self._tasks = tasks
        self._pools = pools
        self._templates = templates
        config = context.config.pools
        self._limit = config.concurrent_refills or max(1, (os.cpu_count() or 1) // 2)
        self._interval = seconds(config.check_interval)
        self._max_age = seconds(config.max_age)
        self._making: Counter[Pool] = Counter()
        self._backoff: dict[Pool, _Backoff] = {}
        self._blocked: dict[str, str] = {}

    async def run(self) -> None:
        """Fill and shrink the pools until cancelled. Raises nothing."""
        while True:
            # Not wait_for: before Python 3.12 it can lose a cancellation (bpo-37658).
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._pools.wanted.wait()
            await self._let_requests_go_first()
            self._pools.wanted.clear()
            try:
                self._shrink()
                self._fill()
            except Exception:  # whatever it is, requests are served without pools
                log.exception("cannot look after the pools")

    async def watch(self) -> None:
        """Replace members that are too old or do not answer, until cancelled. Raises nothing."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                for pool in self._pools.pools():
                    await self.check(pool)
            except Exception:
                log.exception("cannot check the pools")

    async def _let_requests_go_first(self) -> None:
        """Wait until no request is under way, but with a bound: there may always be one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SOON):
                await self._pools.idle.wait()

    def _patience(self) -> float:
        """Seconds until there may be work that no event reports."""
        waiting = any(self._pools.missing(pool) > 0 for pool in self._pools.pools())
        return _SOON if waiting and not self._making.total() else self._interval

    def _fill(self) -> None:
        pools = [pool for pool in self._pools.pools() if self._due(pool) and not self._full(pool)]
        if pools:
            self._look_at_host()
        while not self._blocked and pools and self._making.total() < self._limit:
            # The emptiest first, so that no template waits for another's large pool.
            pool = max(pools, key=lambda p: self._lacking(p) / self._pools.target(p))
            self._making[pool] += 1
            self._tasks.spawn(self._make(pool), f"refill {pool[0]} {pool[1]}")
            pools = [pool for pool in pools if self._lacking(pool) > 0 and not self._full(pool)]
        self._report_problems()

    def _lacking(self, pool: Pool) -> int:
        return self._pools.missing(pool) - self._making[pool]

    def _due(self, pool: Pool) -> bool:
        return self._lacking(pool) > 0 and self._backoff_of(pool).until <= time.monotonic()

    def _full(self, pool: Pool) -> str:
        """Why there may be no more VMs of a pool's template; empty when there may."""
        promise = self._templates.active(pool[0]).layer.promise
        try:
            if promise is not None:
                self._context.admission.require(promise, self._making[pool] + 1)
        except Busy as error:
            return error.message
        return ""

    def _backoff_of(self, pool: Pool) -> _Backoff:
        """The back-off of a pool; that of an earlier generation does not count for the next."""
        serving = self._templates.active(pool[0]).id
        backoff = self._backoff.get(pool)
        if backoff is None or backoff.generation != serving:
            backoff = self._backoff[pool] = _Backoff(serving)
        return backoff

    # --- making -------------------------------------------------------------------------------

    async def _make(self, pool: Pool) -> None:
        """Make one member. Raises nothing: a failure is counted, and tried again later."""
        clock = PhaseClock()
        try:
            member = await self._member(self._templates.serving(pool[0]), pool[1])
            if failpoints.armed:
                failpoints.hit("refill.made")
            if not self._pools.offer(member):
                self._tasks.spawn(self._pools.discard(member), "discarding a pool member")
            if failpoints.armed:
                failpoints.hit("refill.waiting")
            self._backoff.pop(pool, None)
            took = clock.total_ms() / 1000
            self._pools.took(pool, took)
            self._context.metrics.refill_seconds.labels(*pool).observe(took)
        except Busy as error:  # others were faster; `_fill` looks before the next one
            log.info("no %s VM of %s is made: %s", pool[1], pool[0], error.message)
        except Exception as error:  # noqa: BLE001  # reported by _failed, whatever it is
            self._failed(pool, error)
        finally:
            self._making[pool] -= 1
            self._pools.wanted.set()

    async def _member(self, generation: Generation, tier: StartPath) -> Member:
        """A member that is ready. Raises the error of its start; leaves nothing of it then."""
        bound = within(generation.terms.restored_s, "making it")
        async with contextlib.AsyncExitStack() as undo, bound:
            await self._templates.check(generation, loads_state=True)
            lease = generation.leases.take(Holder.MEMBER)
            undo.push_async_callback(lease.end)
            prepared = await self._context.slots.make(generation.layer)
            undo.push_async_callback(self._context.slots.give_back, prepared)
            vm, lag = await self._bring_up(prepared, generation, tier)
            size = await asyncio.to_thread(vm.machine.private_bytes)
            undo.pop_all()
        member = Member(tier, generation, prepared, vm, lease, lag)
        self._pools.measured(member, size)
        return member

    async def _bring_up(
        self, prepared: PreparedSlot, generation: Generation, tier: StartPath
    ) -> tuple[Vm, float]:
        starter, lag = self._context.starter, 0.0
        hurrying = asyncio.create_task(self._hurry(prepared), name="a member's patience")
        try:
            vm = await starter.spawn(prepared, generation, background=True)
            if tier is StartPath.WARM:
                lag = await starter.warm(vm, generation, f"warm-{prepared.slot.id}")
        finally:
            hurrying.cancel()
            await asyncio.wait({hurrying})
        await starter.foreground(prepared, vm)
        return vm, lag

    async def _hurry(self, prepared: PreparedSlot) -> None:
        """End a member's giving way before it is done, when that takes long."""
        await asyncio.sleep(_GIVES_WAY)
        if prepared.vm is not None and not prepared.vm.machine.exited.done():
            with contextlib.suppress(HostError):  # its end is told by who waits for it
                await self._context.starter.foreground(prepared, prepared.vm)

    def _failed(self, pool: Pool, error: Exception) -> None:
        known = isinstance(error, TemplatedError)
        why = error.message if isinstance(error, TemplatedError) else repr(error)
        reason = error.code if isinstance(error, TemplatedError) else "internal"
        self._context.metrics.refill_failures.labels(*pool, reason).inc()
        self._context.events.emit("pool.refill_failed", pool[0], tier=pool[1].value, reason=why)
        log.warning("cannot make a %s VM of %s: %s", pool[1], pool[0], why, exc_info=not known)
        if pool in self._pools.pools():
            self._backoff_of(pool).failed(why)

    # --- the host -----------------------------------------------------------------------------

    def _look_at_host(self) -> None:
        """Find out whether the host has room and time for new members now."""
        blocked = shortages(self._context.config.pools.pressure)
        if blocked.keys() != self._blocked.keys():
            text = "; ".join(blocked.values()) or "nothing any more"
            log.info("what keeps pools from being filled: %s", text)
        self._blocked = blocked
        for resource in RESOURCES:
            self._context.metrics.refill_blocked.labels(resource).set(resource in blocked)

    def _report_problems(self) -> None:
        problems = self._pools.problems
        problems.clear()
        for pool in self._pools.pools():
            backoff = self._backoff_of(pool)
            if backoff.failures:
                times = "once" if backoff.failures == 1 else f"{backoff.failures} times"
                problems[pool] = f"failed {times}: {backoff.why}"
            elif self._lacking(pool) > 0 and (why := self._full(pool)):
                problems[pool] = why
            elif self._lacking(pool) > 0 and self._blocked:
                problems[pool] = "; ".join(self._blocked.values())

    # --- members that wait --------------------------------------------------------------------

    def _shrink(self) -> None:
        """End the members that are too many."""
        for pool in self._pools.pools():
            for member in self._pools.ready(pool)[: max(0, -self._pools.missing(pool))]:
                self._pools.withdraw(member)
                self._tasks.spawn(self._pools.discard(member), "discarding a pool member")

    async def check(self, pool: Pool) -> None:
        """Replace members that do not answer, and one of those that are too old.

        Ending a member raises nothing.
        """
        for member in self._pools.ready(pool):
            if not await self._well(member) and self._pools.withdraw(member):
                self._pools.lost(member, "unhealthy", "it does not answer as it should")
                await self._pools.discard(member)
        oldest = self._pools.ready(pool)[:1]
        for member in oldest:
            if time.monotonic() - member.made > self._max_age and self._pools.withdraw(member):
                self._pools.wanted.set()
                await self._pools.discard(member)

    async def _well(self, member: Member) -> bool:
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT):
                return await member.vm.machine.status() == _WELL[member.tier]
        except HostError:  # there is nobody to ask, as while libvirtd is away: it may be well
            return True
        except (Timeout, TimeoutError):  # so it is when libvirtd hangs, and not the VM
            return member.vm.machine.placed
        except TemplatedError:
            return False
