"""A process that outlives the daemon: spawned or found again, watched by its pidfd.

pidfd_open(2): the descriptor becomes readable when the process ends, also for a process that is
not our child, so that an adopted VM is watched in the same way as one of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from templated.errors import HostError

_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_TICKS = os.sysconf("SC_CLK_TCK")
_LOWEST = 19
_CAP_SYS_NICE = 23  # linux/capability.h


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (proc(5), stat field 22); None if it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else fields


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def private_bytes(pid: int) -> int:
    """Memory that no other process maps (proc(5), smaps_rollup), in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    private = [line for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))]
    return sum(int(line.split()[1]) << 10 for line in private)


def background(pid: int, on: bool) -> None:
    """Give all threads of a process the lowest or the usual priority, where that can be undone.

    The I/O priority follows (ioprio_set(2): without one of its own, it is derived from nice).
    """
    if not may_raise_priority():
        return
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), _LOWEST if on else 0)


@functools.cache
def may_raise_priority() -> bool:
    """Whether nice can go down again: CAP_SYS_NICE, or an RLIMIT_NICE of 20 (getrlimit(2))."""
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    if int(effective.split()[1], 16) >> _CAP_SYS_NICE & 1:
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or soft >= 20


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def with_argument(words: set[str]) -> list[tuple[str, int]]:
    """The processes that have one of these as an argument: word and pid. Reads all of /proc."""
    if not words:
        return []
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [(word, pid) for pid in pids for word in words.intersection(command_line(pid))]


def use_small_pages() -> None:
    """Keep this process, and every one that it starts from now on, off transparent huge pages.

    QEMU asks for them for the code that TCG translates (tcg/region.c) and for its tables, of which
    an idle clone uses parts: they cost it megabytes. prctl(2): inherited, and kept by execve. Where
    the kernel has none it refuses, and nothing is lost.
    """
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


class Process:
    """One child, or an adopted process, and a future for its end.

    Must be made on a running event loop. `close` gives the pidfd back once the process ended.
    """

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self._child = child
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @functools.cached_property
    def start_time(self) -> int:
        """Start in clock ticks since boot; 0 when it has ended already.

        The first reading waits while the process is in execve, some milliseconds.
        """
        return start_time(self.pid) or 0

    @classmethod
    def spawn(cls, arguments: Sequence[str], *, log: Path, fds: Sequence[int]) -> Process:
        """Start a process in a session of its own; HostError when that is not possible.

        vfork and exec take about a millisecond; a thread would cost as much.
        """
        try:
            with open(log, "ab", buffering=0) as output:
                child = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=fds,
                    start_new_session=True,
                    cwd="/",
                )
        except FileNotFoundError as error:
            raise HostError(
                f"{arguments[0]} is not installed",
                hint="apt install qemu-system-x86, or set `qemu:` in the configuration",
            ) from error
        except OSError as error:
            raise HostError(
                f"cannot start {arguments[0]}: {error.strerror}",
                hint="see `templated doctor`",
            ) from error
        try:
            return cls(child.pid, child)
        except BaseException:
            child.kill()
            child.wait()
            raise

    @classmethod
    def adopt(cls, pid: int, started: int, marker: str) -> Process | None:
        """Watch a process of an earlier daemon; None unless pid, start time and marker agree."""
        if start_time(pid) != started or marker not in command_line(pid):
            return None
        try:
            process = cls(pid, None)
        except ProcessLookupError:
            return None
        if process.start_time != started:
            process.close()
            return None
        return process

    def kill(self) -> None:
        """SIGKILL, through the pidfd, so that no other process can be hit."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Stop watching. The process goes on if it still runs."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._child is not None and self._child.returncode is None:
            # It outlives us on purpose; Popen would warn of that.
            self._child.returncode = 0

    def _on_exit(self) -> None:
        how = "ended"
        if self._child is not None:
            code = self._child.poll()
            if code is None:  # the pidfd can be a moment ahead of waitpid
                code = self._child.wait()
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            )
        self.close()
        if not self.exited.done():
            self.exited.set_result(how)
