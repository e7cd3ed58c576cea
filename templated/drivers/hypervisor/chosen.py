"""QEMU started by us, or by libvirt: each launch says which, and the rest is the same QEMU's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from templated.drivers.hypervisor.base import Launch, Machine, Places
from templated.drivers.hypervisor.libvirt.driver import Libvirt
from templated.drivers.hypervisor.qemu.driver import Qemu
from templated.model.network import Addresses


class QemuOrLibvirt(Qemu):
    """What is known of the host, its QEMU and KVM holds for both; see `base.Hypervisor`."""

    def __init__(self, binary: str, proof: Path, libvirt: Libvirt) -> None:
        """As `Qemu`; `libvirt` starts those whose hardware says so."""
        super().__init__(binary, proof)
        self._libvirt = libvirt

    def prepare(self) -> None:
        super().prepare()
        self._libvirt.sweep()

    async def addresses(self, network: str) -> Addresses:
        return await self._libvirt.addresses(network)

    def describe(self, launch: Launch) -> tuple[str, ...]:
        if launch.hardware.hypervisor == "libvirt":
            return self._libvirt.describe(launch, self._program.path)
        return super().describe(launch)

    def spawn(self, launch: Launch) -> Machine:
        if launch.hardware.hypervisor == "libvirt":
            return self._libvirt.spawn(launch, self._program.path)
        return super().spawn(launch)

    def adopt(
        self, pid: int, start_time: int, places: Places, uuid: str, uid: int | None = None
    ) -> Machine | None:
        if self._libvirt.has(places):
            return self._libvirt.adopt(pid, start_time, places, uuid)
        return super().adopt(pid, start_time, places, uuid, uid)

    async def find(self, places: Mapping[str, Places]) -> dict[str, list[Machine]]:
        await self._libvirt.settle(places)
        return await super().find(places)
