"""What the guests of some templates have beside their disk: made with a slot, gone with it."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from templated.drivers.hypervisor.base import OwnLoader
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.drivers.image.store import Image
from templated.drivers.qga.agent import GaAgent
from templated.errors import Conflict, HostError
from templated.model.api import CloneRequest
from templated.model.network import Addresses
from templated.model.spec import IdentitySpec, ImageSpec, MachineSpec, SeedSpec, TemplateSpec
from templated.services.daemon import Services
from templated.services.machines.boot import full_boot, image_parts
from templated.services.machines.generation import guest_parts, hardware
from templated.services.machines.slots import GuestParts, Layer, OwnNetwork
from templated.services.machines.vm import Vm
from tests.unit.fake_daemon import GENERATION, play, until

STOCK = TemplateSpec(
    name="d",
    image=ImageSpec(path="/a.qcow2", seed=SeedSpec()),
    machine=MachineSpec(type="q35", firmware="uefi"),
    identity=IdentitySpec(agent="qemu-ga"),
)


def test_hardware_and_parts() -> None:
    """They follow from the template; one of ours has none of them."""
    found = hardware(STOCK, "tcg", "cpu", "7.2")
    assert (found.agent, found.firmware, found.type) == ("qemu-ga", "uefi", "q35")
    parts = guest_parts(STOCK, Path("/images/i/disk.qcow2"), Path("/v"))
    assert parts == GuestParts(Path("/images/i/seed.img"), Path("/v"), host_keys=True)
    ours = TemplateSpec(name="t")
    assert guest_parts(ours, Path("/images/i/disk.qcow2"), Path("/v")) == GuestParts()
    assert hardware(ours, "tcg", "cpu", "7.2").firmware == ""


def test_a_full_boot(tmp_path: Path) -> None:
    """An image without a kernel boots itself, and a host without UEFI says so."""
    image = Image("i", tmp_path / "disk.qcow2", None, None, 0.0, STOCK.image)
    fake = FakeHypervisor()
    assert full_boot(fake, image, STOCK, "tcg") == OwnLoader()
    with pytest.raises(HostError, match="no UEFI"):
        image_parts(fake, image, STOCK)
    bios = msgspec.structs.replace(STOCK, machine=MachineSpec(type="q35"))
    assert image_parts(fake, image, bios).variables is None


def test_a_network_that_is_full_stops_no_others(tmp_path: Path) -> None:
    """Slots of the other generations are made ready, at once and again when they are taken."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        slots, layer = running.context.slots, running.templates.active("t").layer
        ends = Addresses(
            subnet="10.9.0.0/24", gateway="10.9.0.1", first="10.9.0.2", last="10.9.0.2"
        )
        full = replace(layer, generation="full", own_network=OwnNetwork("one", ends))
        taken = await slots.make(full)
        assert (taken.slot.ip, taken.network_name) == ("10.9.0.2", "one")
        slots.serve(full)
        slots.serve(replace(layer, generation="after"))
        await until(lambda: "full" in slots._resting)
        for _ in range(2):
            await until(lambda: len(slots._ready["after"]) == 2)
            await slots.give_back(await slots.take(replace(layer, generation="after")))
        assert not slots._ready["full"]
        await slots.give_back(taken)
        for generation in ("full", "after"):
            await slots.retire(generation)

    play(tmp_path, scenario)


def test_a_slot_has_them(tmp_path: Path) -> None:
    """Keys of its own, a copy of the variables, the seed opened; and nothing stays of it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        context = running.context
        layout = context.layout
        seed, variables = tmp_path / "seed.img", tmp_path / "empty.fd"
        for file in (seed, variables):
            await asyncio.to_thread(file.write_bytes, file.name.encode())
        parts = GuestParts(seed, variables, host_keys=True)
        generation = running.templates.active("t")
        layer = replace(generation.layer, generation="other", guest=parts)
        slots = [await context.slots.make(layer) for _ in range(2)]
        keys = {key.public for slot in slots for key in slot.host_keys}
        assert len(keys) == 4
        for slot in slots:
            own = layout.vm(slot.slot.id).variables
            assert slot.guest == replace(parts, variables=own)
            assert own.read_bytes() == b"empty.fd" and own.stat().st_mode & 0o777 == 0o600
            assert os.fstat(slot.files.opened[own]).st_ino == own.stat().st_ino
            assert os.pread(slot.files.opened[seed], 20, 0) == b"seed.img"
            sockets = {path.name for path in layout.vm(slot.slot.id).sockets.iterdir()}
            assert sockets == {"qmp", "agent"}, "no key lies in a file"
            launch = context.starter.launch(slot, generation.hardware)
            assert (launch.seed, launch.variables) == (seed, own)
            await context.slots.give_back(slot)
            assert not own.exists()

    play(tmp_path, scenario)


def test_no_cold_start_with_a_seed(tmp_path: Path) -> None:
    """cloud-init would give the clone what it gave the base VM."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        generation = running.templates.active("t")
        generation.manifest = msgspec.structs.replace(generation.manifest, spec=STOCK)
        with pytest.raises(Conflict, match="cloud-init would run again in a cold start of t"):
            await running.clones.create(CloneRequest(name="c", template="t", path="cold"))
        assert not running.clones.states()

    play(tmp_path, scenario)


def test_without_ssh_keygen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is named, and nothing of the slot is left."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        layout, generation = running.context.layout, running.templates.active("t")
        before = set(layout.slots.iterdir())
        monkeypatch.setenv("PATH", str(tmp_path))
        layer = Layer("other", generation.layer.empty, (), guest=GuestParts(host_keys=True))
        with pytest.raises(HostError, match="ssh-keygen is not installed") as caught:
            await running.context.slots.make(layer)
        assert "openssh-client" in caught.value.hint
        assert set(layout.slots.iterdir()) <= before

    play(tmp_path, scenario, slots={"ready": 0})


def test_adopted_clones_have_their_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is known from the generation's manifest."""

    async def before(running: Services, fake: FakeHypervisor) -> None:
        await running.clones.create(CloneRequest(name="c", template="t"))
        layout = running.context.layout
        path = layout.generation("t", GENERATION) / "manifest.json"
        manifest = json.loads(await asyncio.to_thread(path.read_bytes))
        path.chmod(0o644)
        spec = manifest["spec"]
        spec["identity"]["agent"], spec["image"]["boot"] = "qemu-ga", "disk"
        spec["machine"]["type"] = "q35"
        await asyncio.to_thread(path.write_text, json.dumps(manifest))

    async def after(running: Services, fake: FakeHypervisor) -> None:
        vm = running.clones.running("c")
        assert isinstance(vm, Vm) and isinstance(vm.agent, GaAgent)

    play(tmp_path, before, after)
