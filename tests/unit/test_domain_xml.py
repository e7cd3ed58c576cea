"""Domain XML in the forms that virt-install, virt-manager, Boxes and time have made."""

from __future__ import annotations

from pathlib import Path

import pytest

from templated.drivers.libvirt.domainxml import DiskSource, Translation, translate
from templated.drivers.libvirt.leftovers import Leftover
from templated.errors import InvalidRequest

DOMAINS = Path(__file__).with_name("domains")
GIB = 1 << 30


def xml(name: str) -> str:
    return (DOMAINS / f"{name}.xml").read_text()


def changed(name: str, old: str, new: str) -> Translation:
    """A domain with one thing otherwise."""
    text = xml(name)
    assert old in text
    return translate(text.replace(old, new))


def whats(found: Translation) -> set[str]:
    return {one.what for one in found.leftovers}


def test_a_debian_of_virt_install() -> None:
    found = translate(xml("debian12"))
    assert (found.domain, found.description, found.network) == ("debian12", "", "default")
    assert (found.memory, found.vcpus, found.firmware) == (2 * GIB, 2, "bios")
    path = "/var/lib/libvirt/images/debian12.qcow2"
    assert found.disk == DiskSource("vda", "file", path, pool="", format="qcow2")
    assert whats(found) == {
        "machine pc-q35-7.2",
        "cpu host-passthrough",
        "disk vda: discard",
        "disk file cdrom sda sata",
        "channel spicevmc virtio com.redhat.spice.0",
        "input tablet usb",
        "graphics spice",
        "sound ich9",
        "audio spice",
        "video virtio",
        "2 redirdev spicevmc usb",
        "watchdog itco",
        "memballoon virtio",
    }


def test_secure_boot_and_a_tpm() -> None:
    found = translate(xml("secure"))
    assert found.description == "A desktop with Secure Boot"
    assert (found.vcpus, found.firmware, found.network) == (2, "uefi", None)
    nvram = "/var/lib/libvirt/qemu/nvram/secure_VARS.fd"
    assert whats(found) == {
        "machine pc-q35-10.0",
        "vcpu current 2",
        "no channel of the guest agent",
        "memoryBacking",
        f"UEFI variables {nvram}",
        "Secure Boot",
        "feature hyperv",
        "cpu host-model",
        "cpu topology",
        "clock localtime",
        "disk sda on sata",
        "disk sda: cache, discard, io",
        "disk sda: serial",
        "filesystem mount /srv/share",
        "interface bridge e1000e br0",
        "NIC e1000e",
        "NIC: link",
        "tpm tpm-crb emulator",
        "graphics vnc",
        "video qxl",
        "shmem looking-glass ivshmem-plain",
        "panic hyperv",
    }


def test_a_machine_of_years_ago() -> None:
    """It starts from the disk that is first in its boot order, a logical volume."""
    found = translate(xml("old"))
    assert found.disk == DiskSource("hdb", "block", "/dev/vg0/old", pool="", format="raw")
    assert found.description == "Mail, since 2011"
    assert found.memory == 954 << 20  # 1000 MB, and up to the next MiB
    assert (found.vcpus, found.firmware, found.network) == (64, "bios", "servers")
    for what in ("machine pc-i440fx-2.1", "96 vCPUs", "vcpu cpuset 0-3", "boot from network"):
        assert what in whats(found)
    for what in (
        "disk file hda ide /srv/data.img",
        "NIC: filterref",
        "interface direct virtio eno1",
    ):
        assert what in whats(found)
    for what in ("maxMemory", "iothreads", "cputune", "QEMU commandline", "console pty virtio"):
        assert what in whats(found)
    assert len(found.leftovers) == 27


def test_what_nobody_knows_is_listed() -> None:
    """A device, and an element beside the devices."""
    unknown = [one for one in translate(xml("old")).leftovers if one.why == "not known here"]
    assert unknown == [
        Leftover("something-new", "not known here"),
        Leftover("flux-capacitor", "not known here"),
    ]


def test_a_session_with_a_volume() -> None:
    found = translate(xml("session"))
    assert found.disk == DiskSource("vda", "volume", "fedora", pool="gnome-boxes", format="qcow2")
    assert (found.memory, found.vcpus, found.firmware) == (2 * GIB, 4, "uefi")
    assert found.leftovers == (
        Leftover("interface user virtio", "clones are on the daemon's network"),
    )


def test_devices_of_the_host_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"the domain gpu has devices of the host: ") as caught:
        translate(xml("host-devices"))
    assert "hostdev pci 0x0000:0x01:0x00:0x0, hostdev usb 0x1234:0xbeef" in caught.value.message
    assert caught.value.message.endswith("and 3 more") and caught.value.hint


NIC = "<interface type='network'>"
CDROM = "<disk type='file' device='cdrom'>"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NIC, "<interface type='hostdev'>"),
        (NIC, "<interface type='vdpa'>"),
        (CDROM, "<disk type='block' device='lun'>"),
        (CDROM, "<disk type='nvme' device='disk'>"),
        ("<serial type='pty'>", "<serial type='dev'>"),
        ("<watchdog ", "<hostdev type='mdev'/><watchdog "),
        ("<watchdog ", "<tpm model='tpm-tis'><backend type='passthrough'/></tpm><watchdog "),
        ("<watchdog ", "<smartcard mode='host'/><watchdog "),
        ("<input type='tablet' bus='usb'>", "<input type='evdev'>"),
    ],
)
def test_each_device_of_the_host(old: str, new: str) -> None:
    with pytest.raises(InvalidRequest, match="has devices of the host"):
        changed("debian12", old, new)


DISK = "<source file='/var/lib/libvirt/images/debian12.qcow2'/>"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("type='kvm'", "type='xen'", "is of type xen"),
        ("type='kvm'", "type='test'", "is of type test"),
        (">hvm<", ">xen<", "is no full virtual machine"),
        ("arch='x86_64'", "arch='aarch64'", "is for aarch64"),
        ("<disk type='file' device='disk'>", CDROM, "has no disk"),
        (DISK, "", "has no disk"),
        (DISK, f"{DISK}<encryption format='luks'/>", "the disk vda of debian12 is encrypted"),
        (DISK, "<source file='/x'><encryption format='luks'/></source>", "is encrypted"),
        ("file' device='disk'", "network' device='disk'", "is of type network"),
        ("file' device='disk'", "dir' device='disk'", "is of type dir"),
        (DISK, "<source file='nbd:localhost'/>", "has an odd path: 'nbd:localhost'"),
        (DISK, "<source file='/a&#10;b'/>", r"has an odd path: '/a\\nb'"),
        ("<memory unit='KiB'>2097152</memory>", "", "has no memory"),
        ("unit='KiB'>2097152<", "unit='KiB'>x<", "has no memory"),
        ("unit='KiB'>2097152<", "unit='parsec'>1<", "has no memory"),
        ("</domain>", "", "cannot be read"),
        ("<domain ", "<domain <", "cannot be read"),
    ],
)
def test_what_no_template_can_be_of(old: str, new: str, why: str) -> None:
    """One line each."""
    with pytest.raises(InvalidRequest, match=why) as caught:
        changed("debian12", old, new)
    assert len(caught.value.message) < 200


def test_other_xml() -> None:
    with pytest.raises(InvalidRequest, match="the XML of no domain, but of <network>"):
        translate("<network/>")
    with pytest.raises(InvalidRequest, match="too long"):
        translate("<domain>" + " " * (4 << 20) + "</domain>")


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("<boot dev='hd'/>", "<kernel>/vmlinuz</kernel>", "kernel and initrd of the host"),
        ("<boot dev='hd'/>", "<boot dev='cdrom'/>", "boot from cdrom"),
        ("model type='virtio'/", "model type='e1000'/", "NIC e1000"),
        ("machine='pc-q35-7.2'", "", "machine pc"),
        ("mode='host-passthrough'", "mode='maximum'", "cpu maximum"),
        ("<serial type='pty'>", "<serial type='file'>", "serial file isa-serial"),
        ("<serial type='pty'>", "<serial type='pty'/><serial type='pty'>", "serial pty isa-serial"),
        ("<watchdog ", "<memory model='dimm'/><watchdog ", "memory dimm"),
        ("<watchdog ", "<iommu model='intel'/><watchdog ", "iommu intel"),
        ("<features>", "<launchSecurity type='sev'/><features>", "launchSecurity"),
        ("discard='unmap'/>", "/><iotune/>", "disk vda: iotune"),
        ("discard='unmap'/>", "/><shareable/>", "disk vda: shareable"),
        ("<mac ", "<vlan/><mac ", "NIC: vlan"),
    ],
)
def test_what_is_listed(old: str, new: str, seen: str) -> None:
    assert seen in whats(changed("debian12", old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NIC, "<x-interface type='network'>"),
        ("<source network='default'/>", ""),
        (NIC, "<interface type='ethernet'>"),
    ],
)
def test_no_network_of_libvirt(old: str, new: str) -> None:
    text = xml("debian12").replace(old, new)
    if "x-interface" in new:
        text = text.replace("</interface>", "</x-interface>")
    found = translate(text)
    assert found.network is None


def test_the_daemons_words_stay_on_one_line() -> None:
    """Whatever stands in the XML, a line of ours is a line."""
    found = changed("debian12", "<sound model='ich9'>", "<sound model='a&#10;&#x9b;31m b'>")
    assert any("sound a" in what for what in whats(found))
    assert all(what.isprintable() for what in whats(found))


@pytest.mark.parametrize("name", ["debian12", "secure", "old", "session"])
def test_each_line_says_why(name: str) -> None:
    for one in translate(xml(name)).leftovers:
        assert one.what and one.why and len(one.what) < 250


def test_uefi_by_its_loader() -> None:
    """As before libvirt chose the firmware itself."""
    loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>"
    assert changed("debian12", "<boot dev='hd'/>", loader).firmware == "uefi"
