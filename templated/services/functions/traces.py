"""Which request made which, by trace ids as Lambda has them.

    Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1

The root stays the same along a chain of calls. Each request has a segment of its own, which is the
Parent that its function is told, and that AWS's clients send along with what the function calls.
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from typing import NamedTuple

HEADER = "X-Amzn-Trace-Id"
MAX_HEADER = 256
"""Characters; a longer one is ignored."""
_ROOT = re.compile(r"1-[0-9a-f]{8}-[0-9a-f]{24}")
_SAMPLED = ("0", "1")
# Requests that are remembered, and for how many seconds: as long as one may run.
_MOST, _AGE = 8192, 900.0


class Caller(NamedTuple):
    """The request that made another one."""

    function: str
    segment: str


class Span(NamedTuple):
    """One request of a function, as part of a chain."""

    function: str
    root: str
    segment: str
    """Its own name in what it calls: 16 hex digits."""
    parent: str
    """What the header named as its caller, known here or not."""
    sampled: str
    caller: Caller | None
    """None: it came from outside, or nothing says from where."""
    arrived: float

    @property
    def header(self) -> str:
        """What its function is told, and passes on."""
        return f"Root={self.root};Parent={self.segment};Sampled={self.sampled}"


class Traces:
    """The requests of the last minutes by their segments. Nothing here raises or waits."""

    def __init__(self, most: int = _MOST, age: float = _AGE) -> None:
        self._most, self._age = most, age
        # The oldest first.
        self._spans: OrderedDict[str, Span] = OrderedDict()
        self._running: dict[str, list[Span]] = {}
        """Those under way, by root."""

    def begin(self, function: str, header: str, now: float) -> Span:
        """A request came, with this header or an empty one; `now` is in seconds, by any clock.

        What is no header of Lambda is ignored, and nothing of it is passed on.
        """
        self._make_room(now)
        root, parent, sampled = _parsed(header)
        if root:
            segment, caller = os.urandom(8).hex(), self._caller(root, parent)
        else:
            drawn = os.urandom(20).hex()
            root, segment = f"1-{int(time.time()):08x}-{drawn[16:]}", drawn[:16]
            caller = None
        span = Span(function, root, segment, parent, sampled, caller, now)
        self._spans[segment] = span
        self._running.setdefault(root, []).append(span)
        return span

    def end(self, span: Span) -> None:
        """It is over. What it left behind to be called later still finds it."""
        running = self._running.get(span.root)
        if running is not None and span in running:
            running.remove(span)
            if not running:
                del self._running[span.root]

    def _caller(self, root: str, parent: str) -> Caller | None:
        span = self._spans.get(parent)
        if span is not None and span.root == root:
            return Caller(span.function, span.segment)
        # A tracing library in the function has put a segment of its own there. It can be but the
        # one that runs, unless both were called by the same.
        running = self._running.get(root, ())
        if len(running) == 1 and running[0].parent != parent:
            return Caller(running[0].function, running[0].segment)
        return None

    def _make_room(self, now: float) -> None:
        spans = self._spans
        while spans:
            oldest = spans[next(iter(spans))]
            # Also when the clock went back: then it is from the future.
            if len(spans) < self._most and 0 <= now - oldest.arrived <= self._age:
                return
            spans.popitem(last=False)


def _parsed(header: str) -> tuple[str, str, str]:
    """Root, parent and whether it is sampled; an empty root for what is no header."""
    if not header or len(header) > MAX_HEADER:
        return "", "", "0"
    fields = {}
    for part in header.split(";"):
        name, _, value = part.strip(" ").partition("=")
        fields[name] = value
    root, sampled = fields.get("Root", ""), fields.get("Sampled", "")
    if not _ROOT.fullmatch(root):
        return "", "", "0"
    return root, fields.get("Parent", ""), sampled if sampled in _SAMPLED else "0"
