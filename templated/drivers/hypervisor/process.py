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
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from templated import failpoints
from templated.drivers.host.capabilities import (
    CAP_KILL,
    CAP_SETGID,
    CAP_SETUID,
    CAP_SYS_RESOURCE,
    has_capabilities,
    may_raise_priority,
)
from templated.drivers.host.procfs import command_line, start_time, user
from templated.errors import HostError

_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_LOWEST = 19
_THREADS = 512
_ALL_UIDS = ["0", "0", "4294967295"]


def background(pid: int, on: bool) -> None:
    """Give all threads of a process the lowest or the usual priority, where that can be undone.

    The I/O priority follows (ioprio_set(2): without one of its own, it is derived from nice).
    """
    if not may_raise_priority():
        return
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), _LOWEST if on else 0)


def use_small_pages() -> None:
    """Keep this process, and every one that it starts from now on, off transparent huge pages.

    QEMU asks for them for the code that TCG translates (tcg/region.c) and for its tables, of which
    an idle clone uses parts: they cost it megabytes. prctl(2): inherited, and kept by execve. A
    kernel without huge pages refuses the call, which does no harm.
    """
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def limit_files(pid: int, size: int) -> None:
    """Let no file that a process writes become larger. QEMU gets EFBIG, and the guest an I/O error.

    Where `file_limit_problem` says so it may come too late and do nothing, since the process has
    become another user. Does nothing when the process has ended.
    """
    with contextlib.suppress(PermissionError, ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))


def file_limit_problem() -> str:
    """Why processes of other users cannot be limited; empty when they can (prlimit(2))."""
    return "" if has_capabilities(CAP_SYS_RESOURCE) else "this daemon lacks CAP_SYS_RESOURCE"


def limit_children() -> None:
    """Limits of this process that its children inherit.

    No core dump: it would hold a guest's memory. That need not hold for good, as who has taken over
    a VM has its memory anyway; and a libvirtd that we start sets a limit of its own. With a user of
    its own, a VM can have so many threads: QEMU 64 for its disk, beside one for each virtual CPU
    and some of its own. This does not bind the host's root (fork(2)); root of a container it would,
    so there it is left alone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == _ALL_UIDS:
        _, most = resource.getrlimit(resource.RLIMIT_NPROC)
        threads = _THREADS if most == resource.RLIM_INFINITY else min(_THREADS, most)
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))


@dataclass(frozen=True)
class Demotion:
    """The user that a process becomes before its program runs; it can never gain rights again."""

    uid: int
    groups: tuple[int, ...] = ()
    """Beside the group of the same number."""
    landlock: tuple[str, ...] = ()
    """Options that `landlock` makes; none: it may open what its user may."""

    def command(self) -> list[str]:
        """setpriv(1). A change from root to another user gives up all capabilities."""
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        return [
            *("setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", groups),
            *("--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all"),
            *(*self.landlock, "--"),
        ]


def demotion_problem() -> str:
    """Why a child cannot become another user; empty when it can."""
    if os.geteuid() != 0:
        return "this daemon does not run as root"
    if not has_capabilities(CAP_KILL, CAP_SETGID, CAP_SETUID):
        return "this daemon may not start and end processes of other users"
    return "" if shutil.which("setpriv") else "setpriv (util-linux) is not installed"


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
    def spawn(
        cls,
        arguments: Sequence[str],
        *,
        log: Path,
        fds: Sequence[int],
        user: Demotion | None = None,
    ) -> Process:
        """Start a process in a session of its own; HostError when that is not possible.

        vfork and exec take about a millisecond; a thread would cost as much. With a `user`, a
        program changes to it in between, for half a millisecond: Python itself would fork.
        """
        if user is not None:
            arguments = [*user.command(), *arguments]
        try:
            if failpoints.armed:
                failpoints.hit("process.spawn")
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
            if failpoints.armed:
                failpoints.hit("process.watch")
            return cls(child.pid, child)
        except BaseException:
            child.kill()
            child.wait()
            raise

    @classmethod
    def adopt(cls, pid: int, started: int, marker: str, uid: int | None = None) -> Process | None:
        """Watch a process of an earlier daemon; None unless it is the same as it was then.

        Pid and start time agree, and either the marker is on its command line or it has a uid
        that only it can have: a process may change what its command line shows.
        """
        if start_time(pid) != started:
            return None
        if marker not in command_line(pid) and (uid is None or user(pid) != uid):
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
