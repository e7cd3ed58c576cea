"""The config section `network:`, the arithmetic of the addresses that clones get, and how a VM's
NIC is connected."""

from __future__ import annotations

import copy
import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, TypeAlias

from msgspec import Meta, Struct

# Linux allows 15 bytes (IFNAMSIZ - 1). A first letter keeps names apart from options and indexes.
InterfaceName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_.-]{0,14}$(?!\n)")]
NamespaceName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}$(?!\n)")]
Subnet = Annotated[str, Meta(pattern=r"^[0-9.]{7,15}/[0-9]{1,2}$(?!\n)", examples=["10.77.0.0/16"])]

# A /8 has 2**24 addresses, as many as the 24 bits of a MAC that carry the index; a /29 leaves
# four clones beside the addresses that are taken.
_WIDEST, _NARROWEST = 8, 29
# Of every subnet: its network address, the gateway and the DNS address in front, and the
# broadcast address at the end.
_FRONT, _RESERVED = 3, 4


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="mode"):
    """Base of the modes: immutable, and a key it does not know is an error."""


class UserNetwork(_Section, frozen=True, tag="user"):
    """QEMU's own network stack (slirp), one per VM: clones never see each other.

    `restrict` leaves the guest no way out; ports that are forwarded to it still work.
    Raises ValueError when `subnet` is not usable.
    """

    subnet: Subnet = "10.77.0.0/16"
    restrict: bool = True

    def __post_init__(self) -> None:
        parse_subnet(self.subnet)


class BridgeNetwork(_Section, frozen=True, tag="bridge"):
    """A tap per clone on a bridge of the host.

    create        make the bridge when it is missing; otherwise a missing bridge is an error
    host_address  the bridge has the subnet's first address, which is the guests' gateway
    isolate       clones reach the host but not each other
    antispoof     a port passes only IPv4 and ARP from the address that it was made for (needs nft)
    nat           masquerade packets that leave for other networks (needs nft and ip_forward)
    netns         a named network namespace that holds all of it; None is the daemon's own

    Raises ValueError when `subnet` is not usable, and for `nat` without `host_address`.
    """

    bridge: InterfaceName = "templated0"
    subnet: Subnet = "10.78.0.0/16"
    create: bool = True
    host_address: bool = True
    isolate: bool = True
    antispoof: bool = False
    nat: bool = False
    netns: NamespaceName | None = None

    def __post_init__(self) -> None:
        parse_subnet(self.subnet)
        if self.nat and not self.host_address:
            raise ValueError("nat: true needs host_address: true, the host is the way out")


NetworkConfig: TypeAlias = UserNetwork | BridgeNetwork


EXIT_MASK = 0xF0FFFFFF
"""The bits of a mark that tell the exit; the others tell which of its ways a flow takes."""


class Exit(NamedTuple):
    """A named way out of the host, by forwarders: what policies call an egress.

    Packets of clones that have it get the firewall mark `mark`, and may leave by the interface
    `ifname` of the host alone, or another one whose name begins so. Rules and routes for the mark
    are the business of who made it.
    """

    name: str
    mark: int
    ifname: str

    @property
    def ifnames(self) -> str:
        """Its interfaces, as nft(8) matches them."""
        return f"{self.ifname}*"

    def has(self, ifname: str) -> bool:
        """Whether this interface is one of its own."""
        return ifname.startswith(self.ifname)


class Forward(NamedTuple):
    """A port of the host that leads to a port of the guest. Host port 0: a free one is picked."""

    guest_port: int
    host_port: int
    host_address: str = "127.0.0.1"
    protocol: Literal["tcp", "udp"] = "tcp"


@dataclass(frozen=True)
class Tap:
    """A NIC that is connected by an open tap, which the VM's process inherits."""

    fd: int


@dataclass(frozen=True)
class Slirp:
    """A NIC with a network stack of its VM's own. Addresses are IPv4, as text."""

    subnet: str
    gateway: str
    dns: str
    address: str
    """The guest's own."""
    restrict: bool
    """The guest has no way out; forwarded ports still work."""
    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True)
class OfLibvirt:
    """A NIC on a network of libvirt, which makes its tap."""

    name: str


Attachment: TypeAlias = Tap | Slirp | OfLibvirt
"""How a VM's NIC is connected; the hypervisor's driver turns it into its own options."""


def parse_subnet(text: str) -> ipaddress.IPv4Network:
    """The network `text` names. Raises ValueError: not IPv4, host bits set, prefix not 8 to 29."""
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"subnet {text!r} is not an IPv4 network: {error}") from None
    if not _WIDEST <= network.prefixlen <= _NARROWEST:
        raise ValueError(f"subnet {text!r}: the prefix must be /{_WIDEST} to /{_NARROWEST}")
    if network.is_loopback or network.is_multicast or network.is_reserved or text[:2] == "0.":
        raise ValueError(f"subnet {text!r} is a range that hosts cannot have")
    return network


class Addresses(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What VMs may have of a network that is not the daemon's: IPv4, as text."""

    subnet: str
    gateway: str
    first: str
    last: str


class AddressPlan:
    """Which addresses the clone with a given index has. Pure: equal input gives equal addresses.

    Indexes are 0 to capacity - 1. The subnet's first address is the gateway (slirp's host, or
    the bridge) and its second slirp's DNS server; no clone gets either, in both modes, so that
    a clone's address does not depend on the mode.
    """

    def __init__(self, subnet: str, host_tag: bytes) -> None:
        """`host_tag` is anything that differs between hosts, such as the bytes of machine-id.

        Two hosts on one segment then give out different MACs, but for a chance of 1 in 65536.
        Raises ValueError as `parse_subnet` does.
        """
        self.network = parse_subnet(subnet)
        self._first = int(self.network.network_address) + _FRONT
        self.capacity = self.network.num_addresses - _RESERVED
        """Number of clones that there are addresses for."""
        self.gateway = str(self.network[1])
        self._mac_prefix = b"\x02" + hashlib.sha256(host_tag).digest()[:2]

    def elsewhere(self, given: Addresses) -> AddressPlan:
        """The plan of another network, whose numbers are not a slot's indexes: MACs are still ours.

        Raises ValueError for a subnet that is not usable.
        """
        plan = copy.copy(self)
        plan.network, plan.gateway = parse_subnet(given.subnet), given.gateway
        plan._first = int(ipaddress.IPv4Address(given.first))
        plan.capacity = int(ipaddress.IPv4Address(given.last)) - plan._first + 1
        return plan

    @property
    def prefix(self) -> int:
        """Length of the subnet's prefix, in bits."""
        return self.network.prefixlen

    @property
    def dns(self) -> str:
        """Where slirp answers DNS. In bridge mode nothing answers there."""
        return str(self.network[2])

    def ip(self, index: int) -> str:
        """The clone's IPv4 address. Raises ValueError when the index is out of range."""
        return str(ipaddress.IPv4Address(self._first + self._checked(index)))

    def index(self, ip: str) -> int:
        """The index whose address is `ip`. Raises ValueError when no clone can have it."""
        return self._checked(int(ipaddress.IPv4Address(ip)) - self._first)

    def mac(self, index: int) -> str:
        """The clone's MAC: 02 (locally administered, unicast), 16 bits of host, 24 of index.

        Raises ValueError when the index is out of range.
        """
        return (self._mac_prefix + self._checked(index).to_bytes(3, "big")).hex(":")

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.capacity:
            raise ValueError(f"no address {index} in {self.network}: it has {self.capacity}")
        return index


@dataclass(frozen=True)
class Elsewhere:
    """A network that is not the daemon's: its name, and which addresses of it slots may have."""

    name: str
    plan: AddressPlan
