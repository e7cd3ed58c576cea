"""A hypervisor without VMs, for tests of the logic around it. No measured result comes from it.

Its machines are objects, not processes. Each has a guest on the slot's own listening socket
(`fake_guest`), and can be told to fail at a named step.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from templated.drivers.hypervisor.base import Launch, Machine, Places, Proof, SavedState, Support
from templated.drivers.hypervisor.fake_guest import FakeGuest
from templated.drivers.hypervisor.states import (
    ANSWERS,
    HELD,
    LIVE,
    STANDS,
    WAITS,
    Life,
    MachineState,
)
from templated.errors import HostError, HypervisorError, Timeout
from templated.model.generation import QemuVersion
from templated.model.network import Addresses

REPLY_TIMEOUT = 10.0
"""Seconds that a machine may be held at a step."""
STEPS = (
    *("connect", "expect_state", "restore", "resume", "pause", "status", "link"),
    *("exchange_code", "detach_network", "save", "quit"),
)
"""The steps at which a machine answers."""


class FakeHypervisor:
    """Starts fake machines.

    `fail` names the step at which every further start fails: spawn, connect, restore, resume,
    identify (the guest reads back another `mismatch`), nonsense (the agent answers no JSON),
    silence (it never answers), clock (a clock that cannot be set), link; and in the build of a
    template: pause, detach_network, save, quit. `fail_after` is the number of machines that start
    well before that.
    """

    def __init__(self) -> None:
        self.fail = ""
        self.fail_after = 0
        self.mismatch = "mac"
        self.installed = "7.2.0"
        """The version that it claims to have."""
        self.machines: dict[int, FakeMachine] = {}
        self._holds: dict[str, asyncio.Event] = {}
        self._pids = itertools.count(1_000_000)

    def prepare(self) -> None:
        """There is nothing to prepare."""

    async def version(self) -> QemuVersion:
        return QemuVersion(path="fake", version=self.installed)

    def is_version(self, version: str) -> bool:
        return version == self.installed

    def support(self, version: str) -> Support:
        return Support(host="the tests", proven="none", read_only_memory=False)

    def kvm_problem(self) -> str:
        return "the fake has no KVM"

    def remembered_proof(self) -> Proof | None:
        return None

    async def prove_kvm(self, kernel: Path, initrd: Path) -> Proof:
        return Proof(host="fake", works=False, detail=self.kvm_problem())

    async def confinement_problem(self) -> str:
        return ""

    def user_problem(self) -> str:
        return ""

    def file_limit_problem(self) -> str:
        return ""

    def landlock_problem(self) -> str:
        return ""

    def clock_problem(self, accelerator: str) -> str:
        return ""

    def uefi_variables(self) -> Path:
        raise HostError("the fake has no UEFI", hint="this is a test")

    async def addresses(self, network: str) -> Addresses:
        raise HostError("the fake knows no networks", hint="this is a test")

    def cpu(self, accelerator: str) -> str:
        return "fake"

    def kernel_arguments(self, accelerator: str) -> str:
        return "fake"

    def describe(self, launch: Launch) -> tuple[str, ...]:
        return "fake", launch.slot

    def spawn(self, launch: Launch) -> FakeMachine:
        """Start a machine; HostError when told to fail at `spawn`."""
        fail = "" if self.fail_after > 0 else self.fail
        self.fail_after -= 1
        if fail == "spawn":
            raise HostError("the fake cannot be started", hint="this is a test")
        machine = FakeMachine(next(self._pids), launch, fail, self.mismatch, self._holds)
        self.machines[machine.pid] = machine
        return machine

    def hold(self, step: str) -> asyncio.Event:
        """Make every machine wait at a step until the event is set; at `destroy`, none ends."""
        return self._holds.setdefault(step, asyncio.Event())

    def let_go(self) -> None:
        """Release all machines that are held."""
        for event in self._holds.values():
            event.set()
        self._holds.clear()

    def adopt(
        self, pid: int, start_time: int, places: Places, uuid: str, uid: int | None = None
    ) -> FakeMachine | None:
        """A machine that still runs."""
        machine = self.machines.get(pid)
        if machine is None or machine.exited.done():
            return None
        if machine.launch.uuid != uuid or machine.started != start_time:
            return None
        machine.forget()
        return machine

    async def find(self, places: Mapping[str, Places]) -> dict[str, list[Machine]]:
        """The machines that still run, by their UUIDs."""
        found: dict[str, list[Machine]] = {}
        for machine in self.running():
            if machine.launch.uuid in places:
                machine.forget()
                found.setdefault(machine.launch.uuid, []).append(machine)
        return found

    async def close(self) -> None:
        """End all machines, whoever holds them."""
        for machine in self.running():
            machine.forget()
            await machine.destroy()

    def running(self) -> list[FakeMachine]:
        """Machines that have not ended."""
        return [m for m in self.machines.values() if not m.exited.done()]


class FakeMachine(Life):
    """One machine; see `templated.drivers.hypervisor.base.Machine`."""

    placed = False

    def __init__(
        self, pid: int, launch: Launch, fail: str, mismatch: str, holds: dict[str, asyncio.Event]
    ) -> None:
        self.pid = pid
        self.started = pid
        self.launch = launch
        self.fail = fail
        self.held_at = ""
        self._mismatch = mismatch
        self._holds = holds
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.link_up = False
        self.announced = ""
        self.priorities: list[bool] = []
        """Whether it was put into the background, in turn."""
        self.code = launch.code
        self.says = MachineState.WAITING if launch.boot is None else MachineState.RUNNING
        """The state that it reports of its VM."""
        # The parent closes its own copy, as it does with a real QEMU.
        self._listener = socket.socket(fileno=os.dup(launch.agent_fd))
        self._guest: FakeGuest | None = None

    @property
    def start_time(self) -> int:
        return self.started

    def forget(self) -> None:
        """Become a machine of an earlier daemon, as the next daemon sees it."""
        self._state = MachineState.SPAWNED

    async def connect(self, timeout: float) -> None:
        self._require(MachineState.SPAWNED)
        await self._step("connect", timeout)
        if self._guest is None:  # otherwise adopted: the guest's end is still there
            if self.launch.memory is not None and self.launch.memory_shared:
                await asyncio.to_thread(self.launch.memory.write_bytes, b"fake memory")
            self._guest = FakeGuest(self._listener, lambda: self.fail, self._mismatch)
        self._move(self.says)

    async def expect_state(self) -> None:
        self._require(MachineState.WAITING)
        await self._step("expect_state")
        self._move(MachineState.EXPECTING)

    async def restore(self, state: SavedState, timeout: float) -> None:
        self._require(*WAITS)
        state.check()
        self._move(MachineState.LOADING)
        await self._step("restore", timeout)
        self._become(MachineState.PAUSED)

    async def resume(self) -> None:
        self._require(MachineState.PAUSED)
        await self._step("resume")
        self._become(MachineState.RUNNING)

    async def pause(self) -> None:
        self._require(MachineState.RUNNING)
        await self._step("pause")
        self._become(MachineState.PAUSED)

    async def status(self) -> MachineState | None:
        self._require(*ANSWERS)
        await self._step("status")
        return self.says

    async def set_link(self, up: bool) -> None:
        self._require(*LIVE)
        await self._step("link")
        self.link_up = up

    async def exchange_code(self, file: Path) -> None:
        self._require(*STANDS)
        await self._step("exchange_code")
        self.code = file

    async def detach_network(self) -> None:
        self._require(MachineState.PAUSED)
        await self._step("detach_network")

    async def save(self, target: Path, timeout: float) -> None:
        self._require(MachineState.PAUSED)
        self._move(MachineState.SAVING)
        await self._step("save", timeout)
        try:
            await asyncio.to_thread(target.write_bytes, b"fake state")
        except OSError as error:
            raise HypervisorError(f"the fake cannot write {target}: {error}") from error
        self._become(MachineState.SAVED)

    async def quit(self, timeout: float) -> None:
        self._require(*ANSWERS)
        await self._step("quit", timeout)
        await self.destroy()

    def kill(self) -> None:
        # One that is held there does not end, as a process that waits for a disk does not.
        if self.state is not MachineState.RELEASED and "destroy" not in self._holds:
            self.end("was killed by the test")

    async def destroy(self) -> None:
        self._require(*HELD)
        await self._step("destroy")
        self.end("was killed by the test")
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._listener.close()

    async def release(self) -> None:
        if self.state not in (MachineState.ENDED, MachineState.RELEASED):
            self._move(MachineState.RELEASED)

    def announce(self, name: str) -> None:
        """Remember it."""
        self.announced = name

    def last_words(self) -> str:
        return ""

    def cpu_seconds(self) -> float:
        return 0.0

    def private_bytes(self) -> int:
        return 1 << 20

    def background(self, on: bool) -> None:
        """It has no priority, but remembers what it was told."""
        self.priorities.append(on)

    def limit_files(self, size: int) -> None:
        """It writes none."""

    def end(self, how: str) -> None:
        """End as if killed from outside."""
        if not self.exited.done():
            self.exited.set_result(how)

    def _become(self, state: MachineState) -> None:
        self._move(state)
        self.says = state

    async def _step(self, name: str, timeout: float | None = None) -> None:
        if name in self._holds:
            self.held_at = name
            await self._held(name, REPLY_TIMEOUT if timeout is None else timeout)
            self.held_at = ""
        if self.fail == name:
            raise HypervisorError(f"the fake fails at {name}")

    async def _held(self, step: str, timeout: float) -> None:
        """Wait until the step is released; Timeout, or HypervisorError when the machine ends."""
        letting_go = asyncio.ensure_future(self._holds[step].wait())
        ends: set[asyncio.Future[Any]] = {letting_go}
        if step != "destroy":
            ends.add(self.exited)
        try:
            done, _ = await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            letting_go.cancel()
        if not done:
            raise Timeout(f"no {step} within {timeout:g} s")
        if letting_go not in done:
            raise HypervisorError(self._ending())
