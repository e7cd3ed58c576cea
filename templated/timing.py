"""Bounds on waits: every wait of the daemon has one, and all of them end in the same error."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from templated.errors import Timeout


def within(seconds: float, what: str, *, hint: str = "") -> AbstractAsyncContextManager[None]:
    """Bound a block: what runs in it is cancelled after `seconds`. Raises Timeout then.

    `what` is the subject of the error's sentence, as in "the start". A TimeoutError that comes
    from inside the block, from a socket for instance, passes as it is.
    """
    return _Within(seconds, what, hint)


class _Within:
    """A class and no generator: it is on the path of every start."""

    __slots__ = ("_bound", "_hint", "_seconds", "_what")

    def __init__(self, seconds: float, what: str, hint: str) -> None:
        self._seconds, self._what, self._hint = seconds, what, hint

    async def __aenter__(self) -> None:
        self._bound = asyncio.timeout(self._seconds)
        await self._bound.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._bound.__aexit__(kind, error, trace)
        except TimeoutError:
            message = f"{self._what} took longer than {self._seconds:g} s"
            raise Timeout(message, hint=self._hint) from None
