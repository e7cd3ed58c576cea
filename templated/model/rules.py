"""What a policy lets pass, as one list of rules: nftables gets them, and `net trace` follows them.

Each rule has the text of its match for nft(8), and the same match as a function of a connection's
first packet. The texts judge a connection by its replies' source, which is where it really leads:
so they hold for both directions, and a policy that changes also ends what is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, NamedTuple

from templated.model.network import Exit
from templated.model.policy import NAT, NEVER, NONE, Policy, networks

Reason = Literal[
    "spoofed", "dhcp", "peers", "host", "denied", "egress", "allow", "unasked", "invalid",
    "bandwidth", "packets", "connections",
]  # fmt: skip
REASONS: dict[Reason, str] = {
    "spoofed": "not from its own MAC and address, or neither IPv4 nor ARP",
    "dhcp": "an answer of DHCP, which no clone gives",
    "peers": "to another clone that is no peer",
    "host": "to the host itself",
    "denied": "to link-local, metadata or special addresses",
    "egress": "its egress is none, or does not lead there",
    "allow": "not in the policy's allow",
    "unasked": "to the clone, and no answer to it",
    "invalid": "of no connection that the kernel knows",
    "bandwidth": "above limits.bandwidth",
    "packets": "above limits.packets",
    "connections": "above limits.connections",
}
"""Why packets of a group are dropped: a counter each."""
PASSED = ("sent", "received")
"""The counters of what is let pass through the host, from and to clones."""


class Flow(NamedTuple):
    """The first packet that a clone sends of a connection, and where the host routes it."""

    target: IPv4Address
    protocol: Literal["tcp", "udp", "icmp"]
    port: int | None
    leaves: str
    """The host's interface; empty: to the host itself."""
    to_peer: bool = False
    """`target` is a clone of the same group."""


@dataclass(frozen=True)
class Rule:
    """A match and what comes of it: dropped for a reason, or passed on to what follows."""

    match: str
    test: Callable[[Flow], bool]
    drop: Reason | None
    says: str


def leaving(policy: Policy, exits: Sequence[Exit], bridge: str, peers: str) -> list[Rule]:
    """Where a packet that a clone sends through the host may leave; the first that matches holds.

    `peers` is the name of the set of the group's addresses. What no rule matches may leave.
    """
    rules = []
    if policy.peers:
        rules.append(_rule(f'oifname "{bridge}" ip daddr @{peers}', _peer(bridge), None, "a peer"))
    says = "another clone; peers: " + ("open lets its own group in" if policy.peers else "isolated")
    rules.append(_rule(f'oifname "{bridge}"', lambda f: f.leaves == bridge, "peers", says))
    if policy.egress == NONE:
        return [*rules, _rule("", lambda f: True, "egress", "egress: none")]
    if policy.egress == NAT:
        others = [_closed(one) for one in exits]
        return rules + others
    own = next((one for one in exits if one.name == policy.egress), None)
    if own is None:
        says = f"egress {policy.egress} has no forwarders here"
        return [*rules, _rule("", lambda f: True, "egress", says)]
    says = f"egress {own.name} leads by {own.ifname}, and this is routed elsewhere"
    away = _rule(f'oifname != "{own.ifnames}"', lambda f: not own.has(f.leaves), "egress", says)
    return [*rules, away]


def _peer(bridge: str) -> Callable[[Flow], bool]:
    return lambda f: f.leaves == bridge and f.to_peer


def _closed(one: Exit) -> Rule:
    says = f"to the forwarders of egress {one.name}, and egress is nat"
    return _rule(f'oifname "{one.ifnames}"', lambda f: one.has(f.leaves), "egress", says)


def reaching(policy: Policy) -> list[Rule]:
    """Which networks may be reached; the first that matches holds, and the last matches all."""
    rules = [_rule(_to(NEVER), _in(NEVER), "denied", "link-local, metadata or special address")]
    for key, nets in networks(policy.allow).items():
        says = "allow: " + ", ".join(map(str, nets)) + (f" port {key[1]}/{key[0]}" if key else "")
        if key is None:
            rules.append(_rule(_to(nets), _in(nets), None, says))
        else:
            ports = f"ct protocol {key[0]} ct reply proto-src {key[1]} "
            rules.append(_rule(ports + _to(nets), _service(nets, *key), None, says))
    if policy.allow:
        return [*rules, _rule("", lambda f: True, "allow", "allow does not name it")]
    return [*rules, _rule("", lambda f: True, None, f"egress: {policy.egress}, with no allow")]


def hosting(gateway: str) -> list[Rule]:
    """What a clone may send to the host of its own accord: a ping of the gateway."""
    at = IPv4Address(gateway)
    return [
        _rule(
            f"ip daddr {gateway} icmp type echo-request",
            lambda f: f.target == at and f.protocol == "icmp",
            None,
            "a ping of the gateway",
        ),
        _rule("", lambda f: True, "host", "the host itself"),
    ]


def judge(rules: Iterable[Rule], flow: Flow) -> Rule | None:
    """The first rule that matches; None when none does."""
    return next((rule for rule in rules if rule.test(flow)), None)


def _rule(match: str, test: Callable[[Flow], bool], drop: Reason | None, says: str) -> Rule:
    return Rule(match, test, drop, says)


def _to(nets: Iterable[IPv4Network]) -> str:
    return f"ct reply ip saddr {{ {', '.join(map(str, nets))} }}"


def _in(nets: Iterable[IPv4Network]) -> Callable[[Flow], bool]:
    kept = tuple(nets)
    return lambda flow: any(flow.target in net for net in kept)


def _service(nets: Iterable[IPv4Network], protocol: str, port: int) -> Callable[[Flow], bool]:
    inside = _in(nets)
    return lambda flow: (flow.protocol, flow.port) == (protocol, port) and inside(flow)
