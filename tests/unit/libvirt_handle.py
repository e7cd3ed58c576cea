"""A stand-in for the binding's virConnect: domains, networks and volumes that a test names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from templated.drivers.libvirt.connection import Connection, binding

UUID = "0b5cb1f5-63f8-4e0c-8a8b-6f8f0a7a1c01"


def _refused(code: str, text: str) -> Exception:
    """libvirt's error, as its binding raises it."""
    libvirt = binding()
    error = libvirt.libvirtError(text)
    error.err = (getattr(libvirt, f"VIR_ERR_{code}"), 0, text, 2, "", "", "", 0, 0)
    failed: Exception = error
    return failed


@dataclass
class StubDomain:
    """A domain, shut off unless it is said otherwise."""

    title: str
    xml: str
    active: bool = False
    saved: bool = False

    def name(self) -> str:
        return self.title

    def UUIDString(self) -> str:  # noqa: N802 - libvirt's
        return UUID

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        assert flags == binding().VIR_DOMAIN_XML_INACTIVE
        return self.xml

    def isActive(self) -> int:  # noqa: N802
        return int(self.active)

    def hasManagedSaveImage(self) -> int:  # noqa: N802
        return int(self.saved)


@dataclass
class Place:
    """A network, a pool or a volume."""

    active: bool = True
    location: str = ""
    xml: str = "<network/>"
    volumes: dict[str, Place] = field(default_factory=dict)

    def isActive(self) -> int:  # noqa: N802
        return int(self.active)

    def XMLDesc(self) -> str:  # noqa: N802
        return self.xml

    def path(self) -> str:
        return self.location

    def storageVolLookupByName(self, name: str) -> Place:  # noqa: N802
        if name not in self.volumes:
            raise _refused("NO_STORAGE_VOL", f"no storage vol with matching name '{name}'")
        return self.volumes[name]


@dataclass
class Handle:
    """What a connection of the tests leads to. It has no way to change anything."""

    domains: dict[str, StubDomain] = field(default_factory=dict)
    networks: dict[str, Place] = field(default_factory=dict)
    pools: dict[str, Place] = field(default_factory=dict)
    closed: int = 0

    def define(self, name: str, xml: str, **state: bool) -> None:
        """Have a domain."""
        self.domains[name] = StubDomain(name, xml, **state)

    def connect(self, uri: str, **options: Any) -> Connection:
        """In place of the driver's `connect`; all that is ours is read-only."""
        assert options["read_only"]
        return Connection(uri, self, 10.0)

    def lookupByName(self, name: str) -> StubDomain:  # noqa: N802
        if name not in self.domains:
            raise _refused("NO_DOMAIN", f"no domain with matching name '{name}'")
        return self.domains[name]

    def listAllDomains(self, flags: int) -> list[StubDomain]:  # noqa: N802
        assert flags == binding().VIR_CONNECT_LIST_DOMAINS_INACTIVE
        return [one for one in self.domains.values() if not one.active]

    def networkLookupByName(self, name: str) -> Place:  # noqa: N802
        if name not in self.networks:
            raise _refused("NO_NETWORK", f"no network with matching name '{name}'")
        return self.networks[name]

    def storagePoolLookupByName(self, name: str) -> Place:  # noqa: N802
        if name not in self.pools:
            raise _refused("NO_STORAGE_POOL", f"no storage pool with matching name '{name}'")
        return self.pools[name]

    def close(self) -> None:
        self.closed += 1
