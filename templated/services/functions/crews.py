"""The crews of all versions: which instance a request gets, and how many there should be."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from templated.errors import Busy, NotFound
from templated.model.function import Version, named
from templated.services.functions.crew import DRIVEN, Crew, Waiter
from templated.services.functions.instance import Instance
from templated.services.functions.instances import Instances
from templated.services.functions.starts import Room, Starts
from templated.services.reports.events import EventBus
from templated.services.reports.function_metrics import FunctionMetrics

# An instance that was used in the last so many seconds is of use still.
_LATELY = 60.0
# One failure may be chance.
_HOPELESS = 2
_GONE = "it was changed or removed meanwhile"


@dataclass(frozen=True, kw_only=True)
class Supply:
    """The instances of a version and what is asked of them, as a scaler sees it."""

    version: Version
    running: int = 0
    """Requests under way, those that wait for an instance among them."""
    waiting: int = 0
    """Requests that wait for an instance."""
    up: int = 0
    """Instances that serve or rest."""
    resting: int = 0
    starting: int = 0
    aim: int = 0
    """How many instances there should be, whoever said so."""
    kept: int = 0
    """How many of them users have asked to keep: they are not trimmed."""
    pause: float = 0.0
    """Seconds in which none is begun ahead, since the last ones failed."""
    failures: int = 0
    """How often in a row one failed."""
    problem: str = ""
    """How the last one failed; empty once one works."""


class Crews:
    """Hands out instances, and has as many as should be there."""

    def __init__(
        self,
        instances: Instances,
        events: EventBus,
        metrics: FunctionMetrics,
        room: Room,
        current: Callable[[Version], bool],
    ) -> None:
        """`current` tells whether a version is there, and is this one still."""
        self._instances = instances
        self._metrics = metrics
        self._pace = room.pace
        self._current = current
        self._crews: dict[tuple[str, int], Crew] = {}
        self._next: dict[tuple[str, int], Crew] = {}
        self._retired: set[Crew] = set()
        self._starts = Starts(self, instances, events, room, self.offer, self.done)
        self._asked = itertools.count()
        self._closing = False
        self.on_started = self._starts.on_started
        """Told of an instance that came up, and how many seconds that took."""
        self.on_readied: list[Callable[[Version, int], None]] = []
        """Told of a version that has as many instances as its first requests need."""
        metrics.count_crews(self._aims, self._failures)

    def __iter__(self) -> Iterator[Crew]:
        """All crews, also those that do not serve yet, or have retired and are not done."""
        return iter([*self._crews.values(), *self._next.values(), *self._retired])

    def of(self, version: Version) -> Crew:
        """The crew that serves a version as it is now.

        That of an earlier `$LATEST` serves on while it is held; otherwise it retires.
        """
        key = version.function, version.number
        crew = self._crews.get(key)
        if crew is not None and (crew.version is version or crew.version == version):
            return crew
        following = self._next.get(key)
        if crew is not None and following is not None and following.version == version:
            if crew.strength:
                return crew
            self.switch(version)  # nothing of the earlier one is left to serve
            return following
        self.changed(version)
        crew = self._crews[key] = self._crew(version)
        return crew

    def _crew(self, version: Version) -> Crew:
        return Crew(version, self._metrics.expect(version), self._pace)

    async def get(self, crew: Crew) -> Instance:
        """An instance for a request, which must `offer` it again: the one that was used last,
        or the first that comes free, or that is new.

        Raises what a start of an instance raises, or raised lately; NotFound when its version is
        removed, Busy when the daemon ends; leaves no instance taken.
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
        self._starts.attend(crew)
        return await waiter  # bounded: an instance starts, or serves, or it is told the last error

    def offer(self, crew: Crew, instance: Instance) -> None:
        """An instance is free: for who waits longest, or to rest."""
        if instance.served:
            crew.hindered.succeeded()
        waiter = crew.waiter()
        if waiter is not None:
            self._instances.take(instance)
            waiter.set_result(instance)
        elif crew.retired or self._closing:
            self._instances.end(instance, f"{named(crew.version)} is no longer served by it")
        else:
            self._instances.rest(instance, paused=instance.ahead and not instance.served)
            crew.resting.append(instance)

    # --- ahead of requests ------------------------------------------------------------------

    def aim(self, version: Version, count: int, source: str = DRIVEN) -> None:
        """Have so many instances of a version: what lacks is begun in the background, beside
        requests, as far as there is room. Nothing ends: see `trim`.

        Each source has an aim of its own, and the highest counts. While one is `DRIVEN`, idle
        instances do not end by themselves. A version that is gone, or is another one by now, is
        left alone.
        """
        crew = self._there(version)
        if crew is not None:
            crew.aims[source] = max(0, count)
            self._starts.grow_soon()

    def release(self, version: Version, source: str = DRIVEN) -> None:
        """Take an aim back: instances end when no request comes for long, as without one."""
        crew = self._known(version)
        if crew is not None:
            crew.aims.pop(source, None)

    def trim(self, version: Version, count: int) -> int:
        """End so many of a version's instances, those that have rested longest, but none that
        serves and none that its aim would only have begun again; returns how many it ended."""
        crew = self._known(version)
        if crew is None:
            return 0
        spare = min(count, len(crew.resting), len(crew.members) - crew.aim)
        chosen = crew.resting[: max(0, spare)]
        for instance in chosen:
            self._instances.end(instance, "fewer are needed")
        return len(chosen)

    def pause(self, version: Version, count: int) -> None:
        """Pause at once all of a version's instances that rest, but for so many in all: those that
        were used last, and those that serve, count first."""
        crew = self._known(version)
        if crew is not None:
            spare = min(len(crew.members) - count, len(crew.resting))
            for instance in crew.resting[: max(0, spare)]:
                self._instances.pause(instance)

    def _there(self, version: Version) -> Crew | None:
        """Its crew, made if need be; None for a version that is gone, or another one by now."""
        crew = self._known(version)
        return self.of(version) if crew is None and self._current(version) else crew

    def _known(self, version: Version) -> Crew | None:
        key = version.function, version.number
        crews = self._crews.get(key), self._next.get(key)
        return next((crew for crew in crews if crew is not None and crew.version == version), None)

    def room(self, function: str) -> int:
        """How many more instances of a function there may be, with nothing that ends for them."""
        return self._starts.room(function)

    def supplies(self) -> list[Supply]:
        """What there is of each version that has had a request or an aim."""
        return [_supply(crew) for crew in (*self._crews.values(), *self._next.values())]

    def supply(self, version: Version) -> Supply:
        """What there is of one version: nothing of one that no request and no aim has asked for."""
        crew = self._known(version)
        return Supply(version=version) if crew is None else _supply(crew)

    def demand(self, version: Version) -> int:
        """How many instances of a version were of use at once lately: the requests under way, and
        those that have served one and rest only since then."""
        crew = self._known(version)
        if crew is None:
            return 0
        since = asyncio.get_running_loop().time() - _LATELY
        return crew.running + sum(i.served > 0 and i.used >= since for i in crew.resting)

    async def readied(self, version: Version, count: int) -> str:
        """Have so many instances of a version, and wait for them; returns why they will not be
        there, or nothing once they are. Whoever calls bounds the wait.

        An init that fails more than once will go on to. What has come up stays as without this.
        """
        crew = self._there(version)
        if crew is None:
            return _GONE
        source = f"ready-{next(self._asked)}"
        crew.aims[source] = count
        self._starts.grow_soon()
        try:
            while len(crew.members) < count:
                if self._closing:
                    return closing().message
                if crew.retired:
                    return _GONE
                if crew.broken.failures >= _HOPELESS:
                    return crew.problem
                await crew.news.wait()
            for told in self.on_readied:
                told(version, count)
            return ""
        finally:
            crew.aims.pop(source, None)

    # --- what changes -----------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one from now on."""
        key = version.function, version.number
        for crews in (self._crews, self._next):
            crew = crews.get(key)
            if crew is not None and crew.version != version:
                del crews[key]
                self._retire(crew)

    def hold(self, version: Version) -> Version | None:
        """`$LATEST` is another one, and the one that has instances serves on until `switch`.

        Returns that one, or None when there is nothing to hold: `changed` does then.
        """
        key = version.function, version.number
        crew, following = self._crews.get(key), self._next.pop(key, None)
        if following is not None:
            self._retire(following)
        if crew is None or crew.version == version or not crew.strength:
            return None
        self._next[key] = self._crew(version)
        return crew.version

    def held(self, version: Version) -> bool:
        """Whether an earlier one serves in place of this version."""
        following = self._next.get((version.function, version.number))
        return following is not None and following.version == version

    def switch(self, version: Version) -> None:
        """What was held for this version serves no more requests, and this one does."""
        key = version.function, version.number
        if self.held(version):
            following = self._next.pop(key)
            self._retire(self._crews[key])
            self._crews[key] = following
            following.tell()

    def removed(self, function: str, number: int | None) -> list[Instance]:
        """A version is gone, or with None all of a function; who waits for an instance fails.

        Returns the instances that are being ended.
        """
        ending: list[Instance] = []
        for crews in (self._crews, self._next):
            for key in [k for k in crews if k[0] == function and number in (None, k[1])]:
                crew = crews.pop(key)
                ending += crew.resting
                crew.refuse(_removed(crew.version))
                self._retire(crew)
        return ending

    def _retire(self, crew: Crew) -> None:
        crew.retired = True
        self._retired.add(crew)
        if crew.retry is not None:
            crew.retry.cancel()
        for instance in list(crew.resting):
            self._instances.end(instance, f"{named(crew.version)} has changed, or is gone")
        crew.tell()
        self.done(crew)

    def done(self, crew: Crew) -> None:
        """A request of a crew has ended: one that has retired may be done."""
        if crew.retired and crew.idle:
            self._retired.discard(crew)

    def _aims(self) -> dict[tuple[str, ...], int]:
        found: Counter[tuple[str, ...]] = Counter()
        for crew in self:
            if crew.aims and not crew.retired:
                found[_labels(crew)] += crew.aim
        return found

    def _failures(self) -> dict[tuple[str, ...], int]:
        found: dict[tuple[str, ...], int] = {}
        # Of two that are called $LATEST the one that comes.
        for crew in (*self._crews.values(), *self._next.values()):
            found[_labels(crew)] = max(crew.broken.failures, crew.hindered.failures)
        return found

    async def close(self) -> None:
        """End all instances, and start none; who waits for one fails. Raises nothing."""
        self._closing = True
        for crew in self:
            crew.refuse(closing())
            crew.tell()
        await self._starts.close()
        await self._instances.close()


def closing() -> Busy:
    """Why no request is let in while the daemon ends."""
    return Busy("the daemon is ending", hint="try again in a moment")


def _removed(version: Version) -> NotFound:
    return NotFound(
        f"{named(version)} was removed while the request waited", hint="see: templated function ls"
    )


def _labels(crew: Crew) -> tuple[str, str]:
    return crew.version.function, crew.version.label


def _supply(crew: Crew) -> Supply:
    return Supply(
        version=crew.version,
        running=crew.running,
        waiting=len(crew.waiting),
        up=len(crew.members),
        resting=len(crew.resting),
        starting=crew.starting,
        aim=crew.aim,
        kept=crew.kept,
        pause=crew.pause,
        failures=max(crew.broken.failures, crew.hindered.failures),
        problem=crew.problem,
    )
