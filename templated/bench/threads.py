"""Threads that have ended when their caller goes on, also after Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from templated.bench.interrupts import deferred, uninterrupted


def run_threads(works: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Run each in a thread of its own until all have returned. None may raise.

    `stop` is called when all have ended, or at Ctrl-C: it must make them end soon.
    """
    ended = threading.Semaphore(0)

    def whole(work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            ended.release()

    threads = [threading.Thread(target=whole, args=(work,)) for work in works]
    try:
        with deferred():
            for thread in threads:
                thread.start()
        # Not join: when that is interrupted, Python 3.11 takes the thread for ended.
        for _ in threads:
            ended.acquire()
    finally:
        with uninterrupted():
            stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def together(works: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """As `run_threads`, of what may raise: the first failure stops all, and is raised again."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            failed.append(error)
            stop()

    run_threads([partial(guarded, work) for work in works], stop)
    if failed:
        raise failed[0]
