"""What every driver of a hypervisor must do: one set of tests, run over each of them.

The test module of a driver makes a class of `HypervisorContract` with a fixture `rig`. The real
ones are slow to boot, so all tests restore what one VM was frozen to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.hypervisor.base import (
    Hardware,
    Hypervisor,
    Kernel,
    Launch,
    Machine,
    Places,
    SavedState,
)
from templated.drivers.hypervisor.states import MachineState
from templated.errors import Defect, HostError, HypervisorError, Timeout
from templated.model.network import Slirp

SPAWNED, WAITING, EXPECTING = MachineState.SPAWNED, MachineState.WAITING, MachineState.EXPECTING
LOADING, PAUSED, RUNNING = MachineState.LOADING, MachineState.PAUSED, MachineState.RUNNING
SAVING, SAVED = MachineState.SAVING, MachineState.SAVED
RELEASED, ENDED = MachineState.RELEASED, MachineState.ENDED
LIVE = {WAITING, EXPECTING, PAUSED, RUNNING}
BOUND = 20.0
"""Seconds that a step of a test may take."""
MEMORY = 128 << 20
_ELSEWHERE = Path("/nowhere/state")

Call = Callable[[Machine], Awaitable[object]]
ALLOWED: dict[str, tuple[Call, set[MachineState]]] = {
    "connect": (lambda m: m.connect(BOUND), {SPAWNED}),
    "expect_state": (lambda m: m.expect_state(), {WAITING}),
    "restore": (lambda m: m.restore(SavedState(_ELSEWHERE), BOUND), {WAITING, EXPECTING}),
    "resume": (lambda m: m.resume(), {PAUSED}),
    "pause": (lambda m: m.pause(), {RUNNING}),
    "status": (lambda m: m.status(), LIVE | {SAVED}),
    "set_link": (lambda m: m.set_link(True), LIVE),
    "exchange_code": (lambda m: m.exchange_code(_ELSEWHERE), {WAITING, EXPECTING, PAUSED}),
    "detach_network": (lambda m: m.detach_network(), {PAUSED}),
    "save": (lambda m: m.save(_ELSEWHERE, BOUND), {PAUSED}),
    "quit": (lambda m: m.quit(BOUND), LIVE | {SAVED}),
    "destroy": (lambda m: m.destroy(), set(MachineState) - {RELEASED}),
}


@dataclass(frozen=True)
class Frozen:
    """A template: a VM's memory and device state, and the disk that belongs to them."""

    memory: Path
    state: Path
    disk: Path
    code: Path | None = None


class Rig(ABC):
    """One driver, and what its tests need beside it."""

    def __init__(self, hypervisor: Hypervisor, directory: Path) -> None:
        """`directory` has a short path, since sockets lie in it."""
        self.hypervisor = hypervisor
        self.directory = directory
        self._numbers = itertools.count()
        self.frozen: Frozen | None = None

    @abstractmethod
    async def overlay(self, target: Path, backing: Path | None) -> None:
        """Make a disk layer, over the image's when there is no `backing`."""

    @abstractmethod
    def kernel(self) -> Kernel:
        """What a VM boots."""

    @abstractmethod
    def missing(self) -> Hypervisor:
        """A driver whose program is not there."""

    @abstractmethod
    def spoiled(self, machine: Machine, state: SavedState) -> SavedState:
        """A state that this machine cannot load."""

    @abstractmethod
    def silent(self, machine: Machine) -> AbstractContextManager[None]:
        """Meanwhile the machine answers nothing."""

    @abstractmethod
    def immortal(self, machine: Machine) -> AbstractContextManager[None]:
        """Meanwhile the machine does not end when it is killed."""

    @abstractmethod
    def hurry(self) -> AbstractContextManager[None]:
        """Meanwhile an answer is awaited for a fraction of a second only."""

    def play(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run one test on an event loop of its own."""

        async def main() -> None:
            async with asyncio.timeout(60):
                if self.frozen is None:
                    self.frozen = await self.freeze()
                await scenario

        try:
            asyncio.run(main())
        finally:
            scenario.close()

    @asynccontextmanager
    async def launch(self, base: Frozen | None) -> AsyncIterator[Launch]:
        """A launch of a clone of `base`, or of a VM that boots."""
        number = next(self._numbers)
        directory = self.directory / f"{number}"
        directory.mkdir()
        places = Places(directory, directory)
        await self.overlay(directory / "disk.qcow2", base.disk if base else None)
        with _listening(places.control) as control, _listening(places.agent) as agent:
            yield Launch(
                slot=f"{number}",
                uuid=str(uuid.uuid4()),
                mac=f"02:00:00:00:00:{number:02x}",
                hardware=Hardware(
                    type="microvm",
                    memory_bytes=MEMORY,
                    vcpus=1,
                    accel="tcg",
                    cpu=self.hypervisor.cpu("tcg"),
                    version=(await self.hypervisor.version()).version,
                ),
                places=places,
                memory=base.memory if base else directory / "memory",
                memory_shared=base is None,
                disk=directory / "disk.qcow2",
                network=Slirp("10.77.0.0/16", "10.77.0.1", "10.77.0.2", "10.77.0.3", restrict=True),
                control_fd=control.fileno(),
                agent_fd=agent.fileno(),
                code=base.code if base else None,
                boot=None if base else self.kernel(),
            )

    @asynccontextmanager
    async def spawned(self, launch: Launch) -> AsyncIterator[Machine]:
        """A machine that was just spawned; it is ended at the end, unless it was released."""
        machine = self.hypervisor.spawn(launch)
        try:
            yield machine
        finally:
            if machine.state is not RELEASED:
                await machine.destroy()

    @asynccontextmanager
    async def clone(self, *, connected: bool = True) -> AsyncIterator[Machine]:
        """A machine that waits for the frozen state."""
        async with self.launch(self.frozen) as launch, self.spawned(launch) as machine:
            if connected:
                await machine.connect(BOUND)
            yield machine

    def state(self) -> SavedState:
        """The frozen state."""
        assert self.frozen is not None
        return SavedState(self.frozen.state)

    async def freeze(self) -> Frozen:
        """Boot a VM and freeze it, as a template's build does."""
        async with self.launch(None) as launch, self.spawned(launch) as machine:
            await machine.connect(BOUND)
            await machine.pause()
            return await self.saved(launch, machine)

    async def saved(self, launch: Launch, machine: Machine) -> Frozen:
        """Save a paused machine and end it."""
        assert launch.memory is not None
        frozen = Frozen(launch.memory, launch.places.directory / "state", launch.disk, launch.code)
        await machine.detach_network()
        await machine.save(frozen.state, BOUND)
        await machine.quit(BOUND)
        return frozen


@contextlib.contextmanager
def _listening(path: Path) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(2)
        yield listener


async def _started(hypervisor: Hypervisor, launch: Launch) -> None:
    """Start a machine, and end it; some hypervisors know only later that they cannot."""
    machine = hypervisor.spawn(launch)
    try:
        await machine.connect(BOUND)
    finally:
        await machine.destroy()


async def refused(machine: Machine) -> None:
    """Whatever the state does not allow is a defect, and changes nothing."""
    state = machine.state
    for name, (call, allowed) in ALLOWED.items():
        if state not in allowed:
            with pytest.raises(Defect, match=state.value):
                await call(machine)
            assert machine.state is state, name
    assert not machine.exited.done()


class HypervisorContract:
    """The tests. Each names in its docstring what a driver promises."""

    def test_a_template(self, rig: Rig) -> None:
        """A VM boots, and is paused, saved and ended; its files are then there."""

        async def scenario() -> None:
            async with rig.launch(None) as launch, rig.spawned(launch) as machine:
                assert machine.state is SPAWNED and not machine.exited.done()
                await machine.connect(BOUND)
                assert machine.state is RUNNING and await machine.status() is RUNNING
                await machine.set_link(False)
                await machine.pause()
                assert machine.state is PAUSED and await machine.status() is PAUSED
                await machine.detach_network()
                state = launch.places.directory / "state"
                await machine.save(state, BOUND)
                assert machine.state is SAVED and await machine.status() is SAVED
                await refused(machine)
                await machine.quit(BOUND)
                assert machine.state is ENDED and machine.exited.done()
                assert state.stat().st_size > 0

        rig.play(scenario())

    def test_a_clone(self, rig: Rig) -> None:
        """It waits for a state, loads it, and runs, pauses and runs again."""

        async def scenario() -> None:
            async with rig.clone(connected=False) as machine:
                assert machine.state is SPAWNED
                await machine.connect(BOUND)
                assert machine.pid > 0
                assert machine.state is WAITING and await machine.status() is WAITING
                assert machine.start_time > 0
                await machine.restore(rig.state(), BOUND)
                assert machine.state is PAUSED and await machine.status() is PAUSED
                for _ in range(2):
                    await machine.resume()
                    assert machine.state is RUNNING and await machine.status() is RUNNING
                    await machine.set_link(True)
                    await machine.pause()
                    assert machine.state is PAUSED and await machine.status() is PAUSED
                assert machine.cpu_seconds() >= 0 and machine.private_bytes() > 0
                machine.background(True)
                machine.background(False)
                machine.limit_files(1 << 30)
                await machine.quit(BOUND)
                assert machine.state is ENDED

        rig.play(scenario())

    def test_a_state_by_descriptor(self, rig: Rig) -> None:
        """The VM inherits what the launch names; whoever opened it may close it at once."""

        async def scenario() -> None:
            path = rig.state().path
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            async with (
                rig.launch(rig.frozen) as launch,
                rig.spawned(replace(launch, state_fd=fd)) as machine,
            ):
                os.close(fd)
                await machine.connect(BOUND)
                await machine.restore(SavedState(path, "fd", fd), BOUND)
                assert machine.state is PAUSED

        rig.play(scenario())

    def test_a_clone_that_agrees_ahead(self, rig: Rig) -> None:
        """What can be agreed before the state is asked for, is; and the state is then loaded."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                await machine.expect_state()
                assert machine.state is EXPECTING and await machine.status() is WAITING
                await refused(machine)
                await machine.restore(rig.state(), BOUND)
                assert machine.state is PAUSED

        rig.play(scenario())

    def test_forbidden_moves(self, rig: Rig) -> None:
        """In no state can be done what it does not allow: that is a defect, and nothing happens."""

        async def scenario() -> None:
            async with rig.clone(connected=False) as machine:
                await refused(machine)
                await machine.connect(BOUND)
                await refused(machine)
                await machine.restore(rig.state(), BOUND)
                await refused(machine)
                await machine.resume()
                await refused(machine)
                assert await machine.status() is RUNNING

        rig.play(scenario())

    def test_after_its_end(self, rig: Rig) -> None:
        """A machine that has ended says so to whoever asks; it may be destroyed again."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                machine.kill()
                async with asyncio.timeout(BOUND):
                    how = await asyncio.shield(machine.exited)
                assert how and machine.state is ENDED
                for name, (call, allowed) in ALLOWED.items():
                    if ENDED not in allowed:
                        with pytest.raises(HypervisorError, match=how):
                            await call(machine)
                    assert machine.state is ENDED, name
                machine.kill()
                for _ in range(3):
                    await machine.destroy()
                await machine.release()
                assert machine.state is ENDED

        rig.play(scenario())

    def test_a_missing_program(self, rig: Rig) -> None:
        """The error says what to install or to set, and nothing runs."""

        async def scenario() -> None:
            async with rig.launch(rig.frozen) as launch:
                with pytest.raises(HostError) as caught:
                    await _started(rig.missing(), launch)
                assert caught.value.hint
                assert await rig.hypervisor.find({launch.uuid: launch.places}) == {}

        rig.play(scenario())

    @pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
    def test_no_state(self, rig: Rig, content: bytes | None) -> None:
        """A state that cannot be there is refused before anything waits for it."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                path = rig.directory / "no-state"
                if content is not None:
                    await asyncio.to_thread(path.write_bytes, content)
                with pytest.raises(HostError, match="no-state"):
                    await machine.restore(SavedState(path), BOUND)
                assert machine.state is WAITING
                await machine.restore(rig.state(), BOUND)
                assert machine.state is PAUSED
                path.unlink(missing_ok=True)

        rig.play(scenario())

    def test_a_spoiled_state(self, rig: Rig) -> None:
        """A machine that could not load its state is good for nothing but its end."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                with pytest.raises(HypervisorError):
                    await machine.restore(rig.spoiled(machine, rig.state()), BOUND)
                assert machine.state in (LOADING, ENDED)

        rig.play(scenario())

    def test_no_place_for_the_state(self, rig: Rig) -> None:
        """A machine that could not save its state is good for nothing but its end."""

        async def scenario() -> None:
            async with rig.launch(None) as launch, rig.spawned(launch) as machine:
                await machine.connect(BOUND)
                await machine.pause()
                with pytest.raises(HypervisorError):
                    await machine.save(_ELSEWHERE, BOUND)
                assert machine.state is SAVING
                await refused(machine)

        rig.play(scenario())

    def test_an_end_while_someone_waits(self, rig: Rig) -> None:
        """Whoever waits for an answer hears of the end at once, long before his time is over."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                with rig.silent(machine):
                    waiting = [
                        asyncio.ensure_future(machine.status()),
                        asyncio.ensure_future(machine.restore(rig.state(), 600)),
                    ]
                    await asyncio.sleep(0.05)
                    assert not any(task.done() for task in waiting)
                    machine.kill()
                    async with asyncio.timeout(BOUND / 4):
                        ended = await asyncio.gather(*waiting, return_exceptions=True)
                assert all(isinstance(error, HypervisorError) for error in ended)

        rig.play(scenario())

    def test_silence(self, rig: Rig) -> None:
        """Every wait has a bound, and ends in Timeout; what was not answered may be asked again."""

        async def scenario() -> None:
            async with rig.clone(connected=False) as machine:
                with rig.silent(machine), pytest.raises(Timeout):
                    await machine.connect(0.1)
                assert machine.state is SPAWNED
                await machine.connect(BOUND)
                with rig.silent(machine), rig.hurry(), pytest.raises(Timeout):
                    await machine.status()
                assert await machine.status() is machine.state is WAITING
                with rig.silent(machine), rig.hurry(), pytest.raises(Timeout):
                    await machine.quit(0.1)

        rig.play(scenario())

    def test_a_restore_that_is_left(self, rig: Rig) -> None:
        """Nobody knows how far it got, so nothing more is done with the machine."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                with rig.silent(machine):
                    restoring = asyncio.ensure_future(machine.restore(rig.state(), BOUND))
                    await asyncio.sleep(0.05)
                    restoring.cancel()
                    await asyncio.wait({restoring})
                assert restoring.cancelled() and machine.state is LOADING
                await refused(machine)

        rig.play(scenario())

    def test_a_machine_that_cannot_be_ended(self, rig: Rig) -> None:
        """`destroy` gives up in time, with Timeout, and may be tried again."""

        async def scenario() -> None:
            async with rig.clone() as machine:
                with rig.immortal(machine), rig.hurry(), pytest.raises(Timeout):
                    await machine.destroy()
                assert not machine.exited.done()
                await machine.destroy()
                assert machine.state is ENDED

        rig.play(scenario())

    def test_release_and_adoption(self, rig: Rig) -> None:
        """A released machine goes on, and is adopted by pid, start time and UUID together."""

        async def scenario() -> None:
            async with rig.launch(rig.frozen) as launch, rig.spawned(launch) as machine:
                await machine.connect(BOUND)
                await machine.restore(rig.state(), BOUND)
                pid, started = machine.pid, machine.start_time
                for _ in range(2):
                    await machine.release()
                    assert machine.state is RELEASED
                machine.kill()
                await refused(machine)
                adopt, places = rig.hypervisor.adopt, launch.places
                assert adopt(pid, started + 1, places, launch.uuid) is None
                assert adopt(pid, started, places, str(uuid.uuid4())) is None
                assert adopt(os.getpid(), started, places, launch.uuid) is None
                adopted = adopt(pid, started, places, launch.uuid)
                assert adopted is not None and adopted.state is SPAWNED
                assert (adopted.pid, adopted.start_time) == (pid, started)
                await adopted.connect(BOUND)
                assert adopted.state is PAUSED, "as it was left"
                await adopted.resume()
                await adopted.destroy()
                assert adopt(pid, started, places, launch.uuid) is None

        rig.play(scenario())

    def test_finding(self, rig: Rig) -> None:
        """By its UUID a machine is found whose pid nobody knows, and no other."""

        async def scenario() -> None:
            async with rig.launch(rig.frozen) as launch, rig.spawned(launch) as machine:
                await machine.connect(BOUND)
                await machine.release()
                find, other = rig.hypervisor.find, str(uuid.uuid4())
                assert await find({}) == {} == await find({other: launch.places})
                found = await find({other: launch.places, launch.uuid: launch.places})
                assert [m.pid for m in found.pop(launch.uuid)] == [machine.pid] and not found
                (left,) = (await find({launch.uuid: launch.places}))[launch.uuid]
                await left.destroy()
                assert await find({launch.uuid: launch.places}) == {}

        rig.play(scenario())

    def test_descriptions(self, rig: Rig) -> None:
        """What a manifest and a kernel have to be told."""

        async def scenario() -> None:
            version = await rig.hypervisor.version()
            assert version.version and rig.hypervisor.is_version(version.version)
            assert not rig.hypervisor.is_version("0.0.0")
            async with rig.launch(rig.frozen) as launch:
                described = rig.hypervisor.describe(launch)
                assert described and described == rig.hypervisor.describe(replace(launch))
            for accelerator in ("kvm", "tcg"):
                assert rig.hypervisor.cpu(accelerator)
                assert "\n" not in rig.hypervisor.kernel_arguments(accelerator)

        rig.play(scenario())
