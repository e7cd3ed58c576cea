"""How many requests run at once: of all functions, and of those that have a number reserved.

What is reserved for one function is taken from what the others share, used or not. A request of
the others that finds no room waits for its turn, in the order of arrival; one of a function that
uses up its own number is refused at once, as by Lambda. A function with a max waits for itself.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from templated.errors import NotFound, Throttled
from templated.services.functions.parts import Versions

_REFRESH = 1.0
_LONGEST_WAIT = 300.0
_RAISE = "try again later, or raise functions.concurrency or functions.queue"


def _future() -> asyncio.Future[bool]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class _Turn:
    """A request that waits for its turn; `given` says whether it has a part of what is shared."""

    function: str
    number: int
    given: asyncio.Future[bool] = field(default_factory=_future)


class Bounds:
    """Counts the requests that run. One that `enter` has let in must `leave`."""

    def __init__(
        self,
        versions: Versions,
        concurrency: int,
        queue: int,
        *,
        longest_wait: float = _LONGEST_WAIT,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._versions = versions
        self._concurrency = concurrency
        self._queue = queue
        self._longest_wait = longest_wait
        self._clock = clock or asyncio.get_running_loop().time
        self._share = 0
        self._share_until = 0.0
        self._shared = 0
        self._running: Counter[str] = Counter()
        self._turns: dict[str, deque[_Turn]] = {}
        self._numbers = itertools.count()

    @property
    def concurrency(self) -> int:
        """How many requests run at once at most."""
        return self._concurrency

    def running(self, function: str) -> int:
        """How many requests of a function run."""
        return self._running[function]

    def waiting(self, function: str) -> int:
        """How many requests of a function wait for their turn."""
        return len(self._turns.get(function, ()))

    def enter(self, function: str) -> bool | None:
        """Let a request in: whether it has its part of what is shared; None: it must `wait`.

        Raises Throttled, and NotFound for an unknown function; leaves all counts as they were.
        """
        reserved = self._versions.reserved(function)
        if reserved is not None and self._running[function] >= reserved:
            raise _reserved(function, reserved)
        shared = reserved is None
        # Who waits for the same comes first: of this function, or of those that share.
        if function in self._turns or (shared and self._next() is not None):
            self._require_queue(function)
            return None
        if self._may_run(function):
            self._let_in(function, shared=shared)
            return shared
        self._require_queue(function)
        return None

    async def wait(self, function: str) -> bool:
        """Wait for a turn; whether the request then has a part of what is shared.

        Raises Throttled when none comes for long; leaves the queue then, as when cancelled.
        """
        turn = _Turn(function, next(self._numbers))
        self._turns.setdefault(function, deque()).append(turn)
        self._give_turns()
        try:
            async with asyncio.timeout(self._longest_wait):
                return await turn.given
        except BaseException as error:
            if turn in self._turns.get(function, ()):
                self._turns[function].remove(turn)
                self._tidy(function)
            elif turn.given.done() and not turn.given.cancelled() and not turn.given.exception():
                self.leave(function, shared=turn.given.result())
            if isinstance(error, TimeoutError):
                raise self._full(function) from None
            raise

    def leave(self, function: str, *, shared: bool) -> None:
        """A request that was let in has ended."""
        self._running[function] -= 1
        if not self._running[function]:
            del self._running[function]
        if shared:
            self._shared -= 1
        self._give_turns()

    def close(self, error: Exception) -> None:
        """Nobody's turn comes any more: who waits gets the error."""
        turns = [turn for turns in self._turns.values() for turn in turns]
        self._turns.clear()
        for turn in turns:
            if not turn.given.done():
                turn.given.set_exception(error)

    # --- turns ------------------------------------------------------------------------------

    def _give_turns(self) -> None:
        while turn := self._next():
            self._turns[turn.function].popleft()
            self._tidy(turn.function)
            if not turn.given.done():
                shared = self._numbers_of(turn.function)[0] is None
                self._let_in(turn.function, shared=shared)
                turn.given.set_result(shared)

    def _next(self) -> _Turn | None:
        """Of those that wait and may run, the one that came first."""
        first = [turns[0] for name, turns in self._turns.items() if self._may_run(name)]
        return min(first, key=lambda turn: turn.number, default=None)

    def _may_run(self, function: str) -> bool:
        """Whether there is room for one more request of a function, whoever else waits."""
        reserved, most = self._numbers_of(function)
        running = self._running[function]
        if most is not None and running >= most:
            return False
        return running < reserved if reserved is not None else self._shared < self._room()

    def _numbers_of(self, function: str) -> tuple[int | None, int | None]:
        """What is reserved for a function, and the most that it may run."""
        try:
            return self._versions.reserved(function), self._versions.maximum(function)
        except NotFound:  # it went while they waited, which they are told when it is their turn
            return None, None

    def _let_in(self, function: str, *, shared: bool) -> None:
        self._running[function] += 1
        self._shared += shared

    def _tidy(self, function: str) -> None:
        if not self._turns[function]:
            del self._turns[function]

    def _room(self) -> int:
        """What functions without a number of their own share.

        Counted anew once a second, and whenever a request would have to wait otherwise.
        """
        present = self._clock()
        if present >= self._share_until or self._shared >= self._share:
            numbers = (self._versions.reserved(name) for name in self._versions.names())
            self._share = self._concurrency - sum(number or 0 for number in numbers)
            self._share_until = present + _REFRESH
        return self._share

    def _require_queue(self, function: str) -> None:
        """Raise Throttled when no request of a function may wait."""
        reserved, most = self._numbers_of(function)
        none = reserved is None and most is None and self._room() <= 0
        if self._queue == 0 or none or self.waiting(function) >= self._queue:
            raise self._full(function)

    def _full(self, function: str) -> Throttled:
        most = self._numbers_of(function)[1]
        waiting = self.waiting(function)
        if most is not None and self._running[function] >= most:
            message = f"function {function} runs {most} requests at once, its max"
            return Throttled(
                f"{message}, and {waiting} of it wait", reason="max", hint=_max_hint(function)
            )
        room = self._room()
        queued = self._queue > 0 and room > 0
        return Throttled(
            f"function {function} cannot run now: {max(room, 0)} requests run at once "
            f"that share what is not reserved, and {waiting} of it wait",
            reason="queue" if queued else "concurrency",
            hint=_RAISE if queued else _hint(room),
        )


def _max_hint(function: str) -> str:
    return f"try again later, or: templated function scale {function} --max N, or none"


def _hint(room: int) -> str:
    """What to do when no request may wait."""
    if room > 0:
        return _RAISE
    return (
        "all of functions.concurrency is reserved: raise it, or give some back: "
        "templated function reserve NAME none"
    )


def _reserved(function: str, reserved: int) -> Throttled:
    if reserved == 0:
        message = f"none of the requests of function {function} may run: 0 is reserved for it"
        hint = f"let them: templated function reserve {function} none, or a number"
    else:
        message = f"function {function} runs {reserved} requests at once, which is all it may"
        hint = f"try again later, or: templated function reserve {function} N, or none"
    return Throttled(message, reason="reserved", hint=hint)
