"""Bounds on waits: every wait of the daemon has one, and all of them end in the same error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from templated.errors import Timeout


@asynccontextmanager
async def within(seconds: float, what: str, *, hint: str = "") -> AsyncIterator[None]:
    """Bound a block: what runs in it is cancelled after `seconds`. Raises Timeout then.

    `what` is the subject of the error's sentence, as in "the start". A TimeoutError that comes
    from inside the block, from a socket for instance, passes as it is.
    """
    bound = asyncio.timeout(seconds)
    try:
        async with bound:
            yield
    except TimeoutError:
        if not bound.expired():
            raise
        raise Timeout(f"{what} took longer than {seconds:g} s", hint=hint) from None
