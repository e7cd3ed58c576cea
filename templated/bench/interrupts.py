"""Ctrl-C and SIGTERM: when one ends a run, everything that the run made is removed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
# Seconds.
_IMPATIENCE = 10.0
_Handler = Callable[[int, FrameType | None], None]


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Both end a run with KeyboardInterrupt, also where SIGINT was ignored by who started it.

    An impatient second one is passed over: the run is cleaning up then, which is bounded.
    """
    last = float("-inf")

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _IMPATIENCE:
            raise KeyboardInterrupt

    return _handled(interrupt)


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """Neither interrupts this block. For cleaning up, every step of which is bounded."""
    return _handled(lambda number, frame: None)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Either is raised only at the end of the block, when all that it made is known."""
    caught: list[int] = []
    with _handled(lambda number, frame: caught.append(number)):
        yield
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
    # Python runs handlers in the main thread only, so no other one is ever interrupted.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, handler)) for number in _NUMBERS]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)
