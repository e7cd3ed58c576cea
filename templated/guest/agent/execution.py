"""Programs that the agent starts: commands for the host, and the hooks of an identity."""

from __future__ import annotations

import binascii
import os
import select
import signal
import subprocess
import time

from .port import Port, Source
from .wire import CHUNK, Refused

TYPE_CHECKING = False  # a module less in every guest
if TYPE_CHECKING:
    from typing import Any

DRAIN_SECONDS = 1.0
HOOK_SECONDS = 10.0
MAX_EXEC_SECONDS = 86400.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
}


class Execution(Source):
    """A command that runs for the host: its pipes, its end and its deadline."""

    def __init__(self, port: Port, request: dict[str, Any]) -> None:
        argv = request["argv"]
        if not isinstance(argv, list) or not argv:
            raise Refused("invalid", "argv must be a list that is not empty")
        self._port, self._number = port, request.get("id")
        self._connection = port.connection
        self._stdin = memoryview(binascii.a2b_base64(request.get("stdin") or ""))
        # In this order: of NaN and a number, min() takes the first.
        timeout = min(MAX_EXEC_SECONDS, float(request.get("timeout") or 30.0))
        self.deadline = time.monotonic() + timeout
        self.timed_out = False
        self._ended = False
        self._process = subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.PIPE if self._stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **(request.get("env") or {})},
            cwd=request.get("cwd") or "/",
            bufsize=0,
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        port.watch(self._pidfd, select.EPOLLIN, self._on_exit)
        self._streams: dict[int, str] = {}
        for name in ("stdout", "stderr"):
            descriptor = getattr(self._process, name).fileno()
            os.set_blocking(descriptor, False)
            self._streams[descriptor] = name
        self.paused = True
        self.resume()
        if self._process.stdin:
            os.set_blocking(self._process.stdin.fileno(), False)
            port.watch(self._process.stdin.fileno(), select.EPOLLOUT, self._on_stdin)

    def resume(self) -> None:
        """Read the command's output again."""
        if self.paused:
            self.paused = False
            for descriptor in self._streams:
                self._port.watch(descriptor, select.EPOLLIN, self._on_output)
            if self._ended:
                self.deadline = time.monotonic() + DRAIN_SECONDS

    def pause(self) -> None:
        """Stop reading: the host takes its output more slowly than the command makes it."""
        if not self.paused:
            self.paused = True
            for descriptor in self._streams:
                self._port.unwatch(descriptor)
            if self._ended:
                self.deadline = None

    def expire(self) -> None:
        """The deadline came: of the command, or of output that others still hold open."""
        self.deadline = None
        if self._ended:
            self._finish()
            return
        self.timed_out = True
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _on_stdin(self, descriptor: int, events: int) -> None:
        try:
            self._stdin = self._stdin[os.write(descriptor, self._stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self._stdin = self._stdin[:0]
        if not self._stdin:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._port.unwatch(self._process.stdin.fileno())
            self._process.stdin.close()

    def _on_output(self, descriptor: int, events: int) -> None:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return
        if data:
            text = binascii.b2a_base64(data, newline=False).decode()
            frame = {
                "id": self._number,
                "stream": self._streams[descriptor],
                "data": text,
            }
            self._port.send(frame, self._connection)
            return
        self._port.unwatch(descriptor)
        del self._streams[descriptor]
        if self._ended and not self._streams:
            self._finish()

    def _on_exit(self, descriptor: int, events: int) -> None:
        self._process.wait()
        self._port.unwatch(descriptor)
        os.close(descriptor)
        self._ended = True
        self._close_stdin()
        # A grandchild may keep the pipes open; what it writes is waited for only so long.
        self.deadline = None if self.paused else time.monotonic() + DRAIN_SECONDS
        if not self._streams:
            self._finish()

    def _finish(self) -> None:
        for descriptor in self._streams:
            self._port.unwatch(descriptor)
        self._streams = {}
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        code = self._process.returncode
        result = {
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "timed_out": self.timed_out,
        }
        self._port.sources.discard(self)
        self._port.reply(self._number, result, self._connection)


def run_hooks(paths: list[str], identity: dict[str, str]) -> None:
    """Run the identity hooks in order, HOOK_SECONDS for all; Refused when one fails."""
    end = time.monotonic() + HOOK_SECONDS
    extra = {f"TEMPLATED_{name.upper()}": value for name, value in identity.items()}
    for path in paths:
        # The output goes to a file: a child that a hook leaves behind would hold a pipe open.
        output = os.memfd_create("hook")
        try:
            process = subprocess.Popen(
                [path],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**ENVIRONMENT, **extra},
                cwd="/",
                start_new_session=True,
            )
            try:
                code = process.wait(max(0.01, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise Refused("hook", f"{path}: not done in {HOOK_SECONDS:g} s") from None
            if code != 0:
                size = os.lseek(output, 0, os.SEEK_END)
                tail = os.pread(output, 500, max(0, size - 500)).decode(errors="replace")
                raise Refused("hook", f"{path}: exit code {code}: {tail.strip()}")
        finally:
            os.close(output)
