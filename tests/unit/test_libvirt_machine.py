"""A machine of libvirt whose libvirt fails: what it says then, and what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.hypervisor.base import SavedState
from templated.drivers.hypervisor.libvirt import machine as libvirt_machine
from templated.drivers.hypervisor.libvirt.domain import Label
from templated.drivers.hypervisor.libvirt.lending import Held, Lent
from templated.drivers.hypervisor.libvirt.link import Link
from templated.drivers.hypervisor.libvirt.machine import LibvirtMachine
from templated.drivers.hypervisor.process import Process
from templated.drivers.hypervisor.qemu.features import features
from templated.drivers.hypervisor.states import MachineState
from templated.errors import HostError, HypervisorError, NotFound


class Gone(Link):
    """libvirt that is not there."""

    async def ask(self, what: str, work: Any, *, bound: float) -> Any:
        raise HostError(f"{what}: nothing answers")


class Domain(Link):
    """libvirt that has the domain until it is told to destroy it."""

    def __init__(self) -> None:
        super().__init__("test:///default")
        self.destroyed: list[str] = []

    async def ask_domain(self, uuid: str, what: str, work: Any, *, bound: float) -> Any:
        if self.destroyed:
            raise NotFound(what)
        return work(self)

    def destroy(self) -> None:
        """As virDomain's."""
        self.destroyed.append("u")


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in place of a domain's QEMU, which the block must end."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            yield child
            assert child.wait(5) == -signal.SIGKILL
        finally:
            child.kill()


def machine(directory: Path, held: Held, link: Link | None = None) -> LibvirtMachine:
    lent = Lent(directory / "lent", directory / "memory")
    label = Label("0123456789", "t", "g")
    link = link or Gone("test:///default")
    return LibvirtMachine(link, "u", label, features("7.2.0"), lent, held)


def test_a_restore_that_never_begins(tmp_path: Path) -> None:
    """The state that is held is closed with the rest."""
    state = tmp_path / "state"
    state.write_bytes(b"state")

    async def scenario() -> None:
        fd = os.open(state, os.O_RDONLY)
        one = machine(tmp_path, Held({}, None, fd, None))
        one._move(MachineState.WAITING)
        with pytest.raises(HostError, match="nothing answers"):
            await one.restore(SavedState(state, fd=3), 5.0)
        await one.release()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    asyncio.run(scenario())


def test_a_start_that_fails_in_an_unknown_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error of the VM for who waits, and in full in the log; what was held is closed."""

    async def broken() -> None:
        raise KeyError("node")

    async def scenario() -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        one = machine(tmp_path, Held({}, fd, None, None))
        one.start(broken(), MachineState.WAITING)
        with pytest.raises(HypervisorError, match="its start failed: KeyError"):
            await one.connect(5.0)
        assert await one.exited == "was not started: its start failed: KeyError('node')"
        await one.destroy()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    asyncio.run(scenario())
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("asked", [True, False])
def test_the_end_is_libvirts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asked: bool
) -> None:
    """Whatever process was taken for the domain's: libvirt ends its own, if it ever started one."""
    monkeypatch.setattr(libvirt_machine, "_FORGETS_WITHIN", 0.02)

    async def scenario() -> None:
        link = Domain()
        one = machine(tmp_path, Held({}, None, None, None), link)
        one.asked = asked
        with sleeper() as child:
            one.found(Process(child.pid, None))
            await one.destroy()
        if one._confirming is not None:
            await one._confirming
        assert link.destroyed == ["u"] * asked
        await one.destroy()
        await one.release()

    asyncio.run(scenario())


def test_an_end_without_libvirt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its process is ended, and the log says that nobody else has confirmed it."""

    async def scenario() -> None:
        one = machine(tmp_path, Held({}, None, None, None))
        one.asked = True
        with sleeper() as child:
            one.found(Process(child.pid, None))
            await one.destroy()
        assert one._confirming is not None
        await one._confirming
        await one.release()

    asyncio.run(scenario())
    assert "does not say that u has ended" in caplog.text


def test_one_connection_for_all() -> None:
    """Whoever comes first opens it, also again when it has broken, and on another loop."""
    link = Link("test:///default")

    async def connections() -> set[object]:
        asked = (link.ask("it", lambda c: c, bound=5.0) for _ in range(12))
        return set(await asyncio.gather(*asked))

    async def scenario() -> None:
        assert len(await connections()) == 1
        assert link._connection is not None
        link._connection.close()
        assert len(await connections()) == 1

    for _ in range(2):
        asyncio.run(scenario())
