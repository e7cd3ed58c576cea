"""The crews of all versions: which instance a request gets, and when a new one is started."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from templated.errors import Busy, NotFound, StartError
from templated.model.function import Version
from templated.services.functions.crew import Crew, Waiter
from templated.services.functions.instance import Instance, NotBegun
from templated.services.functions.instances import Instances
from templated.services.reports.function_metrics import FunctionMetrics

log = logging.getLogger(__name__)
# Starts of one version's instances at once. More would not be faster: starts take turns. But who
# waits for one that has not begun may be served by another before.
_AT_ONCE = 8


class Crews:
    """Hands out instances. There are never more than `most`, as far as some of them rest."""

    def __init__(
        self,
        instances: Instances,
        metrics: FunctionMetrics,
        most: int,
        at_once: int = _AT_ONCE,
    ) -> None:
        self._instances = instances
        self._metrics = metrics
        self._most = most
        self._at_once = at_once
        self._crews: dict[tuple[str, int], Crew] = {}
        self._retired: set[Crew] = set()
        self._starts: set[asyncio.Task[None]] = set()
        self._closing = False

    def __iter__(self) -> Iterator[Crew]:
        """All crews, also those that have retired and are not done."""
        return iter([*self._crews.values(), *self._retired])

    def of(self, version: Version) -> Crew:
        """The crew of a version as it is now; that of an earlier `$LATEST` retires."""
        key = version.function, version.number
        crew = self._crews.get(key)
        if crew is not None and (crew.version is version or crew.version == version):
            return crew
        if crew is not None:
            self._retire(crew)
        crew = self._crews[key] = Crew(version, self._metrics.expect(version))
        return crew

    async def get(self, crew: Crew) -> Instance:
        """An instance for a request, which must `offer` it again: the one that was used last,
        or the first that comes free, or that is new.

        Raises what a start of an instance raises, NotFound when its version is removed, Busy
        when the daemon ends; leaves no instance taken.
        """
        return self._taken(crew) or await self._awaited(crew)

    def _taken(self, crew: Crew) -> Instance | None:
        while crew.resting:
            instance = crew.resting.pop()
            if instance.up:
                self._instances.take(instance)
                return instance
        return None

    async def _awaited(self, crew: Crew) -> Instance:
        """The instance that comes free first, or the new one that is started if need be."""
        if self._closing:
            raise closing()
        waiter: Waiter = asyncio.get_running_loop().create_future()
        crew.waiting.append(waiter)
        self._begin_needed(crew)
        return await waiter  # bounded: as long as it waits, an instance of its crew starts

    def offer(self, crew: Crew, instance: Instance) -> None:
        """An instance is free: for who waits longest, or to rest."""
        waiter = crew.waiter()
        if waiter is not None:
            self._instances.take(instance)
            waiter.set_result(instance)
        elif crew.retired or self._closing:
            self._instances.end(instance, f"{named(crew.version)} is no longer served by it")
        else:
            self._instances.rest(instance)
            crew.resting.append(instance)

    def _begin_needed(self, crew: Crew) -> None:
        """Start instances for those that wait: one for each, some at once."""
        while not self._closing and crew.starting < min(len(crew.waiting), self._at_once):
            self._begin(crew)

    def _begin(self, crew: Crew) -> None:
        if self._instances.up() + len(self._starts) >= self._most:
            self._evict()
        crew.starting += 1
        crew.metrics.cold_starts.inc()
        task = asyncio.create_task(self._start(crew), name=f"instance of {named(crew.version)}")
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    async def _start(self, crew: Crew) -> None:
        try:
            outcome = await self._started(crew)
            if _crowded(outcome) and (victim := self._evict()):
                await self._instances.ended(victim)
                outcome = await self._started(crew)
        finally:
            crew.starting -= 1
            self.done(crew)
        if isinstance(outcome, Instance):
            self.offer(crew, outcome)
        elif len(crew.waiting) > crew.starting and (waiter := crew.waiter()):
            waiter.set_exception(outcome)
        else:  # who waited was served by another one
            log.warning("no new instance of %s: %s", named(crew.version), outcome)
        self._begin_needed(crew)

    async def _started(self, crew: Crew) -> Instance | BaseException:
        def left(instance: Instance) -> None:
            if instance in crew.resting:
                crew.resting.remove(instance)

        work = self._instances.start(crew.version, left)
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, Instance) and outcome.gone:
            return NotBegun(outcome.gone)
        return outcome

    def _evict(self) -> Instance | None:
        """End the instance that has rested longest, of whichever function, to make room."""
        oldest = [crew.resting[0] for crew in self._crews.values() if crew.resting]
        if not oldest:
            return None
        victim = min(oldest, key=lambda instance: instance.used)
        self._instances.end(victim, "another function needs the room")
        return victim

    # --- what changes -----------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one from now on."""
        crew = self._crews.get((version.function, version.number))
        if crew is not None and crew.version != version:
            del self._crews[version.function, version.number]
            self._retire(crew)

    def removed(self, function: str, number: int | None) -> list[Instance]:
        """A version is gone, or with None all of a function; who waits for an instance fails.

        Returns the instances that are being ended.
        """
        gone = [key for key in self._crews if key[0] == function and number in (None, key[1])]
        ending: list[Instance] = []
        for key in gone:
            crew = self._crews.pop(key)
            ending += crew.resting
            crew.refuse(_removed(crew.version))
            self._retire(crew)
        return ending

    def _retire(self, crew: Crew) -> None:
        crew.retired = True
        self._retired.add(crew)
        for instance in list(crew.resting):
            self._instances.end(instance, f"{named(crew.version)} has changed, or is gone")
        self.done(crew)

    def done(self, crew: Crew) -> None:
        """A request of a crew has ended: one that has retired may be done."""
        if crew.retired and crew.idle:
            self._retired.discard(crew)

    async def close(self) -> None:
        """End all instances, and start none; who waits for one fails. Raises nothing."""
        self._closing = True
        for crew in self:
            crew.refuse(closing())
        starts = set(self._starts)
        for start in starts:
            start.cancel()
        if starts:
            await asyncio.wait(starts)
        await self._instances.close()


def named(version: Version) -> str:
    """A version, as people read it."""
    return f"{version.function}:{version.label}"


def closing() -> Busy:
    """Why no request is let in while the daemon ends."""
    return Busy("the daemon is ending", hint="try again in a moment")


def _crowded(outcome: object) -> bool:
    """Whether a start failed because the host, or a limit, has no room for another VM."""
    if isinstance(outcome, StartError):
        return outcome.reason == Busy.code
    return isinstance(outcome, Busy)


def _removed(version: Version) -> NotFound:
    return NotFound(
        f"{named(version)} was removed while the request waited", hint="see: templated function ls"
    )
