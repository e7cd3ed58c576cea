"""What `doctor` says of libvirt. Without it nothing is wrong, unless a template runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from templated.drivers.libvirt import host
from templated.drivers.libvirt.address import SYSTEM
from templated.drivers.libvirt.connection import Connection, connect
from templated.errors import TemplatedError
from templated.services.findings import Check, Status

# The monitor takes descriptors from there on (virDomainQemuMonitorCommandWithFiles).
_LEAST = (8, 2)
# Of virt-host-validate: what only guests with devices of the host, or with encrypted memory, need.
_UNUSED = ("IOMMU", "ecure guest")


def libvirt_checks(*, needed: bool, kvm: bool, uri: str = SYSTEM) -> Iterator[Check]:
    """The findings, of the libvirt at `uri`. Blocks for at most some 60 s, when libvirt hangs.

    `needed`: a template runs on it, so what keeps it from that is a failure. `kvm`: guests must run
    under KVM, so what libvirt's own check calls a failure is one.
    """
    bad: Status = "FAIL" if needed else "WARN"
    found = host.installed()
    if found is None:
        detail = "not installed; only templates with `hypervisor: libvirt` and imports need it"
        fix = "apt install libvirt-daemon-system libvirt-clients"
        yield Check("libvirt", "FAIL" if needed else "PASS", detail, fix)
        return
    yield from _connected(uri, found, bad)
    yield from _validated(kvm=kvm)


def _connected(uri: str, daemon: str, bad: Status) -> Iterator[Check]:
    try:
        connection = connect(uri, read_only=True)
    except TemplatedError as error:
        yield Check("libvirt", bad, f"{daemon}: {error.message}", error.hint)
        return
    try:
        for name, check in _CHECKS.items():
            try:
                yield check(connection, bad)
            except TemplatedError as error:
                yield Check(name, bad, error.message, error.hint or "see libvirtd's log")
    finally:
        connection.close()


def _version(connection: Connection, bad: Status) -> Check:
    versions = connection.versions()
    detail = f"{connection.uri}: libvirt {versions.libvirt}, its QEMU {versions.hypervisor}"
    if tuple(map(int, versions.libvirt.split(".")[:2])) < _LEAST:
        fix = f"use libvirt {'.'.join(map(str, _LEAST))} or later"
        return Check("libvirt", bad, f"{detail}: too old to start clones", fix)
    return Check("libvirt", "PASS", detail)


def _kvm(connection: Connection, _bad: Status) -> Check:
    if host.has_kvm(connection):
        return Check("libvirt kvm", "PASS", "its capabilities have KVM")
    fix = "see `accelerator`; after a change: systemctl restart libvirtd"
    return Check("libvirt kvm", "WARN", "its capabilities have no KVM: domains run under TCG", fix)


def _networks(connection: Connection, _bad: Status) -> Check:
    found = host.networks(connection)
    if any(network.active for network in found):
        return Check("libvirt network", "PASS", _listed(found))
    if found:
        fix = f"virsh net-start {found[0].name}; virsh net-autostart {found[0].name}"
        return Check("libvirt network", "WARN", f"none is active: {_listed(found)}", fix)
    detail = "there is none; templates with `network: {mode: libvirt}` need one"
    return Check("libvirt network", "WARN", detail, "virsh net-define FILE")


def _pools(connection: Connection, _bad: Status) -> Check:
    found = host.pools(connection)
    if not found:
        return Check("libvirt storage", "PASS", "no storage pool; nothing here needs one")
    if all(pool.active for pool in found):
        return Check("libvirt storage", "PASS", _listed(found))
    names = [pool.name for pool in found if not pool.active]
    detail = f"{_listed(found)}; disks in an inactive one cannot be imported"
    return Check("libvirt storage", "WARN", detail, f"virsh pool-start {names[0]}")


_CHECKS: dict[str, Callable[[Connection, Status], Check]] = {
    "libvirt": _version,
    "libvirt kvm": _kvm,
    "libvirt network": _networks,
    "libvirt storage": _pools,
}


def _listed(found: list[host.Named]) -> str:
    return ", ".join(one.name if one.active else f"{one.name} (inactive)" for one in found)


def _validated(*, kvm: bool) -> Iterator[Check]:
    try:
        found = host.validate()
    except TemplatedError as error:
        yield Check("libvirt host", "WARN", error.message, error.hint or "virt-host-validate qemu")
        return
    passed = [one for one in found if one.status == "PASS"]
    rest = [one for one in found if one.status != "PASS"]
    matter = [one for one in rest if not any(word in one.what for word in _UNUSED)]
    detail = f"virt-host-validate: {len(passed)} of {len(found)} pass"
    if len(matter) < len(rest):
        detail += "; clones have no devices of the host and no encrypted memory, so what it says "
        detail += "of IOMMU and secure guests does not matter"
    yield Check("libvirt host", "PASS", detail)
    for one in matter:
        status: Status = "FAIL" if one.status == "FAIL" and kvm else "WARN"
        verb = "fails" if one.status == "FAIL" else "warns"
        detail = f"virt-host-validate {verb}: {one.what}"
        yield Check("libvirt host", status, detail, one.why or "virt-host-validate qemu")
