"""Egresses: named ways out of the host, each with its own networks, address and forwarders."""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated

from msgspec import Meta, Struct

from templated.errors import InvalidRequest
from templated.model.lifecycle import Table
from templated.model.network import InterfaceName

EgressName = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$(?!\n)")]
Cidr = Annotated[str, Meta(pattern=r"^[0-9.]{7,15}/[0-9]{1,2}$(?!\n)", examples=["172.20.0.0/16"])]
Address = Annotated[str, Meta(pattern=r"^[0-9.]{7,15}$(?!\n)", examples=["172.20.0.1"])]

MAX_EGRESSES = 255
"""Each has a virtual router's number (RFC 5798) of its own, and a /28 of the range of links."""
LINK_PREFIXES = ("tl", "ts")
"""How the names of the bridges between the host and forwarders begin, see `LinkPlan`."""
PORTS = (1024, 65535)
"""The ports of the fixed address that flows are given, per protocol and destination."""
NEVER = tuple(
    IPv4Network(text)
    for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
)
"""Networks that no egress leads to: this host, link-local and metadata, multicast, reserved."""


class EgressSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an egress must be, as it was asked for. Raises ValueError when its parts do not fit."""

    name: EgressName
    interface: InterfaceName
    """Of the host, without an address: it carries the forwarders' outside legs."""
    address: Cidr
    """The one that all who use the egress are seen under, with the length of its network."""
    gateway: Address
    to: tuple[Cidr, ...] = ()
    internet: bool = False
    """It leads everywhere, but for `NEVER` and the networks of this host's clones and links."""
    forwarders: Annotated[int, Meta(ge=1, le=2)] = 2
    """1: no standby."""

    def __post_init__(self) -> None:
        fixed = ipaddress.IPv4Interface(self.address)
        if not 8 <= fixed.network.prefixlen <= 30:
            raise ValueError("address: the length of its network must be /8 to /30")
        if fixed.ip in (fixed.network.network_address, fixed.network.broadcast_address):
            raise ValueError(f"address: {fixed.ip} is the network itself or its broadcast address")
        gateway = IPv4Address(self.gateway)
        if gateway not in fixed.network or gateway == fixed.ip:
            raise ValueError(f"gateway: {gateway} is not another address of {fixed.network}")
        if not self.to and not self.internet:
            raise ValueError("an egress leads somewhere: give `to`, or `internet`")
        for network in self.networks:
            if bad := next((never for never in NEVER if network.overlaps(never)), None):
                raise ValueError(f"to: {network} overlaps {bad}, where no egress leads")

    @property
    def fixed(self) -> str:
        """The fixed address without its length."""
        return str(ipaddress.IPv4Interface(self.address).ip)

    @property
    def outside(self) -> IPv4Network:
        """The network of the fixed address."""
        return ipaddress.IPv4Interface(self.address).network

    @property
    def networks(self) -> list[IPv4Network]:
        """`to`, without those inside others: nft takes no sets with overlaps."""
        return list(ipaddress.collapse_addresses(IPv4Network(text) for text in self.to))


class EgressState(enum.StrEnum):
    """Where an egress is; written before and after each step."""

    MAKING = "making"
    """A daemon that finds it takes it away: nobody was told that it is there."""
    ACTIVE = "active"
    REMOVING = "removing"
    """A daemon that finds it goes on removing it."""


EGRESS_TRANSITIONS: Table[EgressState] = {
    EgressState.MAKING: frozenset({EgressState.ACTIVE, EgressState.REMOVING}),
    EgressState.ACTIVE: frozenset({EgressState.REMOVING}),
    EgressState.REMOVING: frozenset(),
}


class Role(enum.StrEnum):
    """What a forwarder is to its egress, as it says itself."""

    STARTING = "starting"
    """Its policy is loaded, and drops everything: it has no address yet."""
    STANDBY = "standby"
    ACTIVE = "active"
    """It has the fixed address, and alone sends."""
    FAULT = "fault"
    """It cannot serve, or must not; its last error says why."""
    GONE = "gone"
    """It does not answer the daemon, or does not run."""


@dataclass(frozen=True)
class LinkPlan:
    """Where the forwarders of one egress are reached, and how its packets are told from others.

    A /28: .1 is the host, .2 the address that the active forwarder has, .3 and up each one's own.
    """

    index: int
    network: IPv4Network
    mark: int
    """Of its clones' packets; also the number of its table of routes."""
    inside: str
    """The bridge to the inside legs."""
    sync: str
    """The bridge between the forwarders, on which the host has no address."""

    @property
    def host(self) -> str:
        """The host's address."""
        return str(self.network[1])

    @property
    def shared(self) -> str:
        """The address that packets are sent to."""
        return str(self.network[2])

    def own(self, number: int) -> str:
        """The inside address of forwarder `number`, from 1."""
        return str(self.network[2 + number])

    def port(self, number: int, *, sync: bool = False) -> str:
        """The host's end of a leg of forwarder `number`."""
        return f"{self.sync if sync else self.inside}.{number}"


def link_plan(links: IPv4Network, index: int, owner: str) -> LinkPlan:
    """The plan of the egress with this index, 1 to MAX_EGRESSES. ValueError beyond `links`."""
    if not 1 <= index <= MAX_EGRESSES or (index + 1) * 16 > links.num_addresses:
        raise ValueError(f"there is no link {index} in {links}")
    digest = hashlib.sha256(owner.encode()).digest()
    network = IPv4Network((int(links.network_address) + 16 * index, 28))
    mark = 1 << 30 | int.from_bytes(digest[:2], "big") << 8 | index
    tag = digest.hex()[:5]
    inside, sync = (f"{prefix}{tag}{index:02x}" for prefix in LINK_PREFIXES)
    return LinkPlan(index, network, mark, inside, sync)


class ForwarderSpec(Struct, frozen=True, kw_only=True):
    """All that a forwarder needs to know, as the daemon writes it into its file."""

    egress: EgressSpec
    number: int
    owner: str
    """The alias of what it makes on the host, the tag of the daemon's installation."""
    index: int
    link: str
    """The /28 of `LinkPlan`."""
    inside: str
    sync: str
    clones: str
    """The subnet that packets come from."""
    links: str
    """The range of all links, to which nothing is forwarded."""
    netns: str | None = None
    """The named namespace that the daemon's network is in."""
    directory: str
    """Where its files and its socket are."""

    @property
    def plan(self) -> LinkPlan:
        """Its link."""
        return LinkPlan(self.index, IPv4Network(self.link), 0, self.inside, self.sync)

    @property
    def label(self) -> str:
        """Its name, in files and messages."""
        return f"{self.egress.name}-{self.number}"


class ForwarderView(Struct, frozen=True, kw_only=True):
    """One forwarder, as it last said."""

    number: int
    role: Role
    since: str = ""
    """When it took this role: RFC 3339, UTC."""
    pid: int = 0
    """Of the process whose network namespace it is, as in `nsenter -n -t PID`; 0: none."""
    takeovers: int = 0
    """How often it became the active one, since it runs."""
    flows: int = 0
    """What it tracks, its own flows or copies of the active one's."""
    exhausted: int = 0
    """Flows that got no port of the fixed address, or none in time."""
    counters: dict[str, tuple[int, int]] = {}
    """Packets and bytes: `out`, `in`, and `drop_REASON`."""
    contested: int = 0
    """How often another one sent under the fixed address at the same time."""
    restarts: int = 0
    """How often keepalived or conntrackd had to be started again."""
    error: str = ""
    """What went wrong last, and still does."""


class EgressView(Struct, frozen=True, kw_only=True):
    """One egress."""

    name: str
    interface: str
    address: str
    gateway: str
    to: tuple[str, ...]
    internet: bool
    state: EgressState
    active: int | None
    """The forwarder that sends; None: packets are dropped."""
    forwarders: tuple[ForwarderView, ...]
    failovers: int
    """How often another forwarder became the active one, since the daemon runs."""
    mark: int
    link: str
    created: str
    problem: str = ""
    """What an operator should look at; empty when all is well."""


def check_overlap(spec: EgressSpec, others: dict[str, IPv4Network]) -> None:
    """Raises InvalidRequest when where an egress leads, or is, overlaps one of the host's own."""
    for network in (*spec.networks, spec.outside):
        for what, other in others.items():
            if network.overlaps(other):
                raise InvalidRequest(
                    f"{network} overlaps {what}, {other}",
                    hint="choose other networks for the egress, or move the host's",
                )
