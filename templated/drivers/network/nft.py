"""The nftables rules of a bridge: whose frames a port passes, where clones lead, source NAT.

Two tables, named after the bridge, so that daemons on one host do not share them: `bridge` judges
frames by the port that they come from, `ip` judges packets by the clone's address, which the first
has proven. Maps lead from port and address to the chains of a group (a template, or a version of a
function), so the number of rules does not grow with clones, and a policy that changes touches only
its group's chains. No verdict of ours accepts for others: what these tables pass, the host's own
rules still see. A script goes to `nft -f -` whole, which applies it in one transaction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from templated.drivers.host.programs import run_here
from templated.drivers.network.base import Counted
from templated.drivers.network.elements import Element
from templated.model.network import EXIT_MASK, Exit
from templated.model.policy import NAT, NONE, Policy
from templated.model.rules import PASSED, REASONS, Rule, hosting, leaving, reaching

_TIMEOUT = 20.0
GUARD = "guard"
"""The group of ports that have no policy and are held to their address."""
_MAPS = {"bridge": ("from", "bridged", "to", "down"), "ip": ("mark", "out", "host", "in", "nat")}
"""By family, the chains of a group: one for each hook. Maps from a port (`ports_FROM`), or from an
address (`clones_OUT`), lead there."""
_INNER: dict[str, tuple[str, ...]] = {"bridge": (), "ip": ("reach",)}
"""The chains that those jump to."""
_SETS = {"bridge": ("members", "packets", "up", "sinks"), "ip": ("members", "flows")}
"""The sets of a group: of its ports, or their addresses, and of those that have used a limit."""
BURST = 64 << 10
"""Bytes that a clone may send, or be sent, at once beside a second's worth of limits.bandwidth.

The kernel's bucket (net/netfilter/nft_limit.c) holds both; a small one would pass no large packet.
"""
_LARGEST = 1 << 17
"""Elements of a set that counts by port; there are at most 60,000 clones."""


def table_of(bridge: str) -> str:
    """A table's name; nftables takes no dash in it."""
    return "templated_" + re.sub(r"[^a-z0-9]", "_", bridge)


class Member(NamedTuple):
    """A port that rules know: its interface, the clone's addresses, and its group."""

    ifname: str
    mac: str
    ip: str
    group: str


@dataclass(frozen=True)
class Segment:
    """What the rules of all groups share."""

    bridge: str
    subnet: str
    gateway: str
    nat: bool
    """Masquerade what clones without a policy send to other networks."""

    @property
    def table(self) -> str:
        return table_of(self.bridge)


def replaced(
    segment: Segment,
    policies: Mapping[str, Policy],
    exits: Sequence[Exit],
    members: Iterable[Member],
) -> str:
    """A script that makes both tables anew, with all that is in them."""
    table = segment.table
    lines = [
        f"add table {f} {table}\ndelete table {f} {table}\nadd table {f} {table}" for f in _MAPS
    ]
    lines += _frame(segment, exits)
    lines += _guard(f"bridge {table}", GUARD)
    for group, policy in policies.items():
        lines.append(group_rules(segment, group, policy, exits))
    lines.append(moved(segment, (), (one for m in members for one in elements(segment, m))))
    return "\n".join(lines) + "\n"


def _frame(segment: Segment, exits: Sequence[Exit]) -> Iterator[str]:
    """The maps and the chains at the kernel's hooks, in a fixed number of rules."""
    b, i, br = f"bridge {segment.table}", f"ip {segment.table}", segment.bridge
    yield f"add set {b} owners {{ type ifname . ether_addr . ipv4_addr; }}"
    for family, names in _MAPS.items():
        prefix, key = ("ports", "ifname") if family == "bridge" else ("clones", "ipv4_addr")
        for name in names:
            yield f"add map {family} {segment.table} {prefix}_{name} {{ type {key} : verdict; }}"
    yield (
        f"add map {i} published {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}"
    )
    hooks = (
        (b, "prerouting", "filter", -300, ["iifname vmap @ports_from"]),
        (b, "forward", "filter", 0, ["iifname vmap @ports_bridged", "oifname vmap @ports_to"]),
        (b, "postrouting", "filter", 0, ["oifname vmap @ports_down"]),
        (
            i,
            "marking",
            "filter hook prerouting",
            -150,
            [f'iifname "{br}" ip saddr vmap @clones_mark'],
        ),
        (i, "input", "filter", 0, [f'iifname "{br}" ip saddr vmap @clones_host']),
        (i, "forward", "filter", 0, list(_forward(br, exits))),
        (i, "publish", "nat hook prerouting", -100, [_publish(f'iifname != "{br}" ')]),
        (i, "publish_here", "nat hook output", -100, [_publish("ip daddr != 127.0.0.0/8 ")]),
        (i, "leaving", "nat hook postrouting", 100, list(_leaving(segment))),
    )
    for table, chain, kind, priority, rules in hooks:
        hook = kind if "hook" in kind else f"{kind} hook {chain}"
        yield f"add chain {table} {chain} {{ type {hook} priority {priority}; policy accept; }}"
        yield from (f"add rule {table} {chain} {rule}" for rule in rules)


def _forward(bridge: str, exits: Sequence[Exit]) -> Iterator[str]:
    yield f'iifname "{bridge}" ip saddr vmap @clones_out'
    yield f'oifname "{bridge}" ip daddr vmap @clones_in'
    # Clones without a policy reach no egress: nothing has marked their packets.
    for one in exits:
        mark = f"meta mark & {EXIT_MASK:#x} != {one.mark}"
        yield f'iifname "{bridge}" oifname "{one.ifnames}" {mark} drop'


def rerouted(segment: Segment, policies: Mapping[str, Policy], exits: Sequence[Exit]) -> str:
    """A script that has all groups leave by these exits."""
    forward = f"ip {segment.table} forward"
    lines = [f"flush chain {forward}"]
    lines += [f"add rule {forward} {rule}" for rule in _forward(segment.bridge, exits)]
    lines += [group_rules(segment, group, policy, exits) for group, policy in policies.items()]
    return "\n".join(lines)


def _publish(match: str) -> str:
    to = "dnat ip to meta l4proto . th dport map @published"
    return f"{match}fib daddr type local meta l4proto {{ tcp, udp }} {to}"


def _leaving(segment: Segment) -> Iterator[str]:
    yield "ip saddr vmap @clones_nat"
    if segment.nat:
        yield f'ip saddr {segment.subnet} oifname != "{segment.bridge}" masquerade'


def group_rules(segment: Segment, group: str, policy: Policy, exits: Sequence[Exit]) -> str:
    """A script that gives a group's chains these rules, whether they are there yet or not.

    Its ports, and what its counters have counted, stay.
    """
    lines: list[str] = []
    for family, table in (("bridge", f"bridge {segment.table}"), ("ip", f"ip {segment.table}")):
        lines += [f"add counter {table} {group}.{name}" for name in (*REASONS, *PASSED)]
        kind = "ifname" if family == "bridge" else "ipv4_addr"
        lines.append(f"add set {table} {group}.members {{ type {kind}; }}")
        for name in _SETS[family][1:]:
            counts = f"type {kind}; size {_LARGEST}; flags dynamic;"
            lines.append(f"add set {table} {group}.{name} {{ {counts} }}")
            # An element keeps the limit that it was made with.
            lines.append(f"flush set {table} {group}.{name}")
    b, i = f"bridge {segment.table}", f"ip {segment.table}"
    lines += _chains(b, group, _frames(group, policy))
    lines += _chains(i, group, _packets(segment, group, policy, exits))
    return "\n".join(lines)


def _guard(table: str, group: str) -> list[str]:
    return [f"add counter {table} {group}.spoofed", *_chains(table, group, {"from": _own(group)})]


def _chains(table: str, group: str, chains: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    for name in chains:
        lines += [f"add chain {table} {group}.{name}", f"flush chain {table} {group}.{name}"]
    for name, rules in chains.items():
        lines += [f"add rule {table} {group}.{name} {rule}" for rule in rules]
    return lines


def _own(group: str) -> list[str]:
    """Only IPv4 and ARP of the clone's own have rules that pass them: all else is dropped, also
    IPv6."""
    arp = "arp saddr ip @owners iifname . arp saddr ether . arp saddr ip @owners"
    return [
        "iifname . ether saddr . ip saddr @owners return",
        f"iifname . ether saddr . {arp} return",
        _drop(group, "spoofed"),
    ]


def _frames(group: str, policy: Policy) -> dict[str, list[str]]:
    up, down = [], []
    if policy.packets is not None:
        rate = f"{policy.packets}/second burst {policy.packets} packets"
        up.append(_over(group, "packets", "iifname", rate))
    if policy.bandwidth is not None:
        rate = f"{policy.bandwidth} bytes/second burst {BURST} bytes"
        up.append(_over(group, "up", "iifname", rate, "bandwidth"))
        down.append(_over(group, "sinks", "oifname", rate, "bandwidth"))
    up.append(f"udp sport 67 {_drop(group, 'dhcp')}")
    bridged, to = [_drop(group, "peers")], [_drop(group, "unasked")]
    if policy.peers:
        bridged.insert(0, f"oifname @{group}.members {_count(group, 'sent')} return")
        to.insert(0, f"iifname @{group}.members {_count(group, 'received')} return")
    return {"from": up + _own(group), "bridged": bridged, "to": to, "down": down}


def _over(group: str, name: str, key: str, rate: str, reason: str = "packets") -> str:
    return f"update @{group}.{name} {{ {key} limit rate over {rate} }} {_drop(group, reason)}"


def _packets(
    segment: Segment, group: str, policy: Policy, exits: Sequence[Exit]
) -> dict[str, list[str]]:
    invalid = f"ct state invalid {_drop(group, 'invalid')}"
    sent = f"{_count(group, 'sent')} return"
    way = leaving(policy, exits, segment.bridge, f"{group}.members")
    own = next((one for one in exits if one.name == policy.egress), None)
    out = [invalid, f"ct direction reply {sent}", *(_text(group, rule) for rule in way)]
    if policy.egress != NONE:
        out.append(f"jump {group}.reach")
    if policy.connections is not None:
        over = f"ct state new add @{group}.flows {{ ip saddr ct count over {policy.connections} }}"
        out.append(f"{over} {_drop(group, 'connections')}")
    return {
        "reach": [_text(group, rule) for rule in reaching(policy)],
        "out": [*out, sent],
        "in": list(_inward(segment, group, policy, own)),
        "host": [
            "ct direction reply ct state established,related return",
            *(_text(group, rule) for rule in hosting(segment.gateway)),
        ],
        # Answers to who came in by a published port go back by the host's usual routes.
        "mark": [f"ct direction original meta mark set {own.mark}"] if own else [],
        "nat": [f'oifname != "{segment.bridge}" masquerade' if policy.egress == NAT else "accept"],
    }


def _inward(segment: Segment, group: str, policy: Policy, own: Exit | None) -> Iterator[str]:
    """What the host forwards to a clone: answers, from where it may reach, and published ports."""
    received = f"{_count(group, 'received')} return"
    yield f"ct state invalid {_drop(group, 'invalid')}"
    if policy.peers:
        # With br_netfilter frames of the bridge come by here, too: they are counted there.
        yield f'iifname "{segment.bridge}" ip saddr @{group}.members return'
    for one in policy.publish:
        # A port of ours, where packets were sent to one of the host's.
        yield (
            f"ct direction original ct status dnat {one.protocol} dport {one.port} "
            f"ct original proto-dst {one.host_port} {received}"
        )
    yield f"ct direction original {_drop(group, 'unasked')}"
    if policy.egress == NONE or (policy.egress != NAT and own is None):
        yield _drop(group, "egress")
        return
    if own is not None:
        yield f'iifname != "{own.ifnames}" {_drop(group, "egress")}'
    yield f"jump {group}.reach"
    yield received


def _text(group: str, rule: Rule) -> str:
    match = f"{rule.match} " if rule.match else ""
    return match + (_drop(group, rule.drop) if rule.drop else "return")


def _count(group: str, name: str) -> str:
    return f'counter name "{group}.{name}"'


def _drop(group: str, reason: str) -> str:
    return f"{_count(group, reason)} drop"


def elements(segment: Segment, member: Member) -> Iterator[Element]:
    """Where a port is under its group's rules. Order does not matter."""
    port, group = (member.ifname,), member.group
    yield Element("bridge", "owners", (member.ifname, member.mac, member.ip))
    if group == GUARD:
        yield Element("bridge", "ports_from", port, f"{group}.from")
        return
    yield Element("bridge", f"{group}.members", port)
    yield Element("ip", f"{group}.members", (member.ip,))
    for name in _MAPS["bridge"]:
        yield Element("bridge", f"ports_{name}", port, f"{group}.{name}")
    for name in _MAPS["ip"]:
        yield Element("ip", f"clones_{name}", (member.ip,), f"{group}.{name}")


def moved(segment: Segment, take: Iterable[Element], put: Iterable[Element]) -> str:
    """A script that takes elements, and fails when one is not there, and then puts others."""
    lines = []
    for verb, some in (("delete", take), ("add", put)):
        sets: dict[tuple[str, str], list[str]] = {}
        for one in some:
            to = f" : jump {one.chain}" if one.chain and verb == "add" else ""
            sets.setdefault((one.family, one.set), []).append(one.written + to)
        for (family, name), keys in sets.items():
            where = f"{family} {segment.table} {name}"
            lines.append(f"{verb} element {where} {{ {', '.join(keys)} }}")
    return "\n".join(lines)


def without(segment: Segment, group: str) -> str:
    """A script that removes the chains, sets and counters of a group that has no ports."""
    lines = []
    for family, names in _MAPS.items():
        table = f"{family} {segment.table}"
        chains = [f"{table} {group}.{name}" for name in (*names, *_INNER[family])]
        lines += [f"flush chain {chain}" for chain in chains]
        lines += [f"delete chain {chain}" for chain in chains]
        lines += [f"delete set {table} {group}.{name}" for name in _SETS[family]]
        lines += [f"delete counter {table} {group}.{name}" for name in (*REASONS, *PASSED)]
    return "\n".join(lines)


def publishing(segment: Segment, ports: Mapping[tuple[str, int], tuple[str, int]]) -> str:
    """A script that has these ports of the host, and no others, lead to ports of clones."""
    where = f"ip {segment.table} published"
    lines = [f"flush map {where}"]
    for (protocol, host_port), (ip, port) in ports.items():
        lines.append(f"add element {where} {{ {protocol} . {host_port} : {ip} . {port} }}")
    return "\n".join(lines)


def counters(segment: Segment) -> dict[str, dict[str, Counted]]:
    """By group and name, what has been counted since the tables were made. Raises HostError."""
    found: dict[str, dict[str, Counted]] = {}
    for family in _MAPS:
        listed = json.loads(_nft(["-j", "list", "counters", "table", family, segment.table]))
        for item in listed["nftables"]:
            if (counter := item.get("counter")) is None:
                continue
            group, _, name = counter["name"].rpartition(".")
            sums = found.setdefault(group, {})
            before = sums.get(name, Counted(0, 0))
            sums[name] = Counted(
                before.packets + counter["packets"], before.bytes + counter["bytes"]
            )
    return found


def remove_tables(bridge: str) -> None:
    """Remove both tables. No error if there are none. Raises HostError."""
    table = table_of(bridge)
    apply("".join(f"add table {f} {table}\ndelete table {f} {table}\n" for f in _MAPS))


def apply(script: str) -> None:
    """Raises HostError, with nothing of the script applied."""
    _nft(["-f", "-"], script)


def _nft(arguments: list[str], script: str = "") -> str:
    """The output of nft, in the network namespace of the calling thread. Raises HostError."""
    hint = "nf_tables must be in the kernel"
    return run_here("nft", *arguments, stdin=script, timeout=_TIMEOUT, hint=hint)
