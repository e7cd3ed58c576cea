"""The fake hypervisor keeps the contract that the real one keeps: what it lets pass is allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from templated.drivers.hypervisor import fake
from templated.drivers.hypervisor.base import Hypervisor, Kernel, Machine, SavedState
from templated.drivers.hypervisor.fake import STEPS, FakeHypervisor
from tests.hypervisor_contract import HypervisorContract, Rig


class FakeRig(Rig):
    """Machines without processes."""

    hypervisor: FakeHypervisor

    async def overlay(self, target: Path, backing: Path | None) -> None:
        target.touch()

    def kernel(self) -> Kernel:
        return Kernel(Path("vmlinuz"), Path("initrd"), "")

    def missing(self) -> Hypervisor:
        other = FakeHypervisor()
        other.fail = "spawn"
        return other

    def spoiled(self, machine: Machine, state: SavedState) -> SavedState:
        self.hypervisor.machines[machine.pid].fail = "restore"
        return state

    @contextmanager
    def silent(self, machine: Machine) -> Iterator[None]:
        for step in STEPS:
            self.hypervisor.hold(step)
        try:
            yield
        finally:
            self.hypervisor.let_go()

    @contextmanager
    def immortal(self, machine: Machine) -> Iterator[None]:
        self.hypervisor.hold("destroy")
        try:
            yield
        finally:
            self.hypervisor.let_go()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fake, "REPLY_TIMEOUT", 0.1)
            yield


class TestFake(HypervisorContract):
    """See `HypervisorContract`."""

    @pytest.fixture
    def rig(self) -> Iterator[Rig]:
        with tempfile.TemporaryDirectory(prefix="tph.", dir="/tmp") as directory:
            yield FakeRig(FakeHypervisor(), Path(directory))
