"""Pools: VMs that are ready before anyone asks, taken by a pop from a deque.

A member is a slot with a VM and without a clone's row: however the daemon ends, the next one
finds the VM by the slot's UUID and ends it. One transaction makes a member a clone,
`Journal.new_clone`. `refill` keeps the pools at their sizes.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from templated.errors import InvalidRequest
from templated.model.api import PoolRequest, PoolView, SizeSource, TierView
from templated.model.clone import StartPath
from templated.model.lifecycle import move
from templated.model.spec import PoolSpec
from templated.services.context import Context
from templated.services.machines.generation import Generation, Lease
from templated.services.machines.slots import PreparedSlot
from templated.services.machines.vm import Vm
from templated.services.pools.capacity import Demand, require_room
from templated.services.tasks import Tasks
from templated.services.templates.catalog import Templates

log = logging.getLogger(__name__)
TIERS = (StartPath.WARM, StartPath.STANDBY)
"""The paths that pools serve, the fastest first."""
# What making a warm member takes while none was made, in seconds.
_REFILL = 5.0
Pool = tuple[str, StartPath]
"""A template and a tier."""


class MemberState(enum.Enum):
    """Where a pool's member is in its life."""

    MADE = "made"
    """Ready, but not in a pool yet: its maker owns it."""
    WAITING = "waiting"
    """In its pool: the next request can have it."""
    TAKEN = "taken"
    """Out of its pool: who took it owns it, and makes it a clone or discards it."""
    DISCARDED = "discarded"
    """Being removed, with all that it had."""


MEMBER_TRANSITIONS: dict[MemberState, frozenset[MemberState]] = {
    MemberState.MADE: frozenset({MemberState.WAITING, MemberState.DISCARDED}),
    MemberState.WAITING: frozenset({MemberState.TAKEN}),
    MemberState.TAKEN: frozenset({MemberState.DISCARDED}),
    MemberState.DISCARDED: frozenset(),
}


@dataclass(eq=False)
class Member:
    """A VM that waits in a pool."""

    tier: StartPath
    generation: Generation
    prepared: PreparedSlot
    vm: Vm
    lease: Lease
    lag: float = 0.0
    """For a warm member, the seconds that its guest ran between its clock's mark and its pause."""
    made: float = field(default_factory=time.monotonic)
    state: MemberState = MemberState.MADE

    def move(self, state: MemberState) -> None:
        """Change the state. Raises Defect for a move that the table does not have."""
        what = f"pool member {self.vm.slot.id}"
        self.state = move(MEMBER_TRANSITIONS, self.state, state, what)

    @property
    def pool(self) -> Pool:
        return self.generation.template, self.tier


class Pools:
    """The members of all templates, and how many there must be."""

    def __init__(self, context: Context, tasks: Tasks, templates: Templates) -> None:
        self._context = context
        self._tasks = tasks
        self._templates = templates
        self._set: dict[str, PoolSpec] = {}
        self._followed: dict[str, int] = {}
        """Warm members that functions are about to need, of templates with no size of their own."""
        self._took: dict[Pool, float] = {}
        self._ready: dict[Pool, deque[Member]] = defaultdict(deque)
        self._bytes: dict[tuple[str, StartPath], int] = {}
        self._closing = False
        self._requests = 0
        self.idle = asyncio.Event()
        """Set while no request is being served."""
        self.idle.set()
        self.wanted = asyncio.Event()
        """Set when there may be something to make or to take down."""
        self.problems: dict[Pool, str] = {}
        """Why a pool is not filled at present, in one line."""

    async def open(self) -> None:
        """Read the sizes that were set at run time. Raises HostError."""
        self._set = await self._context.journal.pool_sizes()
        self.refresh()

    # --- members ------------------------------------------------------------------------------

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is served, no new members are begun."""
        self._requests += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self.idle.set()

    def take(self, generation: Generation, tier: StartPath) -> Member | None:
        """A ready member, which the caller then owns. Counts a miss when there is none: None."""
        pool = (generation.template, tier)
        self.wanted.set()
        while self._ready[pool]:
            member = self._ready[pool][0]
            self.withdraw(member)
            if member.generation.id == generation.id and not member.vm.machine.exited.done():
                return member
            self._tasks.spawn(self.discard(member), "discarding a pool member")
        if self.target(pool):
            self._context.metrics.pool_misses.labels(*pool).inc()
        return None

    def offer(self, member: Member) -> bool:
        """Take in a new member. False when it is no longer wanted: then its maker still owns it."""
        serving = self._templates.generation(member.pool[0])
        current = serving is not None and serving.id == member.generation.id
        wanted = current and self.missing(member.pool) > 0
        if self._closing or not wanted or member.vm.machine.exited.done():
            return False
        member.move(MemberState.WAITING)
        self._ready[member.pool].append(member)
        self._count_ready(member.pool)
        member.vm.machine.exited.add_done_callback(lambda _: self._ended(member))
        return True

    def _ended(self, member: Member) -> None:
        """A member's VM ended while it waited: it is never handed out."""
        if self._closing or not self.withdraw(member):
            return
        how = f"its VM {member.vm.machine.exited.result()}"
        self.lost(member, "exited", how)
        self._tasks.spawn(self.discard(member), "discarding a pool member")

    def lost(self, member: Member, reason: str, how: str) -> None:
        """Count and report a member that can no longer be used."""
        template, tier = member.pool
        self._context.metrics.refill_failures.labels(template, tier, reason).inc()
        self._context.events.emit(
            "pool.member_lost", template, tier=tier.value, reason=how, slot=member.vm.slot.id
        )
        self.wanted.set()

    def withdraw(self, member: Member) -> bool:
        """Take out this member, which the caller then owns. False when it was taken already."""
        try:
            self._ready[member.pool].remove(member)
        except ValueError:
            return False
        member.move(MemberState.TAKEN)
        self._count_ready(member.pool)
        return True

    async def discard(self, member: Member) -> None:
        """End a member that the caller owns, and give back all that it had.

        Raises Defect for one that still waits, or was discarded already.
        """
        member.move(MemberState.DISCARDED)
        await self._context.slots.give_back(member.prepared)
        await member.lease.end()

    async def retire(self, generation: str) -> None:
        """End all members of a generation that no longer serves. Raises nothing."""
        members = [m for m in self.members() if m.generation.id == generation]
        taken = [member for member in members if self.withdraw(member)]
        await asyncio.gather(*(self.discard(member) for member in taken))
        self.refresh()

    async def close(self) -> None:
        """End all members, and take in no new ones. Raises nothing."""
        self._closing = True
        taken = [member for member in self.members() if self.withdraw(member)]
        await asyncio.gather(*(self.discard(member) for member in taken))

    def members(self) -> Iterator[Member]:
        """All members that wait."""
        for waiting in list(self._ready.values()):
            yield from list(waiting)

    # --- sizes --------------------------------------------------------------------------------

    def sizes(self, template: str) -> PoolSpec:
        """How many members a template must have: as set at run time, or as in its spec, or as its
        functions need them when neither says a number."""
        if template in self._set:
            return self._set[template]
        said = self._said(template)
        return PoolSpec(warm=self._followed.get(template, 0)) if said == PoolSpec() else said

    def _said(self, template: str) -> PoolSpec:
        generation = self._templates.generation(template)
        return generation.manifest.spec.pool if generation else PoolSpec()

    def source(self, template: str) -> SizeSource:
        """Who says these sizes."""
        if template in self._set:
            return "set"
        followed = self._said(template) == PoolSpec() and self._followed.get(template)
        return "scaling" if followed else "template"

    def follow(self, template: str, warm: int) -> None:
        """Have so many warm members for the functions of a template, unless somebody has said a
        number. More than the host holds are not made (see `refill`)."""
        if self._followed.get(template, 0) != warm:
            self._followed[template] = warm
            self.refresh()

    def took(self, pool: Pool, seconds: float) -> None:
        """A member was made in so many seconds."""
        self._took[pool] = seconds

    def refill_time(self, template: str) -> float:
        """Seconds that a warm member takes to be made, as far as is known."""
        return self._took.get((template, StartPath.WARM), _REFILL)

    def target(self, pool: Pool) -> int:
        """How many members a pool must have."""
        template, tier = pool
        sizes = self.sizes(template)
        return sizes.warm if tier is StartPath.WARM else sizes.standby

    def missing(self, pool: Pool) -> int:
        """Members that a pool lacks; negative when it has too many."""
        return self.target(pool) - len(self._ready[pool])

    def ready(self, pool: Pool) -> list[Member]:
        """The members that wait, oldest first."""
        return list(self._ready[pool])

    def pools(self) -> list[Pool]:
        """The pools of all templates that serve, warm ones first."""
        return [(template, tier) for tier in TIERS for template in self._templates.built()]

    def measured(self, member: Member, size: int) -> None:
        """Remember what one member of a generation's tier costs, in bytes."""
        self._bytes[member.generation.id, member.tier] = size

    def cost(self, generation: Generation, tier: StartPath) -> int:
        """Memory that one more member takes, in bytes: as measured, or as the canary took."""
        return self._bytes.get((generation.id, tier), generation.manifest.clone_bytes)

    async def set(self, template: str, request: PoolRequest) -> PoolView:
        """Set sizes and keep them over restarts; refused when the host cannot hold them.

        Raises NotFound, InvalidRequest, and Busy with the arithmetic.
        """
        generation = self._templates.active(template)
        if request.reset and (request.standby is not None or request.warm is not None):
            raise InvalidRequest("reset and sizes exclude each other", hint="give one of them")
        before = self.sizes(template)
        sizes = generation.manifest.spec.pool if request.reset else _merged(before, request)
        if sizes.standby > before.standby or sizes.warm > before.warm:
            self._require_room(template, sizes)
        await self._context.journal.set_pool(template, None if request.reset else sizes)
        if request.reset:
            self._set.pop(template, None)
        else:
            self._set[template] = sizes
        self.refresh()
        self._context.events.emit("pool.set", template, standby=sizes.standby, warm=sizes.warm)
        return self.view(template)

    async def forget(self, template: str) -> None:
        """Forget the sizes that were set for a template that is removed.

        Raises HostError; then they are forgotten only until the daemon's next start.
        """
        self._set.pop(template, None)
        self._followed.pop(template, None)
        await self._context.journal.set_pool(template, None)
        self.refresh()

    def _require_room(self, template: str, sizes: PoolSpec) -> None:
        demands = []
        for name in self._templates.built():
            generation = self._templates.active(name)
            wanted = sizes if name == template else self.sizes(name)
            if name != template and self.source(name) == "scaling":
                wanted = PoolSpec()  # it gives way to what an operator wants
            for tier, count in ((StartPath.WARM, wanted.warm), (StartPath.STANDBY, wanted.standby)):
                have, cost = len(self._ready[name, tier]), self.cost(generation, tier)
                demands.append(Demand(f"{tier} {name}", count, have, cost))
        require_room(demands, self._context.plan.capacity)

    # --- showing ------------------------------------------------------------------------------

    def views(self) -> list[PoolView]:
        """The pools of all templates that serve."""
        return [self.view(template) for template in sorted(self._templates.built())]

    def view(self, template: str) -> PoolView:
        """One template's pools; NotFound when it has no generation."""
        self._templates.active(template)
        warm, standby = ((template, tier) for tier in TIERS)
        problems = dict.fromkeys(self.problems.get(pool, "") for pool in (warm, standby))
        return PoolView(
            template=template,
            standby=TierView(target=self.target(standby), ready=len(self._ready[standby])),
            warm=TierView(target=self.target(warm), ready=len(self._ready[warm])),
            problem="; ".join(filter(None, problems)),
            source=self.source(template),
        )

    def refresh(self) -> None:
        """Set all gauges anew and wake `refill`, as sizes may have changed."""
        self.wanted.set()
        metrics = self._context.metrics
        metrics.pool_size.clear()
        metrics.pool_target.clear()
        for pool in self.pools():
            metrics.pool_target.labels(*pool).set(self.target(pool))
            self._count_ready(pool)

    def _count_ready(self, pool: Pool) -> None:
        self._context.metrics.pool_size.labels(*pool).set(len(self._ready[pool]))


def _merged(before: PoolSpec, request: PoolRequest) -> PoolSpec:
    return PoolSpec(
        standby=before.standby if request.standby is None else request.standby,
        warm=before.warm if request.warm is None else request.warm,
    )
