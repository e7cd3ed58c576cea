"""What a domain of libvirt has and a template cannot have, each thing with what that means.

Pure: elements of domain XML in, lines for people out. Nothing is passed over but what a template
has as well, or decides itself. Source: https://libvirt.org/formatdomain.html, and the schema
domaincommon.rng that libvirt installs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element

GUEST_AGENT = "org.qemu.guest_agent.0"
"""The name of the channel that qemu-ga opens in the guest."""
_LONGEST = 200
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# Said in domainxml.py, the same in each template, or the daemon's to decide.
_ELSEWHERE = {
    *("name", "uuid", "title", "description", "metadata", "memory", "vcpu", "devices"),
    *("on_poweroff", "on_reboot", "on_crash", "on_lockfailure", "pm"),
}
_LIMITS = "set `limits` of the template"
_DOMAIN = {
    "blkiotune": _LIMITS,
    "cputune": _LIMITS,
    "memtune": _LIMITS,
    "throttlegroups": _LIMITS,
    "bootloader": "clones start from their disk",
    "defaultiothread": "clones have one thread for their disk",
    "genid": "each clone is told of its new identity by the agent",
    "idmap": "clones are no containers",
    "iothreads": "clones have one thread for their disk",
    "iothreadids": "clones have one thread for their disk",
    "keywrap": "clones have none",
    "launchSecurity": "the memory of a clone is shared with its template, and cannot be encrypted",
    "maxMemory": "the memory of a clone is fixed",
    "memoryBacking": "the memory of a clone is mapped from its template's",
    "numatune": "clones run on any node",
    "perf": "clones have none",
    "resource": "each clone has a control group of its own",
    "seclabel": "clones get their labels from libvirt, or a user of their own",
    "sysinfo": "clones have QEMU's SMBIOS, with a UUID of their own",
    f"{_QEMU}commandline": "clones have the arguments that templated gives",
    f"{_QEMU}capabilities": "clones have the arguments that templated gives",
    f"{_QEMU}override": "clones have the arguments that templated gives",
}
_FEATURES = frozenset(("acpi", "apic", "pae", "smm", "vmport"))

# Buses say nothing by themselves: what is on them is listed.
_SILENT = frozenset(("emulator", "controller"))
_SERIAL_CONSOLE = "clones have a serial console"
_DEVICES = {
    "audio": _SERIAL_CONSOLE,
    "channel": "clones have the agent's channel only",
    "console": "clones have one serial console",
    "crypto": "clones have none",
    "disk": "clones have one disk",
    "filesystem": "clones have no folders of the host",
    "graphics": _SERIAL_CONSOLE,
    "hub": "clones have no USB",
    "input": "clones have no USB",
    "interface": "clones have one NIC",
    "iommu": "clones have none",
    "lease": "clones take no locks",
    "memballoon": "the memory of a clone is fixed",
    "memory": "clones have their memory in one piece",
    "nvram": "clones have none",
    "panic": "clones have none",
    "parallel": "clones have one serial console",
    "pstore": "clones have none",
    "redirdev": "clones have no USB",
    "redirfilter": "clones have no USB",
    "rng": "clones have a virtio RNG",
    "serial": "clones have one serial console",
    "shmem": "clones share no memory with others",
    "smartcard": "clones have none",
    "sound": "clones have none",
    "tpm": "clones have none: a guest that keeps the key of its disk in it does not boot",
    "video": _SERIAL_CONSOLE,
    "vsock": "clones have none",
    "watchdog": "nothing is done to a clone when it fires",
}
# Of the one disk and the one NIC.
_DISK_PARTS = frozenset(("driver", "source", "target", "alias", "address", "boot", "backingStore"))
_NIC_PARTS = frozenset(("mac", "source", "model", "target", "alias", "address", "boot"))
# Attributes and children that say what a device is, in the order of a sentence.
_WORDS = ("type", "device", "model", "bus", "mode", "name")
_PLACES = ("file", "dev", "dir", "name", "bridge", "network", "path", "volume", "host")


@dataclass(frozen=True)
class Leftover:
    """A thing that is not carried over, as `tpm tpm-crb emulator`, and what clones have instead."""

    what: str
    why: str

    def __post_init__(self) -> None:
        """Whatever a domain's names are, each becomes a part of one line."""
        object.__setattr__(self, "what", printable(self.what))
        object.__setattr__(self, "why", printable(self.why))


def leftovers(domain: Element, carried: Collection[Element]) -> tuple[Leftover, ...]:
    """All of a `<domain>` that a template does not get; `carried` are its one disk and one NIC.

    Equal ones are one, with their number.
    """
    found = Counter([*_of_domain(domain), *_of_devices(domain, carried)])
    return tuple(
        one if count == 1 else Leftover(f"{count} {one.what}", one.why)
        for one, count in found.items()
    )


def described(element: Element) -> str:
    """A device in a few words: its tag, kind, model, and what of the host is behind it."""
    words = [element.tag, *(element.get(word, "") for word in _WORDS)]
    for child in ("target", "model", "backend", "source"):
        part = element.find(child)
        if part is not None:
            keys = _PLACES if child == "source" else ("dev", "type", "model", "name", "bus")
            words += [part.get(key, "") for key in keys]
    return printable(" ".join(dict.fromkeys(filter(None, words))))


def printable(text: str) -> str:
    """`text` on one line of bounded length."""
    shown = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _of_domain(domain: Element) -> Iterator[Leftover]:
    for part in domain:
        special = _PARTS.get(part.tag)
        if special is not None:
            yield from special(part)
        elif part.tag not in _ELSEWHERE:
            tag = part.tag.replace(_QEMU, "QEMU ")
            yield Leftover(printable(tag), _DOMAIN.get(part.tag, "not known here"))


def _os(part: Element) -> Iterator[Leftover]:
    if part.find("kernel") is not None:
        yield Leftover(
            "kernel and initrd of the host", "clones start from their disk's boot loader"
        )
    first = part.find("boot")
    if first is not None and first.get("dev", "hd") != "hd":
        yield Leftover(
            f"boot from {printable(first.get('dev', ''))}", "clones start from their disk"
        )
    if (nvram := part.find("nvram")) is not None:
        file = printable(nvram.text or "")
        yield Leftover(f"UEFI variables {file}".rstrip(), "clones begin with empty ones")
    if _secure_boot(part):
        yield Leftover("Secure Boot", "clones start without")
    for child in part:
        if child.tag in ("bios", "smbios", "acpi", "bootmenu") and child.get("enable") != "no":
            yield Leftover(f"os {child.tag}", "clones have what QEMU gives")


def _secure_boot(part: Element) -> bool:
    loader = part.find("loader")
    named = part.findall("firmware/feature[@name='secure-boot'][@enabled='yes']")
    return bool(named) or (loader is not None and loader.get("secure") == "yes")


def _features(part: Element) -> Iterator[Leftover]:
    for child in part:
        if child.tag not in _FEATURES:
            yield Leftover(f"feature {printable(child.tag)}", "clones have QEMU's default")


def _cpu(part: Element) -> Iterator[Leftover]:
    model = part.find("model")
    name = (model.text or "") if model is not None else part.get("mode", "")
    yield Leftover(printable(f"cpu {name}"), "clones have the CPU model that templated chooses")
    for tag in ("topology", "numa", "cache"):
        if part.find(tag) is not None:
            yield Leftover(f"cpu {tag}", "clones have QEMU's default")


def _clock(part: Element) -> Iterator[Leftover]:
    if (offset := part.get("offset", "utc")) != "utc":
        yield Leftover(f"clock {printable(offset)}", "the clock of clones is in UTC")


def _ignored(_part: Element) -> Iterator[Leftover]:
    return iter(())


_PARTS: dict[str, Callable[[Element], Iterator[Leftover]]] = {
    "os": _os,
    "features": _features,
    "cpu": _cpu,
    "clock": _clock,
    # The memory that a balloon leaves; the balloon is listed.
    "currentMemory": _ignored,
}


def _of_devices(domain: Element, carried: Collection[Element]) -> Iterator[Leftover]:
    seen: set[str] = set()
    for device in domain.iterfind("devices/*"):
        if any(device is one for one in carried):
            yield from _of_disk(device) if device.tag == "disk" else _of_nic(device)
        elif not _same(device, seen):
            yield Leftover(described(device), _DEVICES.get(device.tag, "not known here"))


def _same(device: Element, seen: set[str]) -> bool:
    """Whether clones have one as well; `seen` are the kinds of which they have one only."""
    tag, kind, target = device.tag, device.get("type", ""), device.find("target")
    if tag in ("serial", "console"):
        # libvirt shows the first serial port as a console, too.
        port = target is None or target.get("type", "serial") in ("serial", "isa-serial")
        first = tag not in seen
        seen.add(tag)
        return first and port and kind == "pty"
    return (
        tag in _SILENT
        or (tag == "memballoon" and device.get("model") == "none")
        or (tag == "input" and device.get("bus") == "ps2")
        or (tag == "rng" and device.get("model", "").startswith("virtio"))
        or (tag == "audio" and kind == "none")
        or (tag == "channel" and target is not None and target.get("name") == GUEST_AGENT)
    )


def _of_disk(disk: Element) -> Iterator[Leftover]:
    target = disk.find("target")
    name = printable(target.get("dev", "")) if target is not None else ""
    bus = target.get("bus", "") if target is not None else ""
    if bus not in ("", "virtio"):
        yield Leftover(f"disk {name} on {printable(bus)}", "clones have it as virtio-blk")
    driver = disk.find("driver")
    options = set(driver.keys() if driver is not None else ()) - {"name", "type"}
    if options:
        yield Leftover(f"disk {name}: {', '.join(sorted(options))}", "clones have QEMU's default")
    for part in disk:
        if part.tag not in _DISK_PARTS:
            yield Leftover(f"disk {name}: {printable(part.tag)}", "clones have it without")


def _of_nic(nic: Element) -> Iterator[Leftover]:
    kind = nic.get("type", "")
    if kind != "network":
        yield Leftover(described(nic), "clones are on the daemon's network")
    model, source = nic.find("model"), nic.find("source")
    if model is not None and model.get("type") != "virtio":
        yield Leftover(f"NIC {printable(model.get('type', ''))}", "clones have virtio-net")
    if source is not None and source.get("portgroup"):
        yield Leftover("NIC: portgroup", "clones have it without")
    for part in nic:
        if part.tag not in _NIC_PARTS:
            yield Leftover(f"NIC: {printable(part.tag)}", "clones have it without")
