"""The XML of a domain, as a pure function of a Launch; golden files in the tests hold it.

Sources: https://libvirt.org/formatdomain.html and https://libvirt.org/drvqemu.html ("Pass-through
of arbitrary qemu commands"). What libvirt has no words for is passed through: memory that is mapped
from a file of ours, `-incoming defer`, slirp's options, the disk of a function's code, and what
`microvm` has beyond its name. So a VM waits for its state as our own QEMU does; libvirt takes it
for one that was started paused.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from templated.drivers.hypervisor.base import Kernel, Launch
from templated.drivers.hypervisor.libvirt.lending import (
    CODE,
    DISK,
    INITRD,
    KERNEL,
    SEED,
    VARIABLES,
    Lent,
    User,
    layer,
)
from templated.drivers.hypervisor.qemu.command import (
    CODE_SERIAL,
    MACHINES,
    UEFI_CODE,
    UPLINK,
    netdev,
)
from templated.model.network import OfLibvirt, Slirp

NAMESPACE = "https://templated.dev/libvirt/1"
"""Of our element in a domain's metadata: `virsh metadata DOMAIN --uri` this."""
SERIAL_BUS, FIRST_NIC = "virtio-serial0.0", "net0"
"""As libvirt names them in QEMU: what the agent's port is on, and a NIC on a network of its own."""
OUR_NIC = "nic0"
# Of a PCI bus. libvirt fills it from below and has the last one.
_DISK_SLOT, _CODE_SLOT, _NIC_SLOT = "0x02", "0x10", "0x11"
_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", _QEMU)
ET.register_namespace("templated", NAMESPACE)


def domain_name(slot: str) -> str:
    """The name of a slot's domain."""
    return f"templated-{slot}"


@dataclass(frozen=True)
class Label:
    """What the metadata of a domain says: our element `vm`, in NAMESPACE."""

    slot: str
    template: str
    generation: str
    name: str = ""
    """The clone's; empty: it is none yet."""

    def element(self, namespace: str = "") -> Element:
        """libvirt puts the namespace there itself when metadata is set later."""
        values = {name: value for name, value in asdict(self).items() if value}
        return Element(f"{{{namespace}}}vm" if namespace else "vm", values)

    def text(self) -> str:
        """The element without its namespace."""
        return ET.tostring(self.element(), encoding="unicode")


def nic_of(launch: Launch) -> str:
    """How QEMU knows the NIC."""
    return FIRST_NIC if isinstance(launch.network, OfLibvirt) else OUR_NIC


def domain_xml(launch: Launch, emulator: str, lent: Lent, user: User | None, memory: str) -> str:
    """The domain of a launch, whose files are lent.

    `user` is whom libvirt runs QEMU as; None: this process's own. `memory` are the options of the
    file that is mapped, see `memory_options`; empty: libvirt gives the VM memory of its own.
    """
    kind = "kvm" if launch.hardware.accel == "kvm" else "qemu"
    domain = Element("domain", {"type": kind})
    _text(domain, "name", domain_name(launch.slot))
    _text(domain, "uuid", launch.uuid)
    _text(domain, "title", launch.template or domain_name(launch.slot))
    label = Label(launch.slot, launch.template, launch.generation)
    SubElement(domain, "metadata").append(label.element(NAMESPACE))
    _hardware(domain, launch, lent)
    _ends(domain)
    _devices(SubElement(domain, "devices"), launch, emulator, lent)
    if user is not None:
        # The files that it opens are lent with the right owner: libvirt changes none of them.
        static = {"type": "static", "model": "dac", "relabel": "no"}
        _text(SubElement(domain, "seclabel", static), "label", f"+{user.uid}:+{user.gid}")
    _passed_through(domain, _arguments(launch, lent, memory))
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _hardware(domain: Element, launch: Launch, lent: Lent) -> None:
    hardware = launch.hardware
    _text(domain, "memory", str(hardware.memory_bytes >> 10), {"unit": "KiB"})
    _text(domain, "vcpu", str(hardware.vcpus), {"placement": "static"})
    system = SubElement(domain, "os")
    machine = MACHINES[hardware.type].partition(",")[0]
    _text(system, "type", "hvm", {"arch": "x86_64", "machine": machine})
    if launch.variables is not None:
        _text(system, "loader", str(UEFI_CODE), {"readonly": "yes", "type": "pflash"})
        _text(system, "nvram", str(lent.path(VARIABLES)))
    if isinstance(launch.boot, Kernel):
        _text(system, "kernel", str(lent.path(KERNEL)))
        _text(system, "initrd", str(lent.path(INITRD)))
        _text(system, "cmdline", launch.boot.cmdline)
    SubElement(SubElement(domain, "features"), "acpi")
    _cpu(domain, hardware.cpu)
    SubElement(domain, "clock", {"offset": "utc"})


def _cpu(domain: Element, cpu: str) -> None:
    """QEMU's `MODEL,+FEATURE,...` in libvirt's words."""
    model, *features = cpu.split(",")
    if model == "host":
        SubElement(domain, "cpu", {"mode": "host-passthrough", "migratable": "on"})
        return
    element = SubElement(domain, "cpu", {"mode": "custom", "match": "exact", "check": "none"})
    _text(element, "model", model, {"fallback": "forbid"})
    policies = {"+": "require", "-": "disable"}
    for feature in features:
        if (policy := policies.get(feature[:1])) is not None:
            SubElement(element, "feature", {"policy": policy, "name": feature[1:]})


def _ends(domain: Element) -> None:
    # A reset would need the kernel of the template's boot. So the VM ends, which is reported.
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _text(domain, event, "destroy")


def _devices(devices: Element, launch: Launch, emulator: str, lent: Lent) -> None:
    _text(devices, "emulator", emulator)
    mmio = launch.hardware.type == "microvm"
    _disk(devices, launch, lent, mmio=mmio)
    if launch.seed is not None:
        _seed(devices, lent.path(SEED))
    if isinstance(launch.network, OfLibvirt):
        _interface(devices, launch.mac, launch.network.name, mmio=mmio)
    SubElement(devices, "controller", {"type": "usb", "model": "none"})
    controller = {"type": "virtio-serial", "index": "0", "ports": "2"}
    _placed(SubElement(devices, "controller", controller), mmio)
    # For `virsh console`; what the guest prints goes to the log as well.
    serial = SubElement(devices, "serial", {"type": "pty"})
    SubElement(serial, "log", {"file": str(launch.places.serial_log), "append": "on"})
    SubElement(serial, "target", {"port": "0"})
    SubElement(devices, "memballoon", {"model": "none"})
    rng = SubElement(devices, "rng", {"model": "virtio"})
    SubElement(rng, "backend", {"model": "builtin"})
    _placed(rng, mmio)
    if not mmio:
        SubElement(SubElement(devices, "video"), "model", {"type": "none"})


def _disk(devices: Element, launch: Launch, lent: Lent, *, mmio: bool) -> None:
    disk = SubElement(devices, "disk", {"type": "file", "device": "disk"})
    # A clone's disk dies with it, so its flushes need not reach the platter.
    driver = {"name": "qemu", "type": "qcow2", "cache": "unsafe", "discard": "unmap"}
    SubElement(disk, "driver", driver)
    SubElement(disk, "source", {"file": str(lent.path(DISK))})
    above = disk
    for number in range(len(launch.backing)):
        above = SubElement(above, "backingStore", {"type": "file"})
        SubElement(above, "format", {"type": "qcow2"})
        SubElement(above, "source", {"file": str(lent.path(layer(number)))})
    if launch.backing:
        SubElement(above, "backingStore")
    SubElement(disk, "target", {"dev": "vda", "bus": "virtio"})
    if launch.hardware.firmware:
        # Firmware that is told nothing looks at all that there is.
        SubElement(disk, "boot", {"order": "1"})
    _placed(disk, mmio)
    if not mmio:
        # On the bus where what is passed through is, in front: the guest finds it first.
        where = {"domain": "0x0000", "bus": "0x00", "slot": _DISK_SLOT, "function": "0x0"}
        SubElement(disk, "address", {"type": "pci", **where})


def _seed(devices: Element, path: Path) -> None:
    disk = SubElement(devices, "disk", {"type": "file", "device": "disk"})
    SubElement(disk, "driver", {"name": "qemu", "type": "raw"})
    SubElement(disk, "source", {"file": str(path)})
    SubElement(disk, "target", {"dev": "vdb", "bus": "virtio"})
    SubElement(disk, "readonly")


def _interface(devices: Element, mac: str, network: str, *, mmio: bool) -> None:
    interface = SubElement(devices, "interface", {"type": "network"})
    SubElement(interface, "mac", {"address": mac})
    SubElement(interface, "source", {"network": network})
    SubElement(interface, "model", {"type": "virtio"})
    # Not vhost, whose features would be part of the saved state.
    SubElement(interface, "driver", {"name": "qemu"})
    if not mmio:
        SubElement(interface, "rom", {"enabled": "no"})
    _placed(interface, mmio)


def _placed(device: Element, mmio: bool) -> None:
    """libvirt knows of microvm only that QEMU has it, and would put the device on a PCI bus."""
    if mmio:
        SubElement(device, "address", {"type": "virtio-mmio"})


def _arguments(launch: Launch, lent: Lent, memory: str) -> list[str]:
    """What is passed through to QEMU."""
    machine = MACHINES[launch.hardware.type].partition(",")[2]
    arguments = ["-machine", machine + (",memory-backend=ram" if memory else "")]
    if memory:
        arguments += ["-object", f"memory-backend-file,id=ram,{memory}"]
    # A restored NIC still has the template's MAC: never announce it.
    arguments += ["-global", "migration.announce-rounds=0"]
    bus = "device" if launch.hardware.type == "microvm" else "pci"
    if launch.code is not None:
        arguments += _code(lent.path(CODE), bus)
    if not isinstance(launch.network, OfLibvirt):
        nic = {"driver": f"virtio-net-{bus}", "id": OUR_NIC, "netdev": "net0", "mac": launch.mac}
        rom = {} if bus == "device" else {"romfile": "", "addr": _NIC_SLOT}
        arguments += [*_network(launch), *_device({**nic, "status": False, **rom})]
    return arguments if launch.boot else [*arguments, "-incoming", "defer"]


def _code(path: Path, bus: str) -> list[str]:
    """The second disk, by two nodes: what is below the upper one can be exchanged later."""
    name = str(path).replace(",", ",,")
    drive = {"driver": f"virtio-blk-{bus}"} | ({"addr": _CODE_SLOT} if bus == "pci" else {})
    file = f"driver=file,node-name=code-file,filename={name},locking=off,read-only=on"
    return [
        *("-blockdev", file),
        *("-blockdev", "driver=raw,node-name=code,read-only=on,file=code-file"),
        *_device({**drive, "id": "code0", "drive": "code", "serial": CODE_SERIAL}),
    ]


def _device(properties: dict[str, Any]) -> list[str]:
    """As libvirt gives devices: QEMU makes those that are not JSON before all that are."""
    return ["-device", json.dumps(properties)]


def _network(launch: Launch) -> list[str]:
    """What the NIC is on: a hub where its uplink comes later, a tap, or goes before a save."""
    if isinstance(launch.network, Slirp) and launch.boot is None:
        return ["-netdev", netdev(launch.network, "net0")]
    arguments = []
    if isinstance(launch.network, Slirp):
        arguments += ["-netdev", netdev(launch.network, UPLINK)]
        arguments += ["-netdev", f"hubport,id=hub0,hubid=0,netdev={UPLINK}"]
    return [*arguments, "-netdev", "hubport,id=net0,hubid=0"]


def memory_options(path: Path, size: int, *, shared: bool, read_only: bool) -> str:
    """The options of a memory file, for `domain_xml`; `read_only` is of a private mapping."""
    name = str(path).replace(",", ",,")
    options = f"size={size},mem-path={name},share={'on' if shared else 'off'}"
    return f"{options},readonly=on,rom=off" if read_only else options


def _passed_through(domain: Element, arguments: list[str]) -> None:
    line = SubElement(domain, f"{{{_QEMU}}}commandline")
    for argument in arguments:
        SubElement(line, f"{{{_QEMU}}}arg", {"value": argument})
    # With this capability libvirt reads some 400 properties of a CPU one by one before it lets a
    # domain go on; without, it reads the same from four (qemuProcessFetchGuestCPU in its source).
    changed = SubElement(domain, f"{{{_QEMU}}}capabilities")
    SubElement(changed, f"{{{_QEMU}}}del", {"capability": "cpu-unavailable-features"})


def _text(
    parent: Element, name: str, text: str, attributes: dict[str, str] | None = None
) -> Element:
    element = SubElement(parent, name, attributes or {})
    element.text = text
    return element
