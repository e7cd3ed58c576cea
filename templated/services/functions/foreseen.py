"""What the requests under way will lead to: the router's requests, told to call chains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from templated.scaling.chains import Agenda, Chains, Expected
from templated.services.functions.traces import Span


class Foreseen:
    """Learns from each request, and keeps what is expected (`Router.watchers`).

    All of it runs just after the request has gone on: what is slow or fails here is none of the
    request's.
    """

    def __init__(
        self,
        chains: Chains,
        agenda: Agenda,
        wait: Callable[[str], float],
        told: Callable[[tuple[Expected, ...]], object] = lambda _: None,
    ) -> None:
        """`wait` tells how many seconds a request of a function waits for its handler to begin, at
        most: 0 when an instance is free. `told` gets what is newly expected."""
        self._chains, self._agenda, self._wait, self._told = chains, agenda, wait, told
        self._began: dict[str, float] = {}

    def arrived(self, span: Span) -> None:
        """It came, and is let in."""
        asyncio.get_running_loop().call_soon(self._arrived, span, self._wait(span.function))

    def began(self, span: Span, at: float) -> None:
        """Its handler begins."""
        self._began[span.segment] = at
        asyncio.get_running_loop().call_soon(self._chains.began, span.function, at, span.segment)

    def ended(self, span: Span, at: float) -> None:
        """It is over."""
        began = self._began.pop(span.segment, None)
        if began is not None:
            asyncio.get_running_loop().call_soon(self._chains.ended, span.function, at - began)

    def _arrived(self, span: Span, wait: float) -> None:
        now, chains, caller = span.arrived, self._chains, span.caller
        if caller is None:
            chains.arrived(span.function, now)
        else:
            chains.arrived(span.function, now, caller=caller.function, run=caller.segment)
        self._agenda.arrived(span.function)
        if expected := chains.expected(span.function, now, wait=wait):
            self._agenda.add(span.function, expected)
            self._told(expected)
