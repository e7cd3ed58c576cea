"""The thread that talks to the kernel about interfaces."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NAMESPACES = "/run/netns"  # where ip-netns(8) keeps the names


class Worker:
    """One thread, so that calls are in order and a network namespace can be entered.

    A namespace belongs to a thread: only this one enters it, and a process that it starts is
    in it too. pyroute2 could open its socket in a namespace by itself, but forks the whole
    process for it, which a daemon with threads must not do.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._began: float | None = None

    @property
    def stalled(self) -> float:
        """Seconds that the present call has taken so far; 0 when there is none."""
        began = self._began
        return time.monotonic() - began if began is not None else 0.0

    async def run(self, call: Callable[[], T]) -> T:
        """Run `call` in the thread. When this is cancelled, a call that has begun still ends."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, call)

    def _timed(self, call: Callable[[], T]) -> T:
        self._began = time.monotonic()
        try:
            return call()
        finally:
            self._began = None

    async def stop(self) -> None:
        """End the thread after its present call. `run` raises RuntimeError from then on."""
        await asyncio.to_thread(self._pool.shutdown)


def in_namespace(name: str | None, call: Callable[[], T]) -> T:
    """What `call` returns in a named namespace; None: in that of the calling thread. Blocks.

    Raises OSError when the namespace cannot be entered, and what `call` raises.
    """
    if name is None:
        return call()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(enter_namespace, name).result()
        return pool.submit(call).result()


def enter_namespace(name: str) -> None:
    """Move the calling thread, and only it, into a named namespace. Raises OSError.

    Through libc, because os.setns came with Python 3.12.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"{_NAMESPACES}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
