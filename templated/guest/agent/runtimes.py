"""The process that runs a function's code: the resident Python, or the code's own `bootstrap`."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence

from .port import Port
from .wire import CHUNK

RESIDENT = ("/usr/bin/python3", "-IB", "/usr/lib/templated/runtime")
NOBODY = 65534
FIRST_TO_GO = b"500"
"""Its oom_score_adj: when memory runs out, the agent must be there to tell."""
DRAIN = 64


class Process:
    """A process of a function. Its output is taken as it comes, its end is told once."""

    def __init__(
        self,
        port: Port,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        *,
        user: int | None,
        printed: Callable[[str, bytes], None],
        ended: Callable[[str], None],
        end: socket.socket | None = None,
    ) -> None:
        """Start it; with `end`, whose number becomes the last argument. Raises OSError."""
        self._port, self._printed, self._ended = port, printed, ended
        inherited = () if end is None else (end.fileno(),)
        self._process = subprocess.Popen(
            [*argv, *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
            bufsize=0,
            start_new_session=True,
            pass_fds=inherited,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        self._spare()
        self._pidfd = os.pidfd_open(self._process.pid)
        port.watch(self._pidfd, select.EPOLLIN, self._on_exit)
        self._streams: dict[int, str] = {}
        for name in ("stdout", "stderr"):
            descriptor = getattr(self._process, name).fileno()
            os.set_blocking(descriptor, False)
            self._streams[descriptor] = name
        self._paused = True
        self.resume()

    def _spare(self) -> None:
        try:
            with open(f"/proc/{self._process.pid}/oom_score_adj", "wb") as file:
                file.write(FIRST_TO_GO)
        except OSError:
            pass  # it has ended already, which is told

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def resume(self) -> None:
        """Take its output again."""
        if self._paused:
            self._paused = False
            for descriptor in self._streams:
                self._port.watch(descriptor, select.EPOLLIN, self._on_output)

    def pause(self) -> None:
        """Leave its output in the pipes."""
        if not self._paused:
            self._paused = True
            for descriptor in self._streams:
                self._port.unwatch(descriptor)

    def drain(self) -> None:
        """Take what it has printed before now. Others may go on printing: that is bounded."""
        for descriptor in list(self._streams):
            for _ in range(DRAIN):
                if not self._take(descriptor):
                    break

    def _on_output(self, descriptor: int, events: int) -> None:
        self._take(descriptor)

    def _take(self, descriptor: int) -> bool:
        name = self._streams.get(descriptor)
        if name is None:
            return False
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._printed(name, data)
            return True
        self._port.unwatch(descriptor)
        del self._streams[descriptor]
        return False

    def _on_exit(self, descriptor: int, events: int) -> None:
        code = self._process.wait()
        self.drain()
        self._forget()
        self._ended(f"killed by {_signal_name(-code)}" if code < 0 else f"exit status {code}")

    def kill(self) -> None:
        """End it, and tell nobody; its children go with it."""
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        self._port.unwatch(self._pidfd)
        os.close(self._pidfd)
        for descriptor in self._streams:
            self._port.unwatch(descriptor)
        self._streams = {}
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
