"""QEMU's command lines against golden files.

To refresh them after a deliberate change: TEMPLATED_UPDATE_GOLDEN=1 scripts/test tests/unit
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from templated.drivers.hypervisor.base import Hardware, Kernel, Launch, OwnLoader, Places
from templated.drivers.hypervisor.qemu.command import inherited, qemu_arguments
from templated.model.network import Forward, Slirp, Tap

GOLDEN = Path(__file__).parent / "golden"
SLIRP = Slirp("10.77.0.0/16", "10.77.0.1", "10.77.0.2", "10.77.0.3", restrict=True)
LAUNCH = Launch(
    slot="0123456789",
    uuid="5e0c0a8e-6f5e-4a63-9d3f-0d6a1f6b2c11",
    mac="02:34:e3:00:00:03",
    hardware=Hardware("microvm", 128 << 20, 1, "tcg", "qemu64,+arat", "7.2.22"),
    places=Places(Path("/state/slots/0123456789"), Path("/run/t/vm/0123456789")),
    memory=Path("/dev/shm/t/python-fn/g/memory"),
    memory_shared=False,
    disk=Path("/state/slots/0123456789/disk.qcow2"),
    network=SLIRP,
    control_fd=7,
    agent_fd=8,
)
NEW = replace(LAUNCH.hardware, version="10.0.13")
GA = replace(LAUNCH.hardware, type="q35", vcpus=2, agent="qemu-ga", firmware="bios")
BOOT = Kernel(Path("/images/i/vmlinuz"), Path("/images/i/initrd"), "console=ttyS0 quiet")
CASES = {
    "microvm-restore": LAUNCH,
    "microvm-boot": replace(LAUNCH, boot=BOOT, memory_shared=True),
    "microvm-cold": replace(LAUNCH, boot=BOOT, memory=None),
    "q35-restore": replace(LAUNCH, hardware=replace(LAUNCH.hardware, type="q35", vcpus=2)),
    "q35-boot": replace(
        LAUNCH, hardware=replace(LAUNCH.hardware, type="q35"), boot=BOOT, memory_shared=True
    ),
    "kvm": replace(
        LAUNCH, hardware=replace(LAUNCH.hardware, accel="kvm", cpu="host,migratable=on")
    ),
    "tap-and-fd": replace(LAUNCH, network=Tap(9), state_fd=10),
    "fd": replace(LAUNCH, state_fd=9),
    "unconfined": replace(LAUNCH, confined=False),
    "10.0-restore": replace(LAUNCH, hardware=NEW),
    "10.0-fd": replace(LAUNCH, hardware=NEW, state_fd=9),
    "10.0-boot": replace(LAUNCH, hardware=NEW, boot=BOOT, memory_shared=True),
    "forwards": replace(
        LAUNCH,
        network=replace(
            SLIRP,
            restrict=False,
            forwards=(Forward(80, 8080), Forward(53, 0, "127.0.0.2", "udp")),
        ),
    ),
    "code": replace(LAUNCH, code=Path("/a,b/code.img")),
    "code-q35": replace(
        LAUNCH,
        hardware=replace(LAUNCH.hardware, type="q35"),
        boot=BOOT,
        memory_shared=True,
        code=Path("/code.img"),
    ),
    "own-user": replace(
        LAUNCH,
        state_fd=9,
        uid=2000000007,
        opened={
            LAUNCH.disk: 10,
            Path("/state/g/disk.qcow2"): 11,
            Path("/images/i/disk.qcow2"): 12,
            LAUNCH.places.serial_log: 13,
            LAUNCH.memory or Path(): 14,
        },
        backing=(Path("/state/g/disk.qcow2"), Path("/images/i/disk.qcow2")),
    ),
    "own-user-boot": replace(
        LAUNCH,
        boot=BOOT,
        memory_shared=True,
        code=Path("/code.img"),
        opened={
            BOOT.kernel: 20,
            BOOT.initrd: 21,
            LAUNCH.memory or Path(): 14,
            Path("/code.img"): 22,
        },
    ),
    "qemu-ga": replace(LAUNCH, hardware=GA, boot=OwnLoader(), memory_shared=True),
    "qemu-ga-restore": replace(LAUNCH, hardware=GA, state_fd=9),
    "uefi": replace(
        LAUNCH,
        hardware=replace(GA, firmware="uefi"),
        boot=OwnLoader(),
        memory_shared=True,
        variables=Path("/state/slots/0123456789/variables.fd"),
        seed=Path("/images/i/seed.img"),
        opened={
            LAUNCH.disk: 10,
            Path("/state/slots/0123456789/variables.fd"): 11,
            Path("/images/i/seed.img"): 12,
        },
    ),
    "commas": replace(LAUNCH, disk=Path("/a,b/disk.qcow2"), memory=Path("/c,d/memory")),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """A change of any argument shows in a review."""
    text = "\n".join(qemu_arguments("qemu-system-x86_64", CASES[name])) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("TEMPLATED_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_the_path_of_a_clone_has_no_kernel() -> None:
    """A clone loads nothing that its state already has."""
    arguments = qemu_arguments("qemu", LAUNCH)
    assert "-kernel" not in arguments and arguments[-2:] == ["-incoming", "defer"]


def test_what_the_command_line_names_is_inherited() -> None:
    """The sockets, the tap, the saved state, and files that are opened before."""
    assert inherited(LAUNCH) == (7, 8)
    assert inherited(CASES["own-user"]) == (7, 8, 9, 10, 11, 12, 13, 14)
    assert inherited(CASES["tap-and-fd"]) == (7, 8, 9, 10)


@pytest.mark.parametrize("name", CASES)
def test_template_and_clone_have_the_same_hardware(name: str) -> None:
    """State is restored into what it was saved from: only memory, files and boot may differ."""

    def devices(launch: Launch) -> list[str]:
        arguments = qemu_arguments("qemu", launch)
        pairs = itertools.pairwise(arguments)
        kinds = ("-device", "-machine", "-cpu", "-smp", "-m", "-global", "-vga")
        return [f"{option} {value}" for option, value in pairs if option in kinds]

    clone = replace(CASES[name], boot=None, memory_shared=False)
    template = replace(CASES[name], boot=BOOT, memory_shared=True)
    assert devices(clone) == devices(template)


def test_no_golden_file_is_left_over() -> None:
    """Every file is held by a case."""
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)
