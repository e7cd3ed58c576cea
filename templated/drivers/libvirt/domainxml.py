"""A domain's XML as libvirt gives it, read for what a template can take of it.

Pure: text in, data out. Source: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

from templated.drivers.libvirt.leftovers import (
    GUEST_AGENT,
    Leftover,
    described,
    leftovers,
    printable,
)
from templated.errors import InvalidRequest

_LARGEST = 4 << 20
_LOOK = "virsh dumpxml NAME shows it, virsh edit NAME changes it"
_MIB = 1 << 20
_MOST_VCPUS = 64
# Both spellings of each, as libvirt takes them.
_UNITS = {"b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
# Where the content of a disk is an attribute of its source.
_SOURCES = {"file": "file", "block": "dev", "volume": "volume"}


@dataclass(frozen=True)
class DiskSource:
    """Where a disk's content is: a file, a block device, or a volume in one of libvirt's pools."""

    target: str
    """Its name in the domain, as `vda`."""
    kind: Literal["file", "block", "volume"]
    path: str
    """Of the file or device; the volume's name where it is one."""
    pool: str
    format: str
    """As the domain says it, such as `qcow2`; it is never guessed from the content."""


@dataclass(frozen=True)
class Translation:
    """What a template takes of a domain, and what it does not."""

    domain: str
    description: str
    memory: int
    """Bytes, a multiple of 1 MiB."""
    vcpus: int
    firmware: Literal["bios", "uefi"]
    disk: DiskSource
    network: str | None
    """The network of libvirt that its NIC is on."""
    leftovers: tuple[Leftover, ...]


def translate(xml: str) -> Translation:
    """Read a `<domain>`. Raises InvalidRequest, in one line, for one that no template can be of:

    not x86-64 under QEMU, no disk of its own, an encrypted one or one on the network, or devices
    of the host, which clones cannot share.
    """
    domain = _parsed(xml)
    name = printable(domain.findtext("name", ""))
    _check_machine(name, domain)
    _check_host_devices(name, domain)
    disk = _boot_disk(name, domain)
    nic = domain.find("devices/interface")
    vcpus, memory = _vcpus(domain), _memory(name, domain)
    carried = [disk] if nic is None else [disk, nic]
    return Translation(
        domain=domain.findtext("name", ""),
        description=printable(domain.findtext("title") or domain.findtext("description") or ""),
        memory=memory,
        vcpus=min(vcpus, _MOST_VCPUS),
        firmware="uefi" if _is_uefi(domain) else "bios",
        disk=_source(name, disk),
        network=_network(nic),
        leftovers=(*_changes(domain, vcpus, nic), *leftovers(domain, carried)),
    )


def _parsed(xml: str) -> Element:
    if len(xml) > _LARGEST:
        raise InvalidRequest(f"the domain's XML is too long: {len(xml)} characters", hint=_LOOK)
    try:
        # It comes from libvirt, which has read and written it itself.
        domain = ET.fromstring(xml)  # noqa: S314
    except ET.ParseError as error:
        raise InvalidRequest(f"the domain's XML cannot be read: {error}", hint=_LOOK) from None
    if domain.tag != "domain":
        raise InvalidRequest(
            f"this is the XML of no domain, but of <{printable(domain.tag)}>", hint=_LOOK
        )
    return domain


def _check_machine(name: str, domain: Element) -> None:
    kind = domain.get("type", "")
    if kind not in ("kvm", "qemu"):
        raise InvalidRequest(
            f"the domain {name} is of type {printable(kind)}",
            hint="only kvm and qemu are VMs of QEMU",
        )
    machine = domain.find("os/type")
    if machine is None or (machine.text or "").strip() != "hvm":
        raise InvalidRequest(
            f"the domain {name} is no full virtual machine", hint="its os type: hvm"
        )
    arch = machine.get("arch", "x86_64")
    if arch != "x86_64":
        raise InvalidRequest(
            f"the domain {name} is for {printable(arch)}", hint="templates are x86_64"
        )


def _check_host_devices(name: str, domain: Element) -> None:
    found = [printable(text) for text in _host_devices(domain)]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InvalidRequest(
            f"the domain {name} has devices of the host: {', '.join(found[:5])}{more}",
            hint="clones cannot share them: import a copy of the domain without (virt-clone, "
            "virsh edit)",
        )


def _host_devices(domain: Element) -> Iterator[str]:
    for device in domain.iterfind("devices/*"):
        tag, kind = device.tag, device.get("type", "")
        backend = device.find("backend")
        if tag == "hostdev":
            yield _hostdev(device)
        elif (
            (tag == "interface" and kind in ("hostdev", "vdpa"))
            or (tag == "disk" and (device.get("device") == "lun" or kind in ("nvme", "vhostvdpa")))
            or (tag in ("serial", "parallel", "console") and kind in ("dev", "parport"))
            or (tag == "tpm" and backend is not None and backend.get("type") == "passthrough")
            or (tag == "input" and kind in ("passthrough", "evdev"))
            or (tag == "smartcard" and device.get("mode") in ("host", "host-certificates"))
        ):
            yield described(device)
    for argument in domain.iterfind("{http://libvirt.org/schemas/domain/qemu/1.0}commandline/*"):
        if "vfio" in argument.get("value", ""):
            yield f"QEMU's argument {argument.get('value', '')}"


def _hostdev(device: Element) -> str:
    parts = device.iterfind("source/*")
    where = ":".join(value for part in parts for value in part.attrib.values())
    return f"hostdev {device.get('type', '')} {where}".strip()


def _boot_disk(name: str, domain: Element) -> Element:
    """The first in the order of boot; without an order, the first of all."""
    disks = [
        disk
        for disk in domain.iterfind("devices/disk")
        if disk.get("device", "disk") == "disk" and disk.find("source") is not None
    ]
    if not disks:
        raise InvalidRequest(
            f"the domain {name} has no disk",
            hint="a template starts from one; CD-ROMs do not count",
        )
    return min(disks, key=_boot_order)  # the first of equals


def _boot_order(disk: Element) -> int:
    boot = disk.find("boot")
    order = "" if boot is None else boot.get("order", "")
    return _number(order) or 1 << 30


def _source(name: str, disk: Element) -> DiskSource:
    target, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
    assert source is not None
    label = printable("" if target is None else target.get("dev", ""))
    where = f"the disk {label} of {name}"
    if disk.find(".//encryption") is not None:
        raise InvalidRequest(f"{where} is encrypted", hint="a template has no key for it")
    kind = disk.get("type", "")
    path = source.get(_SOURCES.get(kind, ""), "")
    if not path:
        protocol = printable(source.get("protocol", ""))
        raise InvalidRequest(
            f"{where} is of type {printable(kind)} {protocol}".rstrip(),
            hint="a template needs a file, a block device or a volume",
        )
    # QEMU takes what begins otherwise for the name of a protocol.
    if not path.isprintable() or (kind != "volume" and not path.startswith("/")):
        raise InvalidRequest(f"{where} has an odd path: {path[:200]!r}", hint=_LOOK)
    return DiskSource(
        target=label,
        kind=kind,  # type: ignore[arg-type] # one of _SOURCES
        path=path,
        pool=source.get("pool", ""),
        # libvirt takes one that says nothing for raw, too.
        format=printable("raw" if driver is None else driver.get("type", "raw")),
    )


def _network(nic: Element | None) -> str | None:
    source = None if nic is None or nic.get("type") != "network" else nic.find("source")
    return None if source is None else source.get("network")


def _memory(name: str, domain: Element) -> int:
    """Rounded up to MiB, as libvirt does for QEMU."""
    memory = domain.find("memory")
    text = "" if memory is None else (memory.text or "").strip()
    unit = _UNITS.get("kib" if memory is None else memory.get("unit", "KiB").lower())
    count = _number(text)
    if unit is None or count == 0:
        raise InvalidRequest(f"the domain {name} has no memory that can be read", hint=_LOOK)
    return -(-count * unit // _MIB) * _MIB


def _vcpus(domain: Element) -> int:
    element = domain.find("vcpu")
    text = "1" if element is None else element.get("current") or element.text or "1"
    return _number(text) or 1


def _number(text: str) -> int:
    """A number as libvirt writes it; 0 for anything else."""
    shown = text.strip()
    return int(shown) if shown.isdecimal() and len(shown) < 20 else 0


def _is_uefi(domain: Element) -> bool:
    system, loader = domain.find("os"), domain.find("os/loader")
    named = system is not None and system.get("firmware") == "efi"
    return named or (loader is not None and loader.get("type") == "pflash")


def _changes(domain: Element, vcpus: int, nic: Element | None) -> Iterator[Leftover]:
    """What a template has otherwise than the domain."""
    kind = domain.find("os/type")
    machine = printable("" if kind is None else kind.get("machine", ""))
    if "q35" not in machine:
        yield Leftover(f"machine {machine or 'pc'}", "clones have q35: other names of devices")
    elif machine != "q35":
        yield Leftover(f"machine {machine}", "clones have the q35 of the host's QEMU")
    if vcpus > _MOST_VCPUS:
        yield Leftover(f"{vcpus} vCPUs", f"clones have at most {_MOST_VCPUS}")
    element = domain.find("vcpu")
    if element is not None:
        for key in ("current", "cpuset"):
            if element.get(key):
                yield Leftover(f"vcpu {key} {printable(element.get(key, ''))}", _VCPU[key])
    if nic is None:
        yield Leftover("no NIC", "clones have one")
    loader = domain.find("os/loader")
    if loader is not None and loader.get("type") != "pflash":
        yield Leftover(f"loader {printable(loader.text or '')}", "clones have QEMU's firmware")
    targets = domain.iterfind("devices/channel/target")
    if all(target.get("name") != GUEST_AGENT for target in targets):
        yield Leftover("no channel of the guest agent", "the guest needs qemu-guest-agent")


_VCPU = {
    "current": "the number of vCPUs of a clone is fixed",
    "cpuset": "set `limits` of the template",
}
