"""Access to what is in a clone: its commands, its files and its console."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import msgspec

from templated.drivers.agent import GuestAgent
from templated.drivers.guest import ExecResult, Output
from templated.drivers.hypervisor.states import MachineState
from templated.errors import Conflict, TemplatedError
from templated.model.api import ExecFrame
from templated.services.clones.registry import LOG_BYTES, Clones
from templated.services.machines.vm import tail

_FILE_TIMEOUT = 30.0
_LOOK_INTERVAL = 0.2
_CHUNK = 65536


class Guests:
    """The inside of clones. Raises NotFound, or Conflict for a clone that does not run."""

    def __init__(self, clones: Clones) -> None:
        self._clones = clones

    def exec(
        self,
        name: str,
        argv: list[str],
        *,
        timeout: float,
        stdin: bytes | None = None,
        env: dict[str, str] | None = None,
    ) -> AsyncIterator[ExecFrame]:
        """Run a command: its output as it comes, then one frame that is `done`.

        That frame says how the command ended, also when the guest does not answer or when its
        output was not read. The command is killed after `timeout` seconds; it goes on when the
        caller stops reading.
        """
        agent = self._agent(name)
        return _frames(agent.exec(argv, timeout=timeout, stdin=stdin, env=env))

    async def put(self, name: str, path: str, content: bytes, mode: int) -> None:
        """Write a file. Raises Timeout or GuestError; leaves the old file then."""
        await self._agent(name).put(path, content, mode, _FILE_TIMEOUT)

    async def get(self, name: str, path: str) -> bytes:
        """Read a file. Raises Timeout or GuestError, also for a file that is too large."""
        return await self._agent(name).get(path, _FILE_TIMEOUT)

    def logs(self, name: str, lines: int) -> bytes:
        """The last lines of a console, also of a clone that no longer runs."""
        return _text(self._clones.serial_log(name, lines))

    def follow_logs(self, name: str, lines: int) -> AsyncIterator[bytes]:
        """The last lines of a console, then new ones, until the clone is removed."""
        return _follow(self._clones.running(name).places.serial_log, lines)

    def _agent(self, name: str) -> GuestAgent:
        vm = self._clones.running(name)
        if vm.machine.state is MachineState.PAUSED:
            raise Conflict(
                f"clone {name} is paused: it is an instance of a function, without a request",
                hint="invoke the function, and try again before functions.freeze_after is over",
            )
        return vm.agent


async def _frames(
    answer: AsyncGenerator[Output | ExecResult, None],
) -> AsyncIterator[ExecFrame]:
    async with contextlib.aclosing(answer):
        try:
            async for part in answer:
                yield _frame(part)
        except TemplatedError as error:
            yield ExecFrame(error=error.message, done=True)


def _frame(part: Output | ExecResult) -> ExecFrame:
    if isinstance(part, Output):
        return ExecFrame(stream=part.stream, data=base64.b64encode(part.data).decode())
    return ExecFrame(**msgspec.structs.asdict(part), done=True)


async def _follow(path: Path, lines: int) -> AsyncIterator[bytes]:
    position = path.stat().st_size
    yield _text(tail(path, lines, LOG_BYTES))
    while True:
        await asyncio.sleep(_LOOK_INTERVAL)
        try:
            size = path.stat().st_size
        except OSError:
            return  # the clone was removed
        position = min(position, size)  # the janitor shortens logs
        if size > position:
            with open(path, "rb") as log:
                log.seek(position)
                chunk = log.read(_CHUNK)
            position += len(chunk)
            yield chunk


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
