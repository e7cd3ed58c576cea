"""The XML of libvirt's domains against golden files, and what is lent to QEMU.

To refresh them after a deliberate change: TEMPLATED_UPDATE_GOLDEN=1 scripts/test tests/unit
"""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from templated.drivers.hypervisor.base import Launch, OwnLoader
from templated.drivers.hypervisor.libvirt import driver
from templated.drivers.hypervisor.libvirt.domain import (
    NAMESPACE,
    Label,
    domain_xml,
    memory_options,
)
from templated.drivers.hypervisor.libvirt.driver import user_of
from templated.drivers.hypervisor.libvirt.lending import Lent, User, fill, hold
from templated.drivers.hypervisor.libvirt.network import addresses_of
from templated.errors import HostError
from templated.model.network import AddressPlan, OfLibvirt, Tap
from templated.services.machines.generation import renew
from tests.unit.test_command import BOOT, GOLDEN, LAUNCH

LENT = Lent(Path("/state/libvirt/u"), Path("/dev/shm/t/.libvirt/u"))
USER = User(64055, 64055)
CLONE = replace(
    LAUNCH,
    hardware=replace(LAUNCH.hardware, hypervisor="libvirt"),
    backing=(Path("/state/g/disk.qcow2"), Path("/images/i/disk.qcow2")),
    template="python-fn",
    generation="20261129t000000-0a1b2c",
)
KVM = replace(CLONE.hardware, type="q35", accel="kvm", cpu="host,migratable=on", vcpus=2)
CASES = {
    "libvirt-restore": CLONE,
    "libvirt-boot": replace(CLONE, boot=BOOT, memory_shared=True, code=Path("/code/none.img")),
    "libvirt-cold": replace(CLONE, boot=BOOT, memory=None, network=Tap(9)),
    "libvirt-uefi": replace(
        CLONE,
        hardware=replace(KVM, firmware="uefi", agent="qemu-ga"),
        seed=Path("/images/i/seed.img"),
        variables=Path("/state/slots/s/variables.fd"),
        boot=OwnLoader(),
        memory_shared=True,
    ),
    "libvirt-network": replace(CLONE, network=OfLibvirt("default"), boot=BOOT, memory_shared=True),
    "libvirt-q35-kvm": replace(CLONE, hardware=KVM, network=Tap(9)),
}


@pytest.mark.parametrize("name", CASES)
def test_domain(name: str) -> None:
    """Every part of a domain is deliberate."""
    text = _xml(CASES[name])
    file = GOLDEN / f"{name}.xml"
    if os.environ.get("TEMPLATED_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_names_are_escaped() -> None:
    """Whatever a template or a path is called, it is one value."""
    odd = replace(
        CLONE, template="a<b>&'\"", places=replace(CLONE.places, directory=Path("/a&<'b"))
    )
    domain = ET.fromstring(_xml(odd))  # noqa: S314
    assert domain.findtext("title") == odd.template
    log = domain.find("devices/serial/log")
    assert log is not None and log.get("file") == "/a&<'b/serial.log"
    assert "mem-path=/a,,b,share=on" in memory_options(
        Path("/a,b"), 1, shared=True, read_only=False
    )


def test_metadata() -> None:
    """What `virsh metadata` shows: a clone's name only once it has one."""
    label = Label("0123456789", "t", "g")
    assert label.text() == '<vm slot="0123456789" template="t" generation="g" />'
    assert replace(label, name="fn-1").element(NAMESPACE).get("name") == "fn-1"


def _range(start: int, end: int) -> str:
    return f"<range start='192.168.122.{start}' end='192.168.122.{end}'/>"


def _network(inner: str) -> str:
    ip = f"<ip address='192.168.122.1' netmask='255.255.255.0'><dhcp>{inner}</dhcp></ip>"
    return f"<network><name>default</name>{ip}</network>"


_DAC = "<secmodel><model>dac</model><baselabel type='kvm'>+64055:+109</baselabel></secmodel>"


@pytest.mark.parametrize(
    ("models", "user"),
    [
        ("<secmodel><model>none</model></secmodel>", None),
        (f"<secmodel><model>apparmor</model></secmodel>{_DAC}", User(64055, 109)),
    ],
    ids=["session", "system"],
)
def test_who_qemu_runs_as(models: str, user: User | None) -> None:
    """libvirt's capabilities tell; without the model `dac` it is libvirt's own user."""
    assert user_of(f"<capabilities><host>{models}</host></capabilities>") == user


@pytest.mark.parametrize(
    ("inner", "first", "last"),
    [
        ("", 2, 254),
        (_range(2, 127), 128, 254),
        (_range(100, 254), 2, 99),
        (f"{_range(2, 127)}<host ip='192.168.122.200'/>", 128, 199),
    ],
    ids=["no DHCP", "behind the range", "before the range", "reserved ones"],
)
def test_addresses_of_a_network(inner: str, first: int, last: int) -> None:
    """VMs get what DHCP does not hand out: two never have one address."""
    ends = f"192.168.122.{first}", f"192.168.122.{last}"
    given = addresses_of("default", _network(inner))
    assert (given.first, given.last) == ends
    assert (given.subnet, given.gateway) == ("192.168.122.0/24", "192.168.122.1")
    base = AddressPlan("10.77.0.0/16", b"host")
    plan = base.elsewhere(given)
    assert (plan.ip(0), plan.ip(plan.capacity - 1)) == ends
    assert plan.mac(3) == base.mac(3) and (plan.prefix, plan.gateway) == (24, "192.168.122.1")
    assert base.ip(0) == "10.77.0.3" and plan.index(ends[1]) == plan.capacity - 1
    with pytest.raises(ValueError, match="no address"):
        plan.ip(plan.capacity)


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        (_network(_range(2, 254)), "leaves no address"),
        ("<network><ip family='ipv6' address='fd00::1' prefix='64'/></network>", "no IPv4 subnet"),
        ("<network><ip address='192.168.1.1' prefix='31'/></network>", "cannot be used"),
        ("<network><ip address='nonsense'/></network>", "cannot be used"),
    ],
    ids=["all handed out", "IPv6", "too small", "nonsense"],
)
def test_networks_that_cannot_be_used(xml: str, said: str) -> None:
    with pytest.raises(HostError, match=said):
        addresses_of("default", xml)


def test_whose_process_it_is(tmp_path: Path) -> None:
    """A domain's QEMU has the option and the user; who else names its UUID is not taken for it."""
    name, uuid = "4f0c9d21-0000-4000-8000-00000000000a", LAUNCH.uuid
    places = replace(LAUNCH.places, directory=tmp_path)
    wait = ["sh", "-c", "read line", "sh"]
    with (
        subprocess.Popen([*wait, "-uuid", name], stdin=subprocess.PIPE) as domain,
        subprocess.Popen([*wait, "destroy", name], stdin=subprocess.PIPE) as other,
    ):
        (tmp_path / "domain.xml").write_text(_xml(replace(CLONE, uuid=name)))
        assert not driver._runs(domain.pid, name, places), "it is not libvirt's user's"
        assert driver._found(name, USER.uid) is None
        text = domain_xml(CLONE, "qemu", LENT, User(os.getuid(), os.getgid()), "")
        for mark in (text, domain_xml(CLONE, "qemu", LENT, None, "")):
            (tmp_path / "domain.xml").write_text(mark)
            assert driver._runs(domain.pid, name, places)
            assert not driver._runs(domain.pid, uuid, places)
            assert not driver._runs(other.pid, name, places)
        found = driver._found(name, os.getuid())
        assert found is not None and found[0] == domain.pid
        (tmp_path / "domain.xml").unlink()
        assert not driver._runs(domain.pid, name, places), "libvirt was not asked yet"
        for process in (domain, other):
            process.communicate(b"\n")


def test_lending(tmp_path: Path) -> None:
    """A VM's directory has links to its files alone, and the disk is ours again at the end."""
    launch = _files(tmp_path)
    held = hold(launch, None)
    lent = Lent(tmp_path / "lent/u", tmp_path / "memory-lent/u")
    lent.lend(held.files, None)
    try:
        names = sorted(path.name for path in lent.directory.iterdir())
        assert names == ["code.img", "disk.qcow2", "layer-0.qcow2"]
        assert lent.path("disk.qcow2").samefile(launch.disk)
        assert lent.path("memory").samefile(tmp_path / "memory")
        assert launch.code is not None and launch.code.stat().st_mode & 0o777 == 0o644
        given = lent.lend_more("given.img", launch.disk)
        assert given.samefile(launch.disk)
        with pytest.raises(HostError, match="exists"):
            lent.lend(held.files, None)
    finally:
        held.close()
        held.close()
        for _ in range(2):
            lent.take_back()
    assert not lent.directory.exists() and not lent.memory.exists()
    assert launch.disk.read_text() == "disk"


def test_memory_that_a_vm_writes(tmp_path: Path) -> None:
    """A base VM's is its user's alone, whatever it was; a template's stays as it is."""
    launch = _files(tmp_path)
    memory = tmp_path / "memory"
    for mode, lent_as in ((0o666, 0o600), (0o444, 0o444)):
        memory.chmod(mode)
        held, lent = hold(launch, None), Lent(tmp_path / "lent/u", tmp_path / "memory-lent/u")
        lent.lend(held.files, User(os.geteuid(), os.getegid()))
        assert memory.stat().st_mode & 0o777 == lent_as
        held.close()
        lent.take_back()


def test_what_was_lent_is_renewed(tmp_path: Path) -> None:
    """Another VM of the same user may have it open: it writes what is no template's any more."""
    file = tmp_path / "memory"
    file.write_bytes(b"frozen")
    with open(file, "r+b", buffering=0) as other:
        renew(file)
        other.write(b"hacked")
    assert file.read_bytes() == b"frozen" and file.stat().st_mode & 0o777 == 0o444
    assert list(tmp_path.iterdir()) == [file]


def test_a_copy_of_memory(tmp_path: Path) -> None:
    """It has what the template has, and as many holes."""
    size = 1 << 20
    source = tmp_path / "memory"
    with open(source, "wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"x" * 4096)
    lent = Lent(tmp_path / "lent/u", tmp_path / "memory-lent/u")
    lent.memory.mkdir(parents=True)
    target = lent.lend_copy(size, None)
    with open(source, "rb") as file:
        fill(file.fileno(), target, size)
    copy = lent.path("memory")
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks == source.stat().st_blocks
    lent.forget_memory()
    assert not lent.memory.exists()


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    launch = _files(tmp_path)
    launch.disk.unlink()
    with pytest.raises(HostError, match="disk"):
        hold(launch, None)


def _xml(launch: Launch) -> str:
    memory = (
        ""
        if launch.memory is None
        else memory_options(
            LENT.path("memory"),
            launch.hardware.memory_bytes,
            shared=launch.memory_shared,
            read_only=not launch.memory_shared,
        )
    )
    return domain_xml(launch, "/usr/bin/qemu-system-x86_64", LENT, USER, memory)


def _files(directory: Path) -> Launch:
    """A launch whose files are there, with descriptors that are open in this process."""
    for name in ("disk", "layer", "code", "memory"):
        (directory / name).write_text(name)
        (directory / name).chmod(0o600)
    return replace(
        CLONE,
        disk=directory / "disk",
        backing=(directory / "layer",),
        code=directory / "code",
        memory=directory / "memory",
        agent_fd=0,
    )
