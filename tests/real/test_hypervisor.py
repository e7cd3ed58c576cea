"""The contract of hypervisors, kept by QEMU; and what only a real one can show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from templated.drivers import disk
from templated.drivers.guest import Agent
from templated.drivers.hypervisor.base import Hypervisor, Kernel, Launch, Machine, SavedState
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu import machine as qemu_machine
from templated.drivers.hypervisor.qemu.command import CODE_SERIAL
from templated.drivers.hypervisor.qemu.driver import Qemu
from templated.drivers.hypervisor.qemu.machine import QemuMachine
from templated.drivers.image.store import Image
from templated.errors import GuestError, HostError, HypervisorError, Timeout
from templated.model.spec import TemplateSpec
from templated.services.machines.boot import full_boot
from tests.hypervisor_contract import BOUND, Frozen, HypervisorContract, Rig

pytestmark = pytest.mark.real
QEMU = "qemu-system-x86_64"


class QemuRig(Rig):
    """QEMU, with an image for what it boots."""

    def __init__(self, image: Image, directory: Path) -> None:
        super().__init__(Qemu(QEMU, directory / "kvm-proof.json"), directory)
        self._image = image

    async def overlay(self, target: Path, backing: Path | None) -> None:
        await disk.create_overlay(target, backing or self._image.disk)

    def kernel(self) -> Kernel:
        boot = full_boot(self.hypervisor, self._image, TemplateSpec(name="t"), "tcg")
        assert isinstance(boot, Kernel)
        return boot

    def missing(self) -> Hypervisor:
        return Qemu("no-such-qemu", self.directory / "kvm-proof.json")

    def spoiled(self, machine: Machine, state: SavedState) -> SavedState:
        path = self.directory / "spoiled"
        path.write_bytes(b"\0" * 4096)
        return replace(state, path=path)

    @contextmanager
    def silent(self, machine: Machine) -> Iterator[None]:
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            if not machine.exited.done():
                os.kill(machine.pid, signal.SIGCONT)

    @contextmanager
    def immortal(self, machine: Machine) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Process, "kill", lambda process: None)
            yield

    @contextmanager
    def hurry(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qemu_machine, "_REPLY_TIMEOUT", 0.2)
            yield


@pytest.fixture(scope="module")
def rig(shared_image: Image) -> Iterator[Rig]:
    """One for all tests, so that only the first boots a VM. It leaves no process behind."""
    directory = Path(tempfile.mkdtemp(prefix="tph.", dir="/tmp"))
    try:
        rig = QemuRig(shared_image, directory)
        rig.hypervisor.prepare()
        yield rig
    finally:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and f"{directory}/" in _arguments(entry):
                os.kill(int(entry.name), signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def _arguments(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class TestQemu(HypervisorContract):
    """See `HypervisorContract`."""


def test_a_process_that_ends_at_once(rig: Rig) -> None:
    """Whoever connects is told why, in the words of QEMU."""

    async def scenario() -> None:
        async with rig.launch(rig.frozen) as launch:
            unknown = replace(launch, hardware=replace(launch.hardware, cpu="no-such-cpu"))
            async with rig.spawned(unknown) as machine:
                with pytest.raises(HypervisorError, match=r"ended with 1: .*CPU model"):
                    await machine.connect(BOUND)
                assert "no-such-cpu" in machine.last_words()

    rig.play(scenario())


@pytest.mark.parametrize("handed", [True, False], ids=["state by descriptor", "by a program"])
def test_who_breaks_out_starts_no_program(rig: Rig, handed: bool) -> None:
    """QEMU that runs a guest is asked to start a program, and the kernel prevents it.

    QEMU 7.2 is ended then, QEMU 10 is told that it may not.

    One that reads its state by a program may: that is what the configuration then asked for.
    """

    refused = "was killed by SIGSYS|Failed to fork .Operation not permitted"

    async def scenario() -> None:
        assert rig.frozen is not None
        fd = os.open(rig.frozen.state, os.O_RDONLY)
        trace = rig.directory / f"started-{handed}"
        try:
            async with rig.launch(rig.frozen) as launch:
                launch = replace(launch, state_fd=fd if handed else None)
                async with rig.spawned(launch) as machine:
                    await machine.connect(BOUND)
                    state = SavedState(rig.frozen.state, *(("fd", fd) if handed else ("exec",)))
                    await machine.restore(state, BOUND)
                    for task in Path(f"/proc/{machine.pid}/task").iterdir():
                        assert "Seccomp:\t2" in (task / "status").read_text()
                    command = f"exec:cat >/dev/null; touch {trace}"
                    asked = cast(QemuMachine, machine)._execute("migrate", {"uri": command})
                    if handed:
                        with pytest.raises(HypervisorError, match=refused):
                            await asked
                    else:
                        await asked
                        while not trace.exists():
                            await asyncio.sleep(0.05)
        finally:
            os.close(fd)
        assert trace.exists() is not handed

    rig.play(scenario())


def test_a_code_drive(rig: Rig) -> None:
    """A clone reads its own code where its template had another; without a drive it is refused."""

    async def scenario() -> None:
        codes = [rig.directory / name for name in ("code-0", "code-1")]
        for code in codes:
            await asyncio.to_thread(code.write_bytes, code.name.encode().ljust(4096, b"."))
        async with rig.launch(None) as launch:
            frozen = await _frozen_with_agent(rig, replace(launch, code=codes[0]))
        async with rig.launch(replace(frozen, code=codes[1])) as launch:
            await _reads(rig, launch, frozen, codes[1])
        async with rig.launch(replace(frozen, code=None)) as launch, rig.spawned(launch) as machine:
            await machine.connect(BOUND)
            with pytest.raises(HypervisorError):
                await machine.restore(SavedState(frozen.state), BOUND)

    rig.play(scenario())


@pytest.mark.parametrize("when", ["waiting", "expecting", "paused"])
def test_a_code_drive_is_exchanged(rig: Rig, when: str) -> None:
    """A VM that stands gets other code, whatever it stands at; its guest reads nothing else."""

    async def scenario() -> None:
        codes = [rig.directory / name for name in ("placeholder", "code")]
        for code in codes:
            await asyncio.to_thread(code.write_bytes, code.name.encode().ljust(4096, b"."))
        async with rig.launch(None) as launch:
            frozen = await _frozen_with_agent(rig, replace(launch, code=codes[0]))
        async with (
            rig.launch(frozen) as launch,
            rig.spawned(launch) as machine,
            _agent(launch) as agent,
        ):
            await machine.connect(BOUND)
            if when == "expecting":
                await machine.expect_state()
            if when != "paused":
                await machine.exchange_code(codes[1])
            await machine.restore(SavedState(frozen.state), BOUND)
            if when == "paused":
                with pytest.raises(HostError, match="no-such"):
                    await machine.exchange_code(rig.directory / "no-such")
                await machine.exchange_code(codes[1])
            await machine.resume()
            await _answers(agent)
            assert await agent.get("/dev/vdb", BOUND) == codes[1].name.encode().ljust(4096, b".")

    rig.play(scenario())


async def _frozen_with_agent(rig: Rig, launch: Launch) -> Frozen:
    """Boot until the agent answers, and freeze."""
    async with rig.spawned(launch) as machine, _agent(launch) as agent:
        await machine.connect(BOUND)
        await _answers(agent)
        assert (await agent.get("/sys/block/vdb/serial", BOUND)).strip() == CODE_SERIAL.encode()
        await machine.pause()
        return await rig.saved(launch, machine)


async def _reads(rig: Rig, launch: Launch, frozen: Frozen, code: Path) -> None:
    async with rig.spawned(launch) as machine, _agent(launch) as agent:
        await machine.connect(BOUND)
        await machine.restore(SavedState(frozen.state), BOUND)
        await machine.resume()
        await _answers(agent)
        assert await agent.get("/sys/block/vdb/ro", BOUND) == b"1\n"
        assert await agent.get("/dev/vdb", BOUND) == await asyncio.to_thread(code.read_bytes)


@asynccontextmanager
async def _agent(launch: Launch) -> AsyncIterator[Agent]:
    """The agent's port, connected before the guest's state is loaded."""
    agent = Agent(launch.places.agent)
    await agent.connect()
    try:
        yield agent
    finally:
        await agent.close()


async def _answers(agent: Agent) -> None:
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(GuestError, Timeout):
                return await agent.ping(1.0)
