"""How many requests run at once: of all functions, and of those that have a number reserved.

What is reserved for one function is taken from what the others share, used or not. A request of
the others that finds no room waits for its turn, in the order of arrival; one of a function that
uses up its own number is refused at once, as by Lambda.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from templated.errors import Throttled
from templated.services.functions.parts import Versions

_REFRESH = 1.0
_LONGEST_WAIT = 300.0
_RAISE = "try again later, or raise functions.concurrency or functions.queue"


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class _Turn:
    """A request that waits for its turn."""

    function: str
    given: asyncio.Future[None] = field(default_factory=_future)


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
        self._waiting: Counter[str] = Counter()
        self._turns: deque[_Turn] = deque()

    @property
    def concurrency(self) -> int:
        """How many requests run at once at most."""
        return self._concurrency

    def running(self, function: str) -> int:
        """How many requests of a function run."""
        return self._running[function]

    def waiting(self, function: str) -> int:
        """How many requests of a function wait for their turn."""
        return self._waiting[function]

    def enter(self, function: str) -> bool | None:
        """Let a request in: whether it has its part of what is shared; None: it must `wait`.

        Raises Throttled, and NotFound for an unknown function; leaves all counts as they were.
        """
        reserved = self._versions.reserved(function)
        if reserved is not None:
            if self._running[function] >= reserved:
                raise _reserved(function, reserved)
            self._running[function] += 1
            return False
        if self._turns or self._shared >= self._room():
            self._require_queue(function)
            return None
        self._shared += 1
        self._running[function] += 1
        return True

    async def wait(self, function: str) -> None:
        """Wait for a turn; the request then has a part of what is shared.

        Raises Throttled when none comes for long; leaves the queue then, as when cancelled.
        """
        turn = _Turn(function)
        self._turns.append(turn)
        self._waiting[function] += 1
        self._give_turns()
        try:
            async with asyncio.timeout(self._longest_wait):
                await turn.given
        except BaseException as error:
            if turn in self._turns:
                self._turns.remove(turn)
                self._less(self._waiting, function)
            elif turn.given.done() and not turn.given.cancelled() and not turn.given.exception():
                self.leave(function, shared=True)
            if isinstance(error, TimeoutError):
                raise self._full(function, "queue") from None
            raise

    def leave(self, function: str, *, shared: bool) -> None:
        """A request that was let in has ended."""
        self._less(self._running, function)
        if shared:
            self._shared -= 1
        self._give_turns()

    def close(self, error: Exception) -> None:
        """Nobody's turn comes any more: who waits gets the error."""
        while self._turns:
            turn = self._turns.popleft()
            self._less(self._waiting, turn.function)
            if not turn.given.done():
                turn.given.set_exception(error)

    def _give_turns(self) -> None:
        while self._turns and self._shared < self._room():
            turn = self._turns.popleft()
            self._less(self._waiting, turn.function)
            if not turn.given.done():
                self._shared += 1
                self._running[turn.function] += 1
                turn.given.set_result(None)

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
        if self._queue == 0 or self._room() <= 0:
            raise self._full(function, "concurrency", _hint(self._room()))
        if self._waiting[function] >= self._queue:
            raise self._full(function, "queue")

    def _full(self, function: str, reason: str, hint: str = _RAISE) -> Throttled:
        return Throttled(
            f"function {function} cannot run now: {max(self._room(), 0)} requests run at once "
            f"that share what is not reserved, and {self._waiting[function]} of it wait",
            reason=reason,
            hint=hint,
        )

    @staticmethod
    def _less(counts: Counter[str], function: str) -> None:
        counts[function] -= 1
        if not counts[function]:
            del counts[function]


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
