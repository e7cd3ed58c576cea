"""The forwarder's process: its namespaces, its socket, and its end.

The process that is started only waits for its child: this is the first of its process namespace,
so that the kernel ends all others with it, and the network namespace with the last of them. All
that the forwarder made, on the host too, is then gone, however it ended.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

import msgspec

from templated.drivers.egress import legs, namespaces, rules
from templated.drivers.egress.forwarder import Forwarder
from templated.drivers.egress.programs import Files
from templated.drivers.host.files import bind_private
from templated.drivers.host.programs import run_here
from templated.drivers.network.worker import enter_namespace
from templated.errors import Conflict, HostError, TemplatedError
from templated.model.api import ErrorInfo
from templated.model.egress import ForwarderSpec

_log = logging.getLogger(__name__)


def serve(directory: Path) -> int:
    """Run the forwarder that `directory` describes until it is told to end; the exit code.

    Why it could not begin is left in the file `failure`. Raises HostError, Conflict.
    """
    files = Files(directory)
    try:
        spec = msgspec.json.decode(files.spec.read_bytes(), type=ForwarderSpec)
    except (OSError, msgspec.MsgspecError) as error:
        raise HostError(f"cannot read {files.spec}: {error}") from error
    lock = _lock(files)
    try:
        if spec.netns is not None:
            enter_namespace(spec.netns)
        host = namespaces.open_namespace()
        namespaces.isolate()
        child = os.fork()
    except OSError as error:
        raise HostError(f"cannot make namespaces: {error}", hint="it needs root") from error
    if child == 0:
        os._exit(_first(spec, files, host))
    os.close(lock)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _lock(files: Files) -> int:
    """One process for each forwarder; the lock goes with the last process that has it."""
    fd = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict(f"the forwarder of {files.directory} runs already") from None
    return fd


def _first(spec: ForwarderSpec, files: Files, host: int) -> int:
    namespaces.die_with_parent()
    files.failure.unlink(missing_ok=True)
    try:
        asyncio.run(_run(spec, files, host))
    except BaseException as error:  # noqa: BLE001 - who waits for it is told
        cause = _innermost(error)
        _log.error("%s ends: %s", spec.label, cause, exc_info=error)
        told = ErrorInfo(
            code=getattr(cause, "code", "host"), message=str(cause), hint=getattr(cause, "hint", "")
        )
        files.failure.write_bytes(msgspec.json.encode(told))
        return 1
    return 0


async def _run(spec: ForwarderSpec, files: Files, host: int) -> None:
    # First of all: from now on nothing passes that the rules do not let pass.
    run_here("nft", "-f", "-", stdin=rules.ruleset(spec))
    namespaces.set_sysctls()
    own = namespaces.open_namespace()
    legs.make(spec, host, own)
    forwarder = Forwarder(spec, files, host, own)
    await forwarder.prepare(fresh=files.fresh.exists())
    files.fresh.unlink(missing_ok=True)
    working = asyncio.ensure_future(forwarder.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, working.cancel)
    async with _Socket(forwarder, files.socket, working):
        with suppress(asyncio.CancelledError):
            await working


class _Socket:
    """Tells all who connect what the forwarder is, a line of JSON for each change, and obeys."""

    def __init__(self, forwarder: Forwarder, path: Path, working: asyncio.Future[None]) -> None:
        self._forwarder = forwarder
        self._path = path
        self._working = working
        self._listeners: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> None:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        bind_private(listener, self._path)
        self._server = await asyncio.start_unix_server(self._connected, sock=listener)
        self._forwarder.changed = self._tell

    async def __aexit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        self._server.close()

    def _tell(self) -> None:
        line = msgspec.json.encode(self._forwarder.view) + b"\n"
        for listener in self._listeners:
            # one that does not read is no reason to keep what it was not told
            if listener.transport.get_write_buffer_size() < 1 << 20:
                listener.write(line)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._listeners.add(writer)
        try:
            writer.write(msgspec.json.encode(self._forwarder.view) + b"\n")
            while line := await reader.readline():
                if line == b"resign\n":
                    self._forwarder.resign()
                elif line == b"end\n":
                    self._working.cancel()
        except (OSError, ValueError, TemplatedError) as error:
            _log.warning("the daemon's connection: %s", error)
        finally:
            self._listeners.discard(writer)
            writer.close()


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
