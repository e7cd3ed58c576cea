"""Moves requests to other versions once instances of these are ready.

A new `$LATEST` takes over when it has as many instances as the one before had of use, or when that
takes too long or fails: the last deploy wins. An alias moves only to what is ready; when that
takes too long or fails nothing has moved, and whoever asked is told.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from templated.errors import Busy, StartError, Timeout
from templated.model.function import Alias, UpdateView, Version, named
from templated.services.functions.crews import Crews
from templated.services.functions.registry import Registry
from templated.services.reports.events import EventBus
from templated.services.tasks import Tasks

PATIENCE = 60.0
"""Seconds that instances may take to be ready, by default."""
# A part of the requests varies more than all of them do: so many standard deviations are added.
_MARGIN = 2.0


@dataclass(eq=False)
class _Update:
    """A change of `$LATEST` on its way."""

    version: Version
    view: UpdateView
    deadline: float
    """By the loop's clock."""
    timeout: asyncio.Timeout | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class _Need:
    """Instances of a version that are to be ready."""

    version: Version
    count: int


class Shifts:
    """All moves of one daemon that are under way."""

    def __init__(
        self,
        registry: Registry,
        crews: Crews,
        tasks: Tasks,
        events: EventBus,
        patience: float = PATIENCE,
    ) -> None:
        self._registry = registry
        self._crews = crews
        self._tasks = tasks
        self._events = events
        self._patience = patience
        self._updates: dict[str, _Update] = {}

    # --- $LATEST --------------------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one (`Registry.on_changed`)."""
        before = None if version.number else self._crews.hold(version)
        if before is None:
            self._crews.changed(version)
            if not version.number:
                self._updates.pop(version.function, None)
            return
        count = max(1, self._crews.demand(before), self._registry.kept(version))
        wanted = self._fitting(version, count)
        deadline = asyncio.get_running_loop().time() + self._patience
        update = _Update(version, UpdateView(done=False, wanted=wanted, ready=0), deadline)
        self._updates[version.function] = update
        self._tasks.spawn(self._update(update), f"readying of {named(version)}")

    async def _update(self, update: _Update) -> None:
        version, wanted, problem = update.version, update.view.wanted, ""
        try:
            async with asyncio.timeout_at(update.deadline) as update.timeout:
                problem = await self._crews.readied(version, wanted)
            if not wanted:
                problem = "there was no room for its instances beside those that served"
        except TimeoutError:
            problem = f"only {self._up(version)} of {wanted} instances were ready in time"
        except asyncio.CancelledError:
            update.done.set()
            raise
        self._took_over(update, problem)

    def _took_over(self, update: _Update, problem: str) -> None:
        """Let requests go to the new one, unless another has come meanwhile."""
        if update.view.done:
            return
        version = update.version
        ready = min(self._up(version), update.view.wanted)
        update.view = replace(update.view, done=True, ready=ready, problem=problem)
        if self._crews.held(version):
            self._crews.switch(version)
            self._tell(version, ready, update.view.wanted, problem)
        update.done.set()

    def hurry(self, name: str, seconds: float) -> None:
        """Bound what the new `$LATEST` of a function may take from now on; 0: requests go to it
        at once, and what is to be ready of it follows."""
        update = self._updates.get(name)
        if update is None or update.view.done:
            return
        if seconds <= 0:
            self._took_over(update, "")
            return
        update.deadline = asyncio.get_running_loop().time() + seconds
        if update.timeout is not None and not update.timeout.expired():
            update.timeout.reschedule(update.deadline)

    async def settled(self, name: str) -> None:
        """Wait until requests of a function go to its `$LATEST`; bounded, as that is."""
        update = self._updates.get(name)
        if update is not None:
            await update.done.wait()

    def update(self, name: str) -> UpdateView | None:
        """How the last change of `$LATEST` is going; None when none had to be waited for."""
        update = self._updates.get(name)
        if update is None or update.view.done:
            return update.view if update else None
        ready = min(self._up(update.version), update.view.wanted)
        return replace(update.view, ready=ready)

    async def removed(self, function: str, number: int | None) -> None:
        """A function or a version of it is gone (`Registry.on_removed`)."""
        if number is None:
            self._updates.pop(function, None)

    # --- aliases --------------------------------------------------------------------------------

    async def move(
        self,
        name: str,
        alias: str,
        versions: Mapping[str, float],
        *,
        description: str | None = None,
        within: float | None = None,
    ) -> Alias:
        """Point an alias elsewhere once instances of what gets more are ready; `within` so many
        seconds, 0: at once.

        Raises what `Registry.set_alias` raises; StartError when instances fail, Timeout when they
        take too long, Busy when there is no room for any. Leaves the alias as it was then.
        """
        within = self._patience if within is None else within
        wanted = self._registry.pointed(name, alias, versions)
        before = next((one for one in self._registry.aliases(name) if one.name == alias), None)
        needs = self._needs(wanted) if within > 0 else []
        if needs:
            await self._ready(f"alias {alias} of {name} has not moved", needs, within)
        moved = await self._registry.set_alias(
            name, alias, versions, description=description, expected=before if needs else None
        )
        for need in needs:
            self._tell(need.version, need.count, need.count, "", alias=alias)
        return moved

    async def _ready(self, what: str, needs: list[_Need], within: float) -> None:
        for need in needs:
            if not need.count:
                raise Busy(
                    f"{what}: there is no room for an instance of {named(need.version)} beside "
                    "those that serve",
                    hint="move it without: --now; or raise functions.concurrency, or its max",
                )
        waits = [self._crews.readied(need.version, need.count) for need in needs]
        try:
            async with asyncio.timeout(within):
                problems = await asyncio.gather(*waits)
        except TimeoutError:
            raise Timeout(
                f"{what}: after {within:g} s {self._so_far(needs)}",
                hint="wait longer: --wait SECONDS; or move it at once: --now",
            ) from None
        for need, problem in zip(needs, problems, strict=True):
            if problem:
                raise StartError(
                    f"{what}: no instance of {named(need.version)} can be had: {problem}",
                    phase="init",
                    reason="guest",
                    hint=f"see: templated function logs {need.version.function}",
                )

    def _so_far(self, needs: list[_Need]) -> str:
        parts = (f"{self._up(n.version)} of {n.count} of {named(n.version)}" for n in needs)
        return f"{', '.join(parts)} are ready"

    def follow(self, wanted: Alias) -> None:
        """An alias was written, and requests go where they went (`hold`): let them follow when
        instances are ready, or after a while in any case."""
        needs = self._needs(wanted)
        if needs:
            work = self._follow(wanted, needs)
            self._tasks.spawn(work, f"move of {wanted.function}:{wanted.name}")
        else:
            self._registry.release(wanted)

    async def _follow(self, wanted: Alias, needs: list[_Need]) -> None:
        problem = ""
        try:
            async with asyncio.timeout(self._patience):
                waits = [self._crews.readied(need.version, need.count) for need in needs]
                problem = next(filter(None, await asyncio.gather(*waits)), "")
        except TimeoutError:
            problem = f"after {self._patience:g} s {self._so_far(needs)}"
        finally:
            self._registry.release(wanted)
        for need in needs:
            self._tell(need.version, self._up(need.version), need.count, problem, wanted.name)

    def _needs(self, wanted: Alias) -> list[_Need]:
        """The instances that versions need before they get more requests of an alias."""
        routed = self._registry.routed(wanted.function, wanted.name)
        if routed is None:
            return []
        old = [self._registry.version(wanted.function, label) for label in routed.versions]
        supplies = [self._crews.supply(version) for version in old]
        # Both are of the last minute, but not of the same moment of it: no sum of these.
        most = max(self._crews.demand(version) for version in old)
        demand = max(most, sum(supply.running for supply in supplies))
        served = any(supply.up for supply in supplies)
        needs = []
        for label, weight in wanted.versions.items():
            if not served or weight <= routed.versions.get(label, 0.0):
                continue
            version = self._registry.version(wanted.function, label)
            count = max(share(demand, weight), self._registry.kept_by(wanted, label))
            needs.append(_Need(version, self._fitting(version, count)))
        return needs

    # --- inside ---------------------------------------------------------------------------------

    def _fitting(self, version: Version, count: int) -> int:
        """As many of them as there can be beside those that serve."""
        supply = self._crews.supply(version)
        return min(count, supply.up + supply.starting + self._crews.room(version.function))

    def _up(self, version: Version) -> int:
        return self._crews.supply(version).up

    def _tell(
        self, version: Version, ready: int, wanted: int, problem: str, alias: str = ""
    ) -> None:
        details = {"alias": alias} if alias else {}
        details |= {"problem": problem} if problem else {}
        self._events.emit(
            "function.shifted",
            version.function,
            version=version.label,
            ready=ready,
            wanted=wanted,
            **details,
        )


def share(demand: int, weight: float) -> int:
    """How many instances a part of the requests needs, of which all need `demand`: at least one,
    with a margin for what of them comes at once by chance, and never more than all need."""
    mean = demand * weight
    return max(1, min(demand, math.ceil(round(mean + _MARGIN * math.sqrt(mean), 6))))
