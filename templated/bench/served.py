"""A daemon that a run starts, kills and starts again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from templated.bench.interrupts import deferred, interruptible
from templated.client import Client
from templated.errors import HostError, TemplatedError, Timeout

_WITHIN, _POLL = 60.0, 0.02


class Supervised:
    """A daemon that somebody else starts again when it was killed, as systemd does."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def kill(self) -> None:
        """SIGKILL. Returns when the process has ended."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _WITHIN
        with contextlib.suppress(OSError):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                if time.monotonic() > deadline:
                    raise Timeout(f"the daemon (pid {pid}) does not end")
                time.sleep(_POLL)

    def pid(self) -> int:
        """The daemon's pid."""
        return self._client.info().pid

    def restart(self) -> None:
        """Wait until it serves again. Raises Timeout."""
        deadline = time.monotonic() + _WITHIN
        while True:
            try:
                self._client.info()
                return
            except TemplatedError as error:
                if time.monotonic() > deadline:
                    raise Timeout(
                        f"nobody starts the daemon again: {error.message}",
                        hint="let the run do it: --serve FILE, or take --kills 0",
                    ) from error
                time.sleep(_POLL)


class Served(Supervised):
    """One that the run starts itself, with a configuration file."""

    def __init__(self, client: Client, config: Path, output: IO[bytes]) -> None:
        super().__init__(client)
        self._config = config
        self._output = output
        self._child: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """SIGKILL. Returns when the process has ended."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it, and wait until it serves. Raises HostError when it ends, or Timeout."""
        command = [sys.executable, "-m", "templated", "serve", "--config", str(self._config)]
        self._child = subprocess.Popen(
            command, stdout=self._output, stderr=self._output, start_new_session=True
        )
        deadline = time.monotonic() + _WITHIN
        while not self._serves(self._child.pid):
            if self._child.poll() is not None:
                raise HostError(
                    f"the daemon did not start: {self._last_line()}",
                    hint="with --serve no other daemon may run with this configuration",
                )
            if time.monotonic() > deadline:
                raise Timeout(
                    f"the daemon does not serve {self._client.path} within {_WITHIN:g} s",
                    hint="the socket of --serve and that of --socket must be the same",
                )
            time.sleep(_POLL)

    def _serves(self, pid: int) -> bool:
        try:
            return self._client.info().pid == pid
        except TemplatedError:
            return False

    def close(self) -> None:
        """Stop it in order. Its VMs would go on."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)
            self._child.wait(_WITHIN)
            self._child = None

    def _last_line(self) -> str:
        self._output.seek(0)
        lines = self._output.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def served(client: Client, config: Path) -> Iterator[Served]:
    """A daemon that serves now, and is stopped at the end."""
    with tempfile.TemporaryFile() as output, interruptible():
        daemon = Served(client, config, output)
        try:
            with deferred():
                daemon.restart()
            yield daemon
        finally:
            daemon.close()
