"""QEMU as a hypervisor: what runs guests on this host, and its processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import stat
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from templated import failpoints
from templated.drivers.host import procfs
from templated.drivers.host.programs import run
from templated.drivers.hypervisor.base import Launch, Machine, Places, Proof, Support
from templated.drivers.hypervisor.process import (
    Demotion,
    Process,
    demotion_problem,
    file_limit_problem,
    limit_children,
    use_small_pages,
)
from templated.drivers.hypervisor.qemu import accel
from templated.drivers.hypervisor.qemu.command import (
    SANDBOX,
    UEFI_CODE,
    UEFI_VARIABLES,
    inherited,
    qemu_arguments,
)
from templated.drivers.hypervisor.qemu.features import PROVEN, features, proven, release
from templated.drivers.hypervisor.qemu.machine import QemuMachine
from templated.drivers.hypervisor.qemu.program import Program
from templated.drivers.hypervisor.qemu.reach import Reach
from templated.drivers.hypervisor.qemu.tsc import tsc_khz
from templated.drivers.hypervisor.states import MachineState
from templated.errors import HostError
from templated.model.generation import QemuVersion
from templated.model.network import Addresses


class Qemu:
    """Starts, finds and adopts QEMU processes; see `templated.drivers.hypervisor.base`."""

    def __init__(self, binary: str, proof: Path) -> None:
        """`binary` is a path, or a name in PATH; `proof` the file that remembers about KVM."""
        self._binary = binary
        self._program = Program(binary)
        self._proof = proof
        self._proving = asyncio.Lock()

    def prepare(self) -> None:
        use_small_pages()
        limit_children()
        tsc_khz()  # remembered from here on, as the next one is
        _ = self._reach

    async def version(self) -> QemuVersion:
        return await self._program.version()

    def is_version(self, version: str) -> bool:
        return self._program.is_version(version)

    def support(self, version: str) -> Support:
        return Support(
            host=PROVEN.get(release(version), ""),
            proven=proven(),
            read_only_memory=features(version).read_only_memory,
        )

    def kvm_problem(self) -> str:
        return accel.kvm_opens()

    def remembered_proof(self) -> Proof | None:
        return accel.recall(self._proof, self._program.known_version)

    async def prove_kvm(self, kernel: Path, initrd: Path) -> Proof:
        async with self._proving:
            version = (await self.version()).version
            remembered = accel.recall(self._proof, version)
            if remembered is not None:
                return remembered
            return await accel.prove_kvm(self._binary, version, kernel, initrd, self._proof)

    async def confinement_problem(self) -> str:
        try:
            await run(self._program.path, "-sandbox", SANDBOX, "-version", timeout=10.0)
        except HostError as error:
            return error.message
        return ""

    def user_problem(self) -> str:
        return demotion_problem()

    def file_limit_problem(self) -> str:
        return file_limit_problem()

    def landlock_problem(self) -> str:
        return self._reach.problem

    def clock_problem(self, accelerator: str) -> str:
        if accelerator == "kvm" or tsc_khz() is not None:
            return ""
        return "the host's TSC is not constant: TCG guests may drift"

    def uefi_variables(self) -> Path:
        for file in (UEFI_CODE, UEFI_VARIABLES):
            if not file.is_file():
                what = f"there is no UEFI for VMs: {file} is missing"
                raise HostError(what, hint="apt install ovmf")
        return UEFI_VARIABLES

    def cpu(self, accelerator: str) -> str:
        return accel.CPUS[accelerator]

    def kernel_arguments(self, accelerator: str) -> str:
        # tsc=reliable: with nothing to check the TSC against, the kernel would otherwise never
        # leave the periodic tick (250 Hz), which is most of what an idle guest costs.
        frequency = tsc_khz() if accelerator == "tcg" else None
        return f"tsc=reliable tsc_early_khz={frequency}" if frequency else "tsc=reliable"

    async def addresses(self, network: str) -> Addresses:
        raise HostError("QEMU has no networks of its own", hint="hypervisor: libvirt")

    def describe(self, launch: Launch) -> tuple[str, ...]:
        # By their paths: the numbers of descriptors say nothing to people.
        return tuple(qemu_arguments(self._program.path, replace(launch, opened={})))

    def spawn(self, launch: Launch) -> Machine:
        arguments = qemu_arguments(self._binary, launch)
        child = Process.spawn(
            arguments, log=launch.places.log, fds=inherited(launch), user=self.demotion(launch)
        )
        first = MachineState.WAITING if launch.boot is None else MachineState.RUNNING
        return QemuMachine(child, launch.places, features(launch.hardware.version), first)

    def demotion(self, launch: Launch) -> Demotion | None:
        """The user that a VM runs as, and what it may open; None: no user of its own."""
        if launch.uid is None:
            return None
        return Demotion(launch.uid, _groups(launch), self._reach.options(launch))

    @functools.cached_property
    def _reach(self) -> Reach:
        return Reach(self._program.path)

    def adopt(
        self, pid: int, start_time: int, places: Places, uuid: str, uid: int | None = None
    ) -> Machine | None:
        found = Process.adopt(pid, start_time, uuid, uid)
        # Which QEMU it is nobody needs to know any more: it neither loads nor saves a state.
        return QemuMachine(found, places, features(""), None) if found else None

    async def find(self, places: Mapping[str, Places]) -> dict[str, list[Machine]]:
        found: dict[str, list[Machine]] = defaultdict(list)
        if failpoints.armed:
            await failpoints.reach("recover.find")
        for uuid, pid in await asyncio.to_thread(procfs.with_argument, set(places)):
            started = procfs.start_time(pid)
            machine = self.adopt(pid, started, places[uuid], uuid) if started else None
            if machine is not None:
                found[uuid].append(machine)
        return dict(found)


def _groups(launch: Launch) -> tuple[int, ...]:
    groups: tuple[int, ...] = ()
    if launch.hardware.accel == "kvm":
        # QEMU opens the device by its path; Debian lets the members of a group do so.
        with contextlib.suppress(OSError):
            device = os.stat("/dev/kvm")
            only_group = device.st_mode & stat.S_IWGRP and not device.st_mode & stat.S_IWOTH
            groups = (device.st_gid,) if only_group and device.st_gid != 0 else ()
    return groups
