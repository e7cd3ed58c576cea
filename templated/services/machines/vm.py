"""One virtual machine on its slot: what the base VM, the canary and every clone have in common."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from templated.drivers.agent import guest_agent
from templated.drivers.guest import HostKey
from templated.drivers.hypervisor.base import Machine, Places, SavedState
from templated.errors import GuestError, HostError, TemplatedError, Timeout, UnfitAgent
from templated.model.clone import Slot
from templated.model.network import AddressPlan
from templated.model.spec import AgentKind


class Vm:
    """A process, its control channel and its agent. `destroy` or `release` ends the handle."""

    def __init__(
        self,
        slot: Slot,
        places: Places,
        machine: Machine,
        *,
        agent: AgentKind = "templated",
        host_keys: tuple[HostKey, ...] = (),
        plan: AddressPlan | None = None,
    ) -> None:
        """`plan` is of the network that it is on; one that has its identity needs none."""
        self.slot = slot
        self.plan = plan
        self.host_keys = host_keys
        self.places = places
        self.machine = machine
        self.agent = guest_agent(agent, places.agent)
        self.state: SavedState | None = None
        """The state that it must restore, while it waits to do so."""

    async def connect(self, timeout: float) -> None:
        """Wait for the control channel; the agent's port is connected at the same time.

        The port must be connected before state is restored: the frozen guest knows it as open.
        Raises GuestError, HypervisorError or Timeout; leaves the process running.
        """
        await self.agent.connect()
        await self.machine.connect(timeout)

    async def reconnect(self, timeout: float) -> None:
        """Connect what is not connected; commands that are under way in the guest go on.

        Raises as `connect` does.
        """
        if not self.agent.connected:
            await self.agent.close()
            await self.agent.connect()
        await self.machine.connect(timeout)

    async def boot(self, timeout: float) -> None:
        """Wait until the agent of a booting guest answers, and the guest has settled.

        Raises GuestError after `timeout` seconds, or when the VM ended, Timeout when the guest does
        not settle, and UnfitAgent at once; leaves the VM as it is.
        """
        deadline = time.monotonic() + timeout
        await self._answers(timeout, deadline)
        await self.agent.settle(max(deadline - time.monotonic(), 0.0))

    async def _answers(self, timeout: float, deadline: float) -> None:
        last = "its agent never answered"
        while (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    await self._ping_or_exit(min(left, 1.0))
                return
            except UnfitAgent:
                raise
            except (TimeoutError, TemplatedError) as error:
                if self.machine.exited.done():
                    raise
                silent = isinstance(error, TimeoutError | Timeout)
                last = (self.agent.absence if silent else "") or str(error) or last
                await asyncio.sleep(0.02)
        raise GuestError(f"the guest did not boot within {timeout:g} s ({last})")

    async def _ping_or_exit(self, timeout: float) -> None:
        ping = asyncio.ensure_future(self.agent.ping(timeout))
        ends: set[asyncio.Future[Any]] = {ping, self.machine.exited}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if ping.done():
                return ping.result()
        finally:
            if not ping.done():
                ping.cancel()
                await asyncio.wait({ping})
        how, words = self.machine.exited.result(), self.machine.last_words()
        raise GuestError(f"the VM {how}: {words}" if words else f"the VM {how}")

    async def destroy(self) -> None:
        """End the VM at once and release all that belongs to it. Idempotent.

        Raises Timeout when its process does not end; leaves the agent's connection closed.
        """
        try:
            await self.machine.destroy()
        finally:
            await self.agent.close()

    async def release(self) -> None:
        """Release a VM that outlives the daemon. Raises nothing."""
        await self.agent.close()
        await self.machine.release()


def tail(path: Path, lines: int, limit: int = 16 << 10) -> list[str]:
    """The last lines of a log, at most `limit` bytes, printable; empty when there is none."""
    with contextlib.suppress(OSError), open(path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - limit))
        text = log.read().decode(errors="replace").replace("\r", "")
        printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        return printable.splitlines()[-lines:] if lines else []
    return []


def require_space(directory: Path, needed: int, what: str) -> None:
    """HostError unless `needed` bytes are free: QEMU dies of SIGBUS when /dev/shm fills up."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise HostError(
            f"{what} needs {needed >> 20} MiB in {directory}, where {free >> 20} MiB are free",
            hint="remove old generations and clones, or enlarge it: "
            "mount -o remount,size=... /dev/shm",
        )
