"""The daemon's end of a forwarder: starting its process, hearing it, telling it what to do."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from templated.drivers.egress.programs import Files
from templated.drivers.host.programs import run
from templated.errors import HostError, Timeout, host_errors
from templated.model.api import ErrorInfo
from templated.model.egress import ForwarderSpec, ForwarderView, Peer, Role

_log = logging.getLogger(__name__)
UNIT = "templated-forwarder@{}.service"
_UNITS_OF = Path("/run/templated/egress")
"""What the unit's ExecStart names."""
_POLL = 0.05
_END = 10.0
_AGAIN = (0.2, 10.0)
"""Seconds until a forwarder that ended is started again: at first, and at most."""


class Remote:
    """One forwarder, which outlives the daemon. `changed` is called when its view has changed."""

    def __init__(self, spec: ForwarderSpec, changed: Callable[[Remote], None]) -> None:
        self.spec = spec
        self.files = Files(Path(spec.directory))
        self.view = ForwarderView(number=spec.number, lane=spec.lane + 1, role=Role.GONE)
        self._changed = changed
        self._writer: asyncio.StreamWriter | None = None
        self._pid = 0
        """Of the process that this daemon has started, and that has not been waited for."""
        self._ending = False
        self._starting = asyncio.Lock()

    async def begin(self, timeout: float, *, fresh: bool = False) -> None:
        """Start it, and wait until it tells of itself. Raises HostError with what it failed of."""
        await asyncio.to_thread(self._write, fresh)
        await self._start()
        try:
            async with asyncio.timeout(timeout):
                while not await self.connect():
                    await asyncio.to_thread(self._check_failed)
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise Timeout(
                f"forwarder {self.spec.label} did not come up within {timeout:g} s",
                hint=f"see {self.files.log}",
            ) from None

    async def connect(self) -> bool:
        """Hear one that runs; False when none does."""
        if self._writer is not None:
            return True
        try:
            self._reader, writer = await asyncio.open_unix_connection(self.files.socket)
        except OSError:
            return False
        try:
            self._hear(await self._reader.readline())
        except (OSError, ValueError, msgspec.MsgspecError):
            writer.close()
            return False
        self._writer = writer
        return True

    async def keep(self, timeout: float) -> None:
        """Hear it for good, and start it again whenever it ends, until `end` or the task's."""
        wait, longest = _AGAIN
        while not self._ending:
            if await self.connect():
                wait = _AGAIN[0]
                await self._listen()
            self._gone("it does not run")
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
            if self._ending or await self.connect():
                continue
            try:
                async with self._starting:
                    if not self._ending:
                        await self.begin(timeout)
            except (HostError, Timeout, OSError, msgspec.MsgspecError) as error:
                self._gone(str(error))
                _log.warning("forwarder %s: %s", self.spec.label, error)

    def resign(self) -> None:
        """Have it give up being the active one. Raises HostError when it does not run."""
        if self._writer is None:
            raise HostError(f"forwarder {self.spec.label} does not run")
        self._writer.write(b"resign\n")

    def leave(self) -> None:
        """It is about to be ended: what becomes of it is told no more."""
        self._ending = True

    async def end(self) -> None:
        """End its process, and wait until it has ended. Raises Timeout."""
        self.leave()
        async with self._starting:
            await self._end()

    async def _end(self) -> None:
        if await self.connect() and self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(b"end\n")
                await self._writer.drain()
        if _managed(self.files):
            await run("systemctl", "stop", UNIT.format(self.files.directory.name), timeout=_END + 5)
        deadline = time.monotonic() + _END
        while await asyncio.to_thread(self._runs):
            if time.monotonic() > deadline:
                raise Timeout(
                    f"forwarder {self.spec.label} does not end", hint=f"see {self.files.log}"
                )
            await asyncio.sleep(_POLL)
        self.release()
        await asyncio.to_thread(shutil.rmtree, self.files.directory, ignore_errors=True)

    def release(self) -> None:
        """Hear it no more; it goes on."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _write(self, fresh: bool) -> None:
        """Its files; `fresh` is one that it removes once it has done what it says."""
        with host_errors(f"cannot write files of forwarder {self.spec.label}"):
            self.files.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.files.failure.unlink(missing_ok=True)
            self.files.fresh.unlink(missing_ok=True)
            if fresh:
                self.files.fresh.touch()
            self.files.spec.write_bytes(msgspec.json.encode(self.spec))

    async def _start(self) -> None:
        if _managed(self.files):
            unit = UNIT.format(self.files.directory.name)
            with contextlib.suppress(HostError):  # it has none of a unit that was never started
                await run("systemctl", "reset-failed", unit, timeout=_END)
            await run("systemctl", "--no-block", "start", unit, timeout=_END)
            return
        self._reap()
        self._pid = _detached(self.files)

    def _check_failed(self) -> None:
        if self.files.failure.exists() and not self._runs():
            told = msgspec.json.decode(self.files.failure.read_bytes(), type=ErrorInfo)
            raise HostError(f"forwarder {self.spec.label}: {told.message}", hint=told.hint)
        if (code := self._reap()) is not None:
            raise HostError(
                f"forwarder {self.spec.label} ended with {code}", hint=f"see {self.files.log}"
            )

    def _runs(self) -> bool:
        """Whether its process is there: it holds the lock until its very end."""
        self._reap()
        return locked(self.files.lock)

    def _reap(self) -> int | None:
        """The exit code of the process that this daemon has started, once it has ended."""
        if self._pid == 0:
            return None
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            return None
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                self._hear(line)
        self.release()

    def _hear(self, line: bytes) -> None:
        self.view = msgspec.json.decode(line, type=ForwarderView)
        if not self._ending:
            self._changed(self)

    def _gone(self, why: str) -> None:
        peer = Peer.UNSEEN if self.spec.egress.hosts else Peer.NONE
        self.view = msgspec.structs.replace(self.view, role=Role.GONE, pid=0, error=why, peer=peer)
        if not self._ending:
            self._changed(self)


def _detached(files: Files) -> int:
    """The PID of its process, in a session of its own: it outlives the daemon."""
    command = [sys.executable, "-m", "templated", "forwarder", "run", str(files.directory)]
    log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        return os.posix_spawn(
            sys.executable,
            command,
            os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(files.log), log, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        raise HostError(f"cannot start a forwarder: {error.strerror}") from error


def locked(path: Path) -> bool:
    """Whether a process holds this lock."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _managed(files: Files) -> bool:
    """Whether a forwarder is a unit: its daemon is one, too, and the unit knows its directory."""
    if (
        files.directory.parent != _UNITS_OF
        or "INVOCATION_ID" not in os.environ
        or not Path("/run/systemd/system").is_dir()
    ):
        return False
    places = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
    return any((Path(place) / UNIT.format("")).exists() for place in places)
