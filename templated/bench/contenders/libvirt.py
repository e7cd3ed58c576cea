"""The driver for libvirt, with a libvirtd of the bench's own and no daemon of ours around it."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from templated.bench.bare import BOUND, PLAN, Stopwatch, order
from templated.bench.contenders.base import Once, shared_memory
from templated.bench.libvirtd import Libvirtd, private_libvirtd
from templated.bench.session import Session
from templated.drivers.disk import copy_overlay, create_overlay
from templated.drivers.guest import Agent
from templated.drivers.hypervisor.base import Kernel, Launch, Machine, Places, SavedState
from templated.drivers.hypervisor.libvirt.driver import LentPlaces, Libvirt
from templated.drivers.network import Port, make_network
from templated.errors import GuestError, Timeout
from templated.model.network import UserNetwork
from templated.model.units import seconds
from templated.services.machines.generation import Generation

_SETTLE = 2.0
_PAUSE = 0.05


@dataclass(frozen=True)
class LibvirtDriver:
    """The image booted as a domain, frozen once, and started as a clone each time."""

    session: Session
    path: str
    """`direct`, or `standby`: the domain is there and waits for its state when the clock starts."""

    @property
    def name(self) -> str:
        return f"libvirt-{self.path}"

    @property
    def about(self) -> str:
        begun = "waits already" if self.path == "standby" else "is started"
        return f"our driver for libvirt: a domain {begun}, its state is restored, and it identifies"

    @contextmanager
    def opened(self) -> Iterator[Once]:
        generation = self.session.generation()
        with (
            TemporaryDirectory(prefix="tpl.", dir="/tmp") as places,
            shared_memory(generation) as shm,
            private_libvirtd() as daemon,
            asyncio.Runner() as runner,
        ):
            lent = LentPlaces(Path(places) / "lent", Path(shm) / "lent")
            driver = Libvirt(daemon.uri, lent)
            template = _Template(driver, generation, Path(places), Path(shm))
            runner.run(template.freeze())

            def once() -> dict[str, float]:
                _forgotten(daemon)
                return runner.run(template.start(standby=self.path == "standby"))

            yield once


@dataclass(frozen=True)
class _Template:
    """What one domain was frozen to, and how clones of it start."""

    driver: Libvirt
    generation: Generation
    places: Path
    shm: Path

    async def freeze(self) -> None:
        """As a template's build does it, without its probes."""
        disk = self.places / "base.qcow2"
        await create_overlay(disk, self.generation.image)
        image, manifest = self.generation.image.parent, self.generation.manifest
        kernel = Kernel(image / "vmlinuz", image / "initrd", manifest.kernel_cmdline)
        async with self._launched(disk, (self.generation.image,), kernel) as (machine, agent):
            await machine.connect(BOUND)
            await _booted(agent, seconds(manifest.spec.boot_timeout))
            await agent.identify(BOUND, order(str(uuid.uuid4()), PLAN.mac(0)))
            await asyncio.sleep(_SETTLE)
            await agent.quiesce(BOUND)
            await machine.pause()
            await machine.detach_network()
            await machine.save(self.shm / "state", BOUND)
            await machine.quit(BOUND)
        for name in ("memory", "state"):
            (self.shm / name).chmod(0o444)
        await create_overlay(self.places / "empty.qcow2", disk)

    async def start(self, *, standby: bool) -> dict[str, float]:
        """One clone. Layer 3 is made beforehand here too."""
        overlay = self.places / "disk.qcow2"
        await asyncio.to_thread(copy_overlay, self.places / "empty.qcow2", overlay)
        backing = (self.places / "base.qcow2", self.generation.image)
        watch = Stopwatch()
        async with self._launched(overlay, backing, None) as (machine, agent):
            await machine.connect(BOUND)
            if standby:
                await machine.expect_state()
                watch = Stopwatch()
            else:
                watch.mark("spawn")
            await machine.restore(SavedState(self.shm / "state"), BOUND)
            watch.mark("restore")
            await machine.resume()
            watch.mark("resume")
            await agent.identify(BOUND, order(str(uuid.uuid4()), PLAN.mac(0)))
            watch.mark("identify")
            await machine.set_link(True)
            watch.mark("link")
        return watch.row()

    @asynccontextmanager
    async def _launched(
        self, disk: Path, backing: tuple[Path, ...], boot: Kernel | None
    ) -> AsyncIterator[tuple[Machine, Agent]]:
        """A domain that is being started, and the agent's port; it is ended at the end."""
        with ExitStack() as stack:
            launch = self._launch(disk, backing, boot, stack)
            async with AsyncExitStack() as undo:
                machine = self.driver.spawn(launch, self.generation.manifest.qemu.path)
                undo.push_async_callback(machine.destroy)
                agent = Agent(launch.places.agent)
                undo.push_async_callback(agent.close)
                await agent.connect()
                yield machine, agent

    def _launch(
        self, disk: Path, backing: tuple[Path, ...], boot: Kernel | None, stack: ExitStack
    ) -> Launch:
        directory = self.places / "vm"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        places = Places(directory, directory)
        agent = stack.enter_context(socket.socket(socket.AF_UNIX))
        agent.bind(str(places.agent))
        agent.listen(1)
        network = make_network(UserNetwork(), PLAN, "bench")
        return Launch(
            # libvirt forgets a domain a moment after its end: the next one has another name.
            slot=secrets.token_hex(5),
            uuid=str(uuid.uuid4()),
            mac=PLAN.mac(0),
            hardware=replace(self.generation.hardware, hypervisor="libvirt"),
            places=places,
            memory=self.shm / "memory",
            memory_shared=boot is not None,
            disk=disk,
            network=network.attach(Port("bench"), 0),
            control_fd=agent.fileno(),
            agent_fd=agent.fileno(),
            boot=boot,
            backing=backing,
            template=self.generation.template,
            generation=self.generation.id,
        )


def _forgotten(daemon: Libvirtd) -> None:
    """Wait until libvirt has forgotten the domain before: until then it starts others slowly.

    That takes as long as the host's init takes to reap a process: with systemd no time, with the
    one of a container seconds. `virsh destroy` waits for it, too.
    """
    deadline = time.monotonic() + BOUND
    while daemon.virsh("list", "--name").strip() and time.monotonic() < deadline:
        time.sleep(_PAUSE)


async def _booted(agent: Agent, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return await agent.ping(1.0)
        except (GuestError, Timeout):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
