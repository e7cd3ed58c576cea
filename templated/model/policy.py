"""What the clones of a template, or of a function, may send and be sent: the keys of `network:`.

Pure: from the keys that people write to a `Policy`, with one clear line for each mistake.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct

from templated.errors import InvalidRequest
from templated.model.network import BridgeNetwork, NetworkConfig, parse_subnet
from templated.model.units import Size, optional_bytes

Protocol = Literal["tcp", "udp"]
EgressName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,30}$(?!\n)")]
_Text = Annotated[str, Meta(pattern=r"^[!-~]{1,64}$(?!\n)")]

NONE, NAT = "none", "nat"
"""The egresses that need not be made: no way out, and the host's own."""

LINK_LOCAL = IPv4Network("169.254.0.0/16")
METADATA = tuple(
    IPv4Network(address)
    # Where clouds tell a machine its credentials, outside of link-local: Alibaba, Azure, Oracle.
    for address in ("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32")
)
SPECIAL = tuple(
    IPv4Network(net)
    # RFC 6890: no address of a server, and loopback and broadcast lead to the host itself.
    for net in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")
)
NEVER = (LINK_LOCAL, *METADATA, *SPECIAL)
"""What no policy opens: link-local with the usual address of metadata, other such addresses, and
what is no address of a server."""


class Step(Struct, frozen=True, kw_only=True):
    """One decision on a packet's way."""

    at: str
    """port, limits, bridge, host, route, leave, reach, egress."""
    passes: bool
    says: str
    counter: str = ""
    """Where a drop is counted: its reason."""


class PolicyLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each clone may take of the network; what is left out has no limit."""

    bandwidth: Size | None = None
    """Bytes a second, in each direction."""
    packets: Annotated[int, Meta(ge=10, le=10_000_000)] | None = None
    """Packets a second that it sends, ARP among them."""
    connections: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Connections that it has opened and that the host still knows."""


class PolicyKeys(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys as they are written; None: not said. With none of them there is no policy."""

    egress: EgressName | None = None
    """`none`, `nat`, or the name of one that was made."""
    allow: Annotated[tuple[_Text, ...], Meta(max_length=256)] | None = None
    """CIDR[:PORT[/PROTO]]: of what the egress leads to, these alone. Empty or None: all."""
    peers: Literal["isolated", "open"] | None = None
    """Whether clones of the same template, or function, reach each other."""
    publish: Annotated[tuple[_Text, ...], Meta(max_length=64)] | None = None
    """HOSTPORT:PORT[/PROTO]: ports of the host that lead to the clone that has run longest."""
    limits: PolicyLimits | None = None

    @property
    def any(self) -> bool:
        """Whether there is a policy at all."""
        return PolicyKeys(**{key: getattr(self, key) for key in KEYS}) != PolicyKeys()

    def over(self, other: PolicyKeys) -> PolicyKeys:
        """The same, with `other`'s where a key, or one limit, is not said here."""
        said = {key: _either(getattr(self, key), getattr(other, key)) for key in KEYS}
        if self.limits is not None and other.limits is not None:
            said["limits"] = PolicyLimits(
                **{
                    limit: _either(getattr(self.limits, limit), getattr(other.limits, limit))
                    for limit in PolicyLimits.__struct_fields__
                }
            )
        return PolicyKeys(**said)


class NetworkRequest(PolicyKeys, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Change a function's keys: what is None stays as it is."""

    reset: bool = False
    """Begin with none: what is not said is as the template has it."""


class PolicyOwner(NamedTuple):
    """Who has said a policy's keys."""

    kind: Literal["template", "function"]
    name: str


def template_group(template: str) -> str:
    """The group of a template's clones, as rules know it."""
    return f"t.{template}"


def function_group(template: str, function: str) -> str:
    """The group of a function's instances that run on a template; at most 116 characters."""
    return f"f.{template}.{function}"


def _either(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


KEYS = ("egress", "allow", "peers", "publish", "limits")


@dataclass(frozen=True)
class Allowed:
    """A network that may be reached: by any protocol, or by one port."""

    network: IPv4Network
    port: int | None = None
    protocol: Protocol = "tcp"

    def __str__(self) -> str:
        return str(self.network) + (f":{self.port}/{self.protocol}" if self.port else "")


@dataclass(frozen=True)
class Published:
    """A port of the host that leads to a port of a clone."""

    host_port: int
    port: int
    protocol: Protocol = "tcp"

    def __str__(self) -> str:
        return f"{self.host_port}:{self.port}/{self.protocol}"


@dataclass(frozen=True)
class Policy:
    """What holds for the clones of one group: a template, or a version of a function."""

    egress: str = NONE
    allow: tuple[Allowed, ...] = ()
    """Empty: all that the egress leads to."""
    peers: bool = False
    """Clones of the group reach each other."""
    publish: tuple[Published, ...] = ()
    bandwidth: int | None = None
    """Bytes a second and clone, in each direction."""
    packets: int | None = None
    """Packets a second that a clone sends."""
    connections: int | None = None
    """Connections that a clone has opened."""


def policy_of(keys: PolicyKeys, config: NetworkConfig) -> Policy | None:
    """The policy that these keys give on the daemon's network; None when they say nothing.

    What is not said is as `config` has it for all: `nat: true` gives the egress nat, and
    `isolate: false` open peers. Raises InvalidRequest, with a line that names the key.
    """
    if not keys.any:
        return None
    if not isinstance(config, BridgeNetwork):
        raise InvalidRequest(
            f"network.{_first(keys)} needs a network of mode bridge, the daemon's is user",
            hint="in its configuration: network: {mode: bridge}",
        )
    limits = keys.limits or PolicyLimits()
    policy = Policy(
        egress=keys.egress or (NAT if config.nat else NONE),
        allow=tuple(_allowed(text, config) for text in keys.allow or ()),
        peers=not config.isolate if keys.peers is None else keys.peers == "open",
        publish=tuple(_published(text) for text in keys.publish or ()),
        bandwidth=optional_bytes(limits.bandwidth),
        packets=limits.packets,
        connections=limits.connections,
    )
    _check(policy, config)
    return policy


def _check(policy: Policy, config: BridgeNetwork) -> None:
    if policy.allow and policy.egress == NONE:
        raise InvalidRequest(
            "network.allow has no use with egress: none",
            hint="name the way out: network: {egress: nat}, or one of `templated egress ls`",
        )
    if not config.host_address and (policy.egress != NONE or policy.publish):
        raise InvalidRequest(
            "network.egress and network.publish lead through the host, and host_address is false",
            hint="in the daemon's configuration: network: {host_address: true}",
        )
    taken = [(one.host_port, one.protocol) for one in policy.publish]
    for port in {one for one in taken if taken.count(one) > 1}:
        raise InvalidRequest(f"network.publish names the host's port {port[0]}/{port[1]} twice")


def _first(keys: PolicyKeys) -> str:
    return next(key for key in KEYS if getattr(keys, key) is not None)


_ALLOWED = re.compile(r"([0-9./]{7,18})(?::([0-9]{1,5})(?:/(tcp|udp))?)?")
_PUBLISHED = re.compile(r"([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")


def parse_allowed(text: str) -> Allowed:
    """CIDR[:PORT[/PROTO]], by default tcp. Raises InvalidRequest."""
    found = _ALLOWED.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"network.allow: {text!r} is no CIDR[:PORT[/PROTO]]",
            hint="as in 10.1.0.0/16, 10.1.2.3:443, or 10.1.2.3:53/udp",
        )
    try:
        network = IPv4Network(found[1])
    except ValueError as error:
        raise InvalidRequest(f"network.allow: {text!r}: {error}") from None
    port = None if found[2] is None else _port(found[2], "network.allow", text)
    return Allowed(network, port, "udp" if found[3] == "udp" else "tcp")


def _allowed(text: str, config: BridgeNetwork) -> Allowed:
    allowed = parse_allowed(text)
    if allowed.network.subnet_of(subnet := parse_subnet(config.subnet)):
        raise InvalidRequest(
            f"network.allow: {text} lies in the clones' own subnet {subnet}",
            hint="clones of one template reach each other with peers: open, others never",
        )
    for never in NEVER:
        if allowed.network.subnet_of(never):
            raise InvalidRequest(
                f"network.allow: {text} lies in {never}, which no clone reaches",
                hint="link-local and metadata addresses, loopback and multicast stay closed",
            )
    return allowed


def _published(text: str) -> Published:
    found = _PUBLISHED.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"network.publish: {text!r} is no HOSTPORT:PORT[/PROTO]", hint="as in 8080:80"
        )
    host, port = (_port(number, "network.publish", text) for number in (found[1], found[2]))
    return Published(host, port, "udp" if found[3] == "udp" else "tcp")


def _port(digits: str, key: str, text: str) -> int:
    if not 1 <= int(digits) <= 65535:
        raise InvalidRequest(f"{key}: {text!r}: ports are 1 to 65535")
    return int(digits)


def networks(allowed: Sequence[Allowed]) -> dict[tuple[Protocol, int] | None, list[IPv4Network]]:
    """What is allowed, by port (None: all ports), each list without overlaps."""
    found: dict[tuple[Protocol, int] | None, list[IPv4Network]] = {}
    for one in allowed:
        key = None if one.port is None else (one.protocol, one.port)
        found.setdefault(key, []).append(one.network)
    return {key: list(ipaddress.collapse_addresses(nets)) for key, nets in found.items()}


class PolicyView(Struct, frozen=True, kw_only=True):
    """A policy as users see it, and what it has done since the daemon began."""

    name: str
    """The template, or the function."""
    function: bool
    """It is a function's; then it holds for its instances on `template`."""
    template: str
    egress: str
    allow: tuple[str, ...]
    peers: Literal["isolated", "open"]
    publish: tuple[str, ...]
    published: dict[str, str]
    """Ports of the host that lead somewhere at present, and the clone that they lead to."""
    limits: PolicyLimits
    sent: dict[str, int]
    """`packets` and `bytes` that clones have sent through the host; `received` likewise."""
    received: dict[str, int]
    dropped: dict[str, int]
    """Packets, by reason; those that there were."""
    problem: str = ""
    """What keeps the egress from being used, or who else would use a published port."""


class TraceView(Struct, frozen=True, kw_only=True):
    """What would happen to the first packet of a connection that a clone opens."""

    clone: str
    policy: str
    """Whose policy holds: `template NAME` or `function NAME`; empty: none does."""
    target: str
    passes: bool
    steps: tuple[Step, ...]


class Target(NamedTuple):
    """Where a packet goes: an address, and a port unless it is a ping."""

    address: IPv4Address
    port: int | None
    protocol: Literal["tcp", "udp", "icmp"]


_TARGET = re.compile(r"([0-9.]{7,15})(?::([0-9]{1,5})(?:/(tcp|udp))?)?")


def parse_target(text: str) -> Target:
    """ADDRESS[:PORT[/PROTO]], by default tcp; without a port a ping. Raises InvalidRequest."""
    found = _TARGET.fullmatch(text)
    try:
        if found is None:
            raise ValueError("not ADDRESS[:PORT[/PROTO]]")
        address = IPv4Address(found[1])
    except ValueError as error:
        raise InvalidRequest(
            f"{text[:80]!r} is no target: {error}", hint="as in 10.1.2.3, or 10.1.2.3:53/udp"
        ) from None
    if found[2] is None:
        return Target(address, None, "icmp")
    protocol: Protocol = "udp" if found[3] == "udp" else "tcp"
    return Target(address, _port(found[2], "target", text), protocol)
