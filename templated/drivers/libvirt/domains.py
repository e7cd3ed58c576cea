"""What is looked up of libvirt's domains, volumes and networks. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from templated.drivers.libvirt.connection import Connection, binding
from templated.errors import Conflict, InvalidRequest, NotFound

_LONGEST = 500


@dataclass(frozen=True)
class Domain:
    """A domain that is shut off."""

    name: str
    uuid: str
    xml: str
    """Its configuration, without passwords."""


def names(connection: Connection) -> list[str]:
    """Those that are shut off, sorted. Raises as `Connection.call`."""
    inactive = binding().VIR_CONNECT_LIST_DOMAINS_INACTIVE
    return connection.call(
        "the list of domains",
        lambda handle: sorted(one.name() for one in handle.listAllDomains(inactive)),
    )


def shut_off(connection: Connection, name: str) -> Domain:
    """The domain `name`. Raises InvalidRequest for what cannot be a name, NotFound, Conflict when
    it runs or its memory is saved, and as `Connection.call`."""
    if not name or len(name) > _LONGEST or not name.isprintable():
        raise InvalidRequest(f"{name[:100]!r} is not the name of a domain", hint=_list(connection))
    try:
        found = connection.call(f"the domain {name}", lambda handle: _look(handle, name))
    except NotFound:
        message = f"there is no domain {name} on {connection.uri}"
        raise NotFound(message, hint=_list(connection)) from None
    active, saved, domain = found
    if active:
        raise Conflict(
            f"the domain {name} is running, and changes its disk",
            hint=f"shut it down first: virsh --connect {connection.uri} shutdown {name!r}",
        )
    if saved:
        raise Conflict(
            f"the domain {name} is not shut off: its memory is saved, and its disk belongs to that",
            hint=f"start it and shut it down: virsh --connect {connection.uri} start {name!r}",
        )
    return domain


def _list(connection: Connection) -> str:
    return f"virsh --connect {connection.uri} list --all"


def _look(handle: Any, name: str) -> tuple[bool, bool, Domain]:
    found = handle.lookupByName(name)
    xml = found.XMLDesc(binding().VIR_DOMAIN_XML_INACTIVE)
    domain = Domain(name=found.name(), uuid=found.UUIDString(), xml=xml)
    return bool(found.isActive()), bool(found.hasManagedSaveImage()), domain


def volume_path(connection: Connection, pool: str, volume: str) -> str:
    """Where a volume lies on the host. Raises NotFound, and as `Connection.call`."""
    return connection.call(
        f"the volume {volume} of the pool {pool}",
        lambda handle: str(
            handle.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()
        ),
    )


def network_problem(connection: Connection, network: str) -> str:
    """What is wrong with a network, in a few words; empty when it is active.

    Raises InvalidRequest for one whose NICs are devices of the host, and as `Connection.call`.
    """

    def look(handle: Any) -> tuple[bool, str]:
        found = handle.networkLookupByName(network)
        return bool(found.isActive()), found.XMLDesc()

    try:
        active, xml = connection.call(f"the network {network}", look)
    except NotFound:
        return "libvirt has no such network"
    forward = ET.fromstring(xml).find("forward")  # noqa: S314 - it is libvirt's own
    if forward is not None and forward.get("mode") == "hostdev":
        raise InvalidRequest(
            f"the network {network} hands out devices of the host, which clones cannot share",
            hint="put the domain on another network: virsh edit, or --hypervisor qemu",
        )
    return "" if active else f"it is not active: virsh net-start {network}"
