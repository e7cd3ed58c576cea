"""Egresses: named ways out of the host, each with its own networks, address and forwarders."""

from __future__ import annotations

import enum
import hashlib
import ipaddress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated

from msgspec import Meta, Struct

from templated.errors import InvalidRequest
from templated.model.lifecycle import Table
from templated.model.network import InterfaceName
from templated.model.units import Size

EgressName = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$(?!\n)")]
Cidr = Annotated[str, Meta(pattern=r"^[0-9.]{7,15}/[0-9]{1,2}$(?!\n)", examples=["172.20.0.0/16"])]
Address = Annotated[str, Meta(pattern=r"^[0-9.]{7,15}$(?!\n)", examples=["172.20.0.1"])]

MAX_EGRESSES = 255
"""Each has a virtual router's number (RFC 5798) of its own, and a /28 of the range of links."""
LINK_PREFIXES = ("tl", "ts")
"""How the names of the bridges between the host and forwarders begin, see `LinkPlan`."""
PORTS = (1024, 65535)
"""The ports of the fixed address that flows are given, per protocol and destination."""
MAX_LANES = 8
"""Active forwarders of one egress."""
NEVER = tuple(
    IPv4Network(text)
    for text in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")
)
"""Networks that no egress leads to: this host, link-local and metadata, multicast, reserved."""


class EgressHost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the two hosts of an egress."""

    address: Address
    """By which the other one reaches it."""
    clones: Cidr
    """The subnet of its clones, as in its daemon's configuration."""


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
    """Of each lane. 1: no standby."""
    min: Annotated[int, Meta(ge=1, le=MAX_LANES)] = 1
    max: Annotated[int, Meta(ge=1, le=MAX_LANES)] = 1
    """How many lanes there are: active forwarders, each with a slice of the ports."""
    bandwidth: Size = "256MiB"
    """What one active forwarder is meant to carry a second, both ways together."""
    hosts: tuple[EgressHost, ...] = ()
    """Two, with a forwarder on each; none: all forwarders are on this one."""
    link: Annotated[int, Meta(ge=1, le=MAX_EGRESSES)] | None = None
    """The index of the link that both hosts have: see `LinkPlan`."""

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
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max, {self.max}")
        for network in self.networks:
            if bad := next((never for never in NEVER if network.overlaps(never)), None):
                raise ValueError(f"to: {network} overlaps {bad}, where no egress leads")
        if self.hosts:
            self._check_hosts()
        elif self.link is not None:
            raise ValueError("link: an egress of one host chooses its link by itself")

    def _check_hosts(self) -> None:
        if len(self.hosts) != 2 or self.forwarders != 2:
            raise ValueError("hosts: an egress between hosts has two, with a forwarder on each")
        if self.max > 1:
            raise ValueError("max: an egress between hosts has one lane")
        if self.link is None:
            raise ValueError(f"link: give a number to {MAX_EGRESSES} that is free on both hosts")
        if len({IPv4Address(host.address) for host in self.hosts}) == 1:
            raise ValueError(f"hosts: both have the address {self.hosts[0].address}")
        clones = [IPv4Network(host.clones) for host in self.hosts]
        if clones[0].overlaps(clones[1]):
            raise ValueError(f"hosts: the clones of both are in {clones[0]}")
        for network in (*self.networks, self.outside):
            if bad := next((one for one in clones if network.overlaps(one)), None):
                raise ValueError(f"hosts: {network} overlaps the clones' subnet {bad}")

    def seats(self, clones: IPv4Network) -> list[int]:
        """Which of each lane's forwarders are on the host that has these clones, from 1."""
        if not self.hosts:
            return list(range(1, self.forwarders + 1))
        return [n for n, one in enumerate(self.hosts, 1) if IPv4Network(one.clones) == clones]

    @property
    def fixed(self) -> str:
        """The fixed address without its length."""
        return str(ipaddress.IPv4Interface(self.address).ip)

    @property
    def outside(self) -> IPv4Network:
        """The network of the fixed address."""
        return ipaddress.IPv4Interface(self.address).network

    def ports(self, lane: int) -> tuple[int, int]:
        """The first and last port of the fixed address that TCP flows of this lane are given."""
        size = (PORTS[1] - PORTS[0] + 1) // self.max
        return PORTS[0] + lane * size, PORTS[0] + (lane + 1) * size - 1

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


class LaneState(enum.StrEnum):
    """Where a lane is; written before it is acted upon."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """It takes no new flows, and ends with its last one."""
    ENDING = "ending"
    """What is left of it is being removed, again and again until nothing is."""


LANE_TRANSITIONS: Table[LaneState] = {
    LaneState.STARTING: frozenset({LaneState.SERVING, LaneState.ENDING}),
    LaneState.SERVING: frozenset({LaneState.DRAINING}),
    LaneState.DRAINING: frozenset({LaneState.SERVING, LaneState.ENDING}),
    LaneState.ENDING: frozenset(),
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
    """Where the forwarders of one lane are reached, and how its packets are told from others.

    A /28: .1 is the host, .2 the address that the active forwarder has, .3 and .4 each one's own.
    Of two hosts that share it, the second is .14.
    """

    index: int
    lane: int
    network: IPv4Network
    mark: int
    """Of its clones' packets; also the number of its table of routes."""
    inside: str
    """The bridge to the inside legs."""
    sync: str
    """The bridge between the forwarders, on which the host has no address."""
    side: int = field(default=1, compare=False)
    """Which of two hosts this one is."""

    @property
    def host(self) -> str:
        """The host's address."""
        return self.host_of(self.side)

    def host_of(self, side: int) -> str:
        """The address of one of two hosts."""
        return str(self.network[1 if side == 1 else 14])

    @property
    def shared(self) -> str:
        """The address that packets are sent to."""
        return str(self.network[2])

    def own(self, seat: int) -> str:
        """The inside address of the forwarder of this seat, from 1."""
        return str(self.network[2 + seat])

    def port(self, seat: int, *, sync: bool = False) -> str:
        """The host's end of a leg of the forwarder of this seat."""
        return f"{self.sync if sync else self.inside}.{seat}"

    def tunnel(self, *, sync: bool = False) -> str:
        """The port of a bridge that leads to the other host's."""
        return f"{self.sync if sync else self.inside}.v"


def link_plan(links: IPv4Network, index: int, owner: str, lane: int = 0, side: int = 1) -> LinkPlan:
    """The plan of a lane of the egress with this index, 1 to MAX_EGRESSES.

    Its names begin as those of lane 0, and its mark is the same but for the bits that EXIT_MASK
    leaves out. Raises ValueError beyond `links`.
    """
    place = index + (MAX_EGRESSES + 1) * lane
    if not 1 <= index <= MAX_EGRESSES or (place + 1) * 16 > links.num_addresses:
        raise ValueError(f"there is no link {place} in {links}")
    digest = hashlib.sha256(owner.encode()).digest()
    network = IPv4Network((int(links.network_address) + 16 * place, 28))
    mark = 1 << 30 | lane << 24 | int.from_bytes(digest[:2], "big") << 8 | index
    tag = f"{digest.hex()[:5]}{index:02x}" + (f"{lane:x}" if lane else "")
    inside, sync = (f"{prefix}{tag}" for prefix in LINK_PREFIXES)
    return LinkPlan(index, lane, network, mark, inside, sync, side)


SEATS = 2
"""Forwarders of a lane, at most."""


class ForwarderSpec(Struct, frozen=True, kw_only=True):
    """All that a forwarder needs to know, as the daemon writes it into its file."""

    egress: EgressSpec
    number: int
    """Of the egress's forwarders, from 1: two numbers for each lane, also where one is not used."""
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
        side = self.seat if self.egress.hosts else 1
        return LinkPlan(
            *(self.index, self.lane, IPv4Network(self.link), 0, self.inside, self.sync, side)
        )

    @property
    def lane(self) -> int:
        """Which lane it is of, from 0. The first one's forwarders alone answer for the address."""
        return (self.number - 1) // SEATS

    @property
    def seat(self) -> int:
        """Its number in its lane, from 1."""
        return (self.number - 1) % SEATS + 1

    @property
    def sources(self) -> dict[str, str]:
        """The subnets that packets come from, and by which host's address each is reached."""
        plan, hosts = self.plan, self.egress.hosts
        if not hosts:
            return {self.clones: plan.host}
        return {one.clones: plan.host_of(side) for side, one in enumerate(hosts, 1)}

    @property
    def label(self) -> str:
        """Its name, in files and messages."""
        return f"{self.egress.name}-{self.number}"


class Peer(enum.StrEnum):
    """What a forwarder sees of the one on the other host."""

    NONE = ""
    """It does not look: the other one is on this host, or there is none."""
    SENDS = "sends"
    """It is heard as the active one."""
    SEEN = "seen"
    """It answers."""
    UNSEEN = "unseen"


class ForwarderView(Struct, frozen=True, kw_only=True):
    """One forwarder, as it last said."""

    number: int
    lane: int = 1
    role: Role
    since: str = ""
    """When it took this role: RFC 3339, UTC."""
    pid: int = 0
    """Of the process whose network namespace it is, as in `nsenter -n -t PID`; 0: none."""
    takeovers: int = 0
    """How often it became the active one, since it runs."""
    flows: int = 0
    """What it tracks, its own flows or copies of the active one's."""
    rate: int = 0
    """Bytes a second that it forwarded of late, both ways together."""
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
    peer: Peer = Peer.NONE
    """Of two hosts: what it sees of the other one's."""


class LaneView(Struct, frozen=True, kw_only=True):
    """One lane: an active forwarder with its standby, and what they have of the fixed address."""

    number: int
    """From 1."""
    state: LaneState
    active: int | None
    """The forwarder that sends."""
    ports: tuple[int, int]
    """The first and last port that its TCP flows are given."""
    flows: int
    rate: int


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
    """The forwarder of the first lane that sends; None: packets are dropped."""
    forwarders: tuple[ForwarderView, ...]
    lanes: tuple[LaneView, ...]
    min: int
    max: int
    failovers: int
    """How often another forwarder became the active one, since the daemon runs."""
    mark: int
    link: str
    created: str
    problem: str = ""
    """What an operator should look at; empty when all is well."""
    hosts: tuple[EgressHost, ...] = ()
    """Of an egress between two hosts; forwarder 1 is on the first."""
    here: int | None = None
    """Which of `hosts` this is."""
    peer: Peer = Peer.NONE
    """What this host's forwarder sees of the other one."""


def check_overlap(spec: EgressSpec, others: dict[str, IPv4Network]) -> None:
    """Raises InvalidRequest when where an egress leads, or is, overlaps one of the host's own."""
    for network in (*spec.networks, spec.outside):
        for what, other in others.items():
            if network.overlaps(other):
                raise InvalidRequest(
                    f"{network} overlaps {what}, {other}",
                    hint="choose other networks for the egress, or move the host's",
                )
