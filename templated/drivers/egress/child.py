"""A program that a forwarder keeps running: started again when it ends, ever more slowly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from templated.drivers.host.programs import missing
from templated.errors import HostError

_log = logging.getLogger(__name__)
_FIRST, _LONGEST = 0.1, 10.0
"""Seconds until a program is started again, which double as long as it does not stay."""
_STAYS = 30.0
_TERM = 2.0


class Child:
    """One program; `before` makes its files, `ended` is called at once when it ends by itself."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        before: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self.name = arguments[0]
        self.restarts = 0
        self.problem = ""
        """Why it does not run; empty while it does."""
        self._arguments = list(arguments)
        self._log = log
        self._before = before
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._again = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._process is not None

    async def keep(self) -> None:
        """Start it, and again whenever it ends, until this is cancelled; then it is ended."""
        wait = _FIRST
        try:
            while True:
                began = time.monotonic()
                try:
                    self._before()
                    how = await self._run()
                except HostError as error:
                    how = error.message
                self.problem = f"{self.name} {how}"
                _log.warning("%s; starting it again in %g s", self.problem, wait)
                self._ended()
                wait = _FIRST if time.monotonic() - began > _STAYS else wait
                self._again.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._again.wait(), wait)
                wait = min(2 * wait, _LONGEST)
                self.restarts += 1
        finally:
            await self._end()

    def restart(self) -> None:
        """Kill it, so that it is started again soon."""
        self._kill(signal.SIGKILL)
        self._again.set()

    async def _run(self) -> str:
        """Run it to its end, and say how it ended. Raises HostError when it cannot be started."""
        process = self._start()
        self._process, self.problem = process, ""
        await _exit(process.pid)
        # Its children go, too: keepalived's sets the addresses.
        self._kill(signal.SIGKILL)
        code = process.wait()
        self._process = None
        _reap()
        return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            with open(self._log, "ab", buffering=0) as output:
                return subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                )
        except FileNotFoundError:
            raise missing(self.name) from None
        except OSError as error:
            raise HostError(f"cannot be started: {error.strerror}") from error

    async def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exit(self._process.pid), _TERM)
        self._kill(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _kill(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


async def _exit(pid: int) -> None:
    """Wait until a child has ended, which is then still to be waited for (pidfd_open(2))."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    pidfd = os.pidfd_open(pid)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _reap() -> None:
    """Take leave of orphans: the first process of a process namespace inherits them.

    Only of those: asyncio and subprocess wait for their own by themselves.
    """
    for _ in range(16):
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None and _adopted(found.si_pid):
                os.waitpid(found.si_pid, os.WNOHANG)
                continue
        return


def _adopted(pid: int) -> bool:
    """Whether a zombie was somebody else's child: then its session is not one that we began."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) != pid
    return False
