"""Begins instances of all versions: for requests that wait, and ahead of them.

Requests come first. For each that waits one instance is begun, some of a version at once, and the
one that has rested longest makes room. Ahead of requests only so much is begun that starts are
left to them, and nothing ends for it. A version whose instances fail is tried again later and
later, whoever wants them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from templated.errors import Busy, GuestError, StartError
from templated.model.config import LimitConfig
from templated.model.function import Version, named
from templated.services.functions.backoff import Pace
from templated.services.functions.crew import Crew, reason
from templated.services.functions.instance import InitError, Instance, NotBegun
from templated.services.functions.instances import Instances
from templated.services.reports.events import EventBus

log = logging.getLogger(__name__)
# An instance that dies sooner, in seconds, and has served nothing would only be replaced by
# another one that dies.
_SOON = 60.0


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many instances there are, and how many starts at once."""

    most: int
    """Instances in all, as far as some of them rest that nobody has asked to keep."""
    at_once: int
    """Starts of one version for requests. Each keeps a CPU busy: with more than there are CPUs the
    first would only come up later, and it may serve who waits for one that has not begun."""
    ahead: int
    """With so many starts under way, whatever for, none is begun ahead of requests."""
    of_function: Callable[[str], int | None] = lambda _: None
    """Instances of one function at most; None: it has no bound of its own."""
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def of(cls, limits: LimitConfig, most: int, of_function: Callable[[str], int | None]) -> Room:
        """As configured, on the CPUs of this host."""
        turns, cpus = limits.concurrent_starts, host_starts()
        return cls(
            most=most,
            at_once=min(turns, cpus),
            # Half of the turns are always left to requests.
            ahead=max(1, min(turns // 2, cpus)),
            of_function=of_function,
        )


def host_starts() -> int:
    """Starts that this host does side by side: one for each CPU that the daemon may use, and two
    at least, since a start waits at times, too."""
    return max(2, len(os.sched_getaffinity(0)))


class Starts:
    """All starts of instances that are under way. `len` is their number."""

    def __init__(
        self,
        crews: Iterable[Crew],
        instances: Instances,
        events: EventBus,
        room: Room,
        offer: Callable[[Crew, Instance], None],
        done: Callable[[Crew], None],
    ) -> None:
        """`offer` takes an instance that is new; `done` is told when a start of a crew ended."""
        self._crews = crews
        self._instances = instances
        self._events = events
        self._room = room
        self._offer = offer
        self._done = done
        self._tasks: set[asyncio.Task[None]] = set()
        self._growing: asyncio.Handle | None = None
        self._closing = False
        self.on_started: list[Callable[[Version, float], None]] = []
        """Told of an instance that came up, and how many seconds that took."""

    def __len__(self) -> int:
        return len(self._tasks)

    # --- for requests -----------------------------------------------------------------------

    def attend(self, crew: Crew) -> None:
        """See to the requests of a crew that wait.

        While its instances fail they wait for one that comes free. When there is none to wait
        for, they get the error of the last failure.
        """
        if crew.waiting and crew.broken.wait:
            if crew.strength:
                self._wake(crew, crew.broken.wait)
                return
            while waiter := crew.waiter():
                waiter.set_exception(_repeated(crew))
        # After a failure one try says whether it works again.
        most = 1 if crew.broken.failures else self._room.at_once
        while not self._closing and crew.starting < min(len(crew.waiting), most):
            self._make_room(crew)
            crew.metrics.cold_starts.inc()
            self._begin(crew, ahead=False)

    def _make_room(self, crew: Crew) -> None:
        function = crew.version.function
        most = self._room.of_function(function)
        if most is not None and self.of(function) >= most:
            self._evict(function)
        elif self._total() >= self._room.most:
            self._evict()

    def _evict(self, function: str | None = None) -> Instance | None:
        """End the instance that has rested longest to make room: of that function, or of any.

        What is kept for another function stays.
        """
        resting = [
            crew.resting[0]
            for crew in self._crews
            if crew.resting
            and (
                len(crew.members) > crew.kept
                if function is None
                else crew.version.function == function
            )
        ]
        if not resting:
            return None
        victim = min(resting, key=lambda instance: instance.used)
        self._instances.end(victim, "another instance needs the room")
        return victim

    # --- ahead of them ----------------------------------------------------------------------

    def grow_soon(self) -> None:
        """Begin what is wanted ahead, once all that happens now has happened."""
        if self._growing is None and not self._closing:
            self._growing = asyncio.get_running_loop().call_soon(self._grow)

    def _grow(self) -> None:
        self._growing = None
        while not self._closing and len(self._tasks) < self._room.ahead:
            crew = self._neediest()
            if crew is None:
                return
            self._begin(crew, ahead=True)

    def _neediest(self) -> Crew | None:
        """The crew that has the least of what it should have, and room for more."""
        if self._total() >= self._room.most:
            return None
        found = [crew for crew in self._crews if crew.strength < crew.aim and self._may_grow(crew)]
        return min(found, key=lambda crew: crew.strength / crew.aim, default=None)

    def _may_grow(self, crew: Crew) -> bool:
        if crew.pause:
            self._wake(crew, crew.pause)
            return False
        most = self._room.of_function(crew.version.function)
        return most is None or self.of(crew.version.function) < most

    def room(self, function: str) -> int:
        """How many more instances of a function there may be, without one that ends for them."""
        left = self._room.most - self._total()
        most = self._room.of_function(function)
        return max(0, left if most is None else min(left, most - self.of(function)))

    def of(self, function: str) -> int:
        """The instances of all versions of a function, with those that come up."""
        return sum(crew.strength for crew in self._crews if crew.version.function == function)

    def _total(self) -> int:
        return self._instances.up() + len(self._tasks)

    # --- one start --------------------------------------------------------------------------

    def _begin(self, crew: Crew, *, ahead: bool) -> None:
        crew.starting += 1
        task = asyncio.create_task(
            self._start(crew, ahead=ahead), name=f"instance of {named(crew.version)}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.grow_soon()

    async def _start(self, crew: Crew, *, ahead: bool) -> None:
        began = asyncio.get_running_loop().time()
        try:
            outcome = await self._started(crew)
            if not ahead and _crowded(outcome) and (victim := self._evict()):
                await self._instances.ended(victim)
                outcome = await self._started(crew)
        finally:
            crew.starting -= 1
            self._done(crew)
        if ahead:
            crew.metrics.ahead(isinstance(outcome, Instance))
        if isinstance(outcome, Instance):
            self._came_up(crew, outcome, ahead=ahead)
            for told in self.on_started:
                told(crew.version, asyncio.get_running_loop().time() - began)
        else:
            self._failed(crew, outcome, began)
        crew.tell()
        self.attend(crew)

    async def _started(self, crew: Crew) -> Instance | BaseException:
        work = self._instances.start(
            crew.version, lambda instance: self._left(crew, instance), crew.may_end
        )
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, Instance) and outcome.gone:
            return NotBegun(outcome.gone)
        return outcome

    def _came_up(self, crew: Crew, instance: Instance, *, ahead: bool) -> None:
        crew.broken.succeeded()
        if not isinstance(crew.hindered.error, NotBegun):
            crew.hindered.succeeded()
        crew.members.add(instance)
        instance.ahead = ahead
        self._offer(crew, instance)

    def _failed(self, crew: Crew, error: BaseException, began: float) -> None:
        backoff = crew.broken if _own(error) else crew.hindered
        if backoff.failed(began, error) and not self._closing:
            self._tell(crew, error)
        if len(crew.waiting) > crew.starting and (waiter := crew.waiter()):
            waiter.set_exception(error)
        else:  # nobody waits, or who did was served by another one
            log.warning("no new instance of %s: %s", named(crew.version), error)

    def _left(self, crew: Crew, instance: Instance) -> None:
        """An instance of a crew begins to end."""
        rested = instance in crew.resting
        if rested:
            crew.resting.remove(instance)
        if instance not in crew.members:
            return
        crew.members.remove(instance)
        loop = asyncio.get_running_loop()
        if rested and instance.died and not instance.served:
            if loop.time() - instance.used > _SOON:
                crew.hindered.succeeded()
            error = NotBegun(instance.gone)
            if crew.hindered.failed(loop.time(), error) and crew.aim:
                self._tell(crew, error)
        loop.call_soon(self.attend, crew)
        self.grow_soon()

    # --- trying again -----------------------------------------------------------------------

    def _tell(self, crew: Crew, error: BaseException) -> None:
        """Nothing is begun ahead for some time, and for requests neither if it is the function's
        own fault."""
        failures = max(crew.broken.failures, crew.hindered.failures)
        self._events.emit(
            "function.backing_off",
            crew.version.function,
            version=crew.version.label,
            failures=failures,
            seconds=round(crew.pause, 1),
            reason=reason(error),
        )

    def _wake(self, crew: Crew, wait: float) -> None:
        """Look after a crew again then, or before if that was wanted."""
        loop = asyncio.get_running_loop()
        if crew.retry is not None:
            if crew.retry.when() <= loop.time() + wait:
                return
            crew.retry.cancel()
        crew.retry = loop.call_later(wait, self._look, crew)

    def _look(self, crew: Crew) -> None:
        crew.retry = None
        self.attend(crew)
        self.grow_soon()

    async def close(self) -> None:
        """Begin nothing any more, and end the starts that are under way. Raises nothing."""
        self._closing = True
        for crew in self._crews:
            if crew.retry is not None:
                crew.retry.cancel()
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _crowded(outcome: object) -> bool:
    """Whether a start failed because the host, or a limit, has no room for another VM."""
    if isinstance(outcome, StartError):
        return outcome.reason == Busy.code
    return isinstance(outcome, Busy)


def _own(error: BaseException) -> bool:
    """Whether a start failed by what the function does: its init, or the end of its VM in it."""
    if isinstance(error, StartError):
        return error.phase == "attach" and error.reason == GuestError.code
    return isinstance(error, InitError)


def _repeated(crew: Crew) -> BaseException:
    """The last failure of a crew, for a request that came after it."""
    error, wait = crew.broken.error, crew.broken.wait
    if isinstance(error, InitError):
        return error.again(wait)
    assert isinstance(error, StartError)
    hint = f"it is tried again in {wait:.1f} s; {error.hint}"
    return StartError(error.message, phase=error.phase, reason=error.reason, hint=hint)
