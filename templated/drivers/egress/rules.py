"""The nftables rules of a forwarder, and those of the host that go with it. Pure: text.

They are loaded before the forwarder has any interface but lo. While its namespace goes, though, the
kernel takes the rules away before the interfaces; `guard`, a table of the host's, holds what leaves
by the operator's interface to the fixed address then, too.

What leaves by `out` has the fixed address as its source, whatever else may go wrong: the hook
after source NAT checks each packet, and that the address is here (`fib saddr type local`). A
forwarder that has given it away sends nothing, without anybody having to tell it. `lingering` is
for a planned switch: the old one goes on with what is on its way, for a moment. Where a flow may
go is judged once, by its first packet: the policy is the same as long as the forwarder runs. Of two
hosts one may have another policy for a moment, and copies its flows here: there all are judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from templated.model.egress import NEVER, PORTS, ForwarderSpec, LinkPlan
from templated.model.network import EXIT_MASK

TABLE = "forwarder"
ARP_MARK = 1
"""Of the questions by which others find the fixed address: see `legs`."""
DROPS = ("source", "destination", "unasked", "other", "address", "standby", "local")
"""Why packets are dropped; each has a counter."""
GUARD = "guard"
"""One more reason, of the host's table."""
SYNC_PORT = 3780


def ruleset(spec: ForwarderSpec) -> str:
    """The whole script for `nft -f`; it replaces what an earlier one made."""
    egress = spec.egress
    to = ["0.0.0.0/0"] if egress.internet else [str(network) for network in egress.networks]
    never = [*map(str, NEVER), spec.links]
    first, last = egress.ports(spec.lane)
    judged = "ct state established counter name out accept"
    clamp = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
    clones = f"{{ {', '.join(spec.sources)} }}"
    counters = "".join(f"    counter {name} {{ }}\n" for name in counter_names())
    return f"""\
table ip {TABLE}
delete table ip {TABLE}
table ip {TABLE} {{
{counters}\
    set to {{ type ipv4_addr; flags interval; elements = {{ {", ".join(to)} }} }}
    set never {{ type ipv4_addr; flags interval; elements = {{ {", ".join(never)} }} }}
    set lingering {{ type ipv4_addr; flags timeout; }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        iifname "in" oifname "out" jump leave
        {clamp if egress.hosts else "# answers come by links that are as wide"}
        iifname "out" oifname "in" ct state established,related counter name in accept
        iifname "out" counter name drop_unasked drop
        counter name drop_other drop
    }}
    chain leave {{
        {"# what the other host let pass may be more" if egress.hosts else judged}
        {clamp}
        ip saddr != {clones} counter name drop_source drop
        ip daddr @never counter name drop_destination drop
        ip daddr {clones} counter name drop_destination drop
        ip daddr != @to counter name drop_destination drop
        ct state invalid counter name drop_other drop
        counter name out accept
    }}
    chain translate {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "out" meta l4proto tcp snat to {egress.fixed}:{first}-{last}
        oifname "out" meta l4proto udp snat to {egress.fixed}:{PORTS[0]}-{PORTS[1]}
        oifname "out" snat to {egress.fixed}
    }}
    chain leaving {{
        type filter hook postrouting priority srcnat + 10; policy accept;
        oifname != "out" accept
        ip saddr != {egress.fixed} counter name drop_address drop
        fib saddr type local accept
        ip saddr @lingering accept
        counter name drop_standby drop
    }}
    chain arrive {{
        type filter hook prerouting priority dstnat + 10; policy accept;
        ip daddr {egress.fixed} iifname "out" counter name drop_unasked drop
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "in" ip protocol vrrp ip saddr {spec.link} accept
        iifname "in" icmp type echo-request limit rate 20/second accept
        iifname "sync" udp dport {SYNC_PORT} accept
        iifname "out" counter name drop_unasked drop
        counter name drop_local drop
    }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "in" ip protocol {{ vrrp, icmp, igmp }} accept
        oifname "out" icmp type destination-unreachable icmp code frag-needed accept
        oifname "sync" accept
        counter name drop_local drop
    }}
}}
{_arp(egress.fixed)}"""


def _arp(fixed: str) -> str:
    return f"""\
table arp {TABLE}
delete table arp {TABLE}
table arp {TABLE} {{
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "out" meta mark set {ARP_MARK}
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "out" arp saddr ip != {{ 0.0.0.0, {fixed} }} drop
    }}
}}
"""


def guard_table(spec: ForwarderSpec) -> str:
    """The name of the table that `guard` makes."""
    return spec.plan.port(spec.seat)


def guard(spec: ForwarderSpec, mac: str) -> str:
    """What lets nothing of a forwarder, which has this MAC, leave under another address."""
    name, fixed = guard_table(spec), spec.egress.fixed
    senders = ["0.0.0.0"] if spec.lane else ["0.0.0.0", fixed]  # noqa: S104 - of a probe
    return f"""\
table netdev {name}
delete table netdev {name}
table netdev {name} {{
    comment "{spec.owner}"
    counter {GUARD} {{ }}
    chain leaving {{
        type filter hook egress device "{spec.egress.interface}" priority filter; policy accept;
        ip saddr {fixed} accept
        ether saddr != {mac} accept
        arp saddr ip {{ {", ".join(senders)} }} accept
        counter name {GUARD} drop
    }}
}}
"""


def unheard(spec: ForwarderSpec) -> str:
    """What keeps a forwarder of another lane than the first from telling that it has the address.

    It still asks for others' addresses, as one that has none yet (a probe of RFC 5227).
    """
    fixed = spec.egress.fixed
    return f"""\
table netdev {TABLE}
delete table netdev {TABLE}
table netdev {TABLE} {{
    chain leaving {{
        type filter hook egress device "out" priority filter; policy accept;
        arp operation reply drop
        arp saddr ip {fixed} arp daddr ip {fixed} drop
        arp saddr ip {fixed} arp saddr ip set 0.0.0.0
    }}
}}
"""


def steering_table(plan: LinkPlan) -> str:
    """The name of the table that `steering` makes: the lane's, whoever is active."""
    return plan.inside


def steering(spec: ForwarderSpec, mac: str) -> str:
    """What leads packets for the lane's ports to the forwarder that has this MAC.

    Also errors about them (ICMP), which quote the port that was sent from: it is behind 8 bytes of
    the error's own header, and the 20 of the packet's that it is about.
    """
    name, (first, last) = steering_table(spec.plan), spec.egress.ports(spec.lane)
    fixed, ports = spec.egress.fixed, f"{first}-{last}"
    about = "icmp type { destination-unreachable, time-exceeded, parameter-problem }"
    quoted = f"@th,136,8 6 @th,224,16 {first:#x}-{last:#x}"
    return f"""\
table netdev {name}
delete table netdev {name}
table netdev {name} {{
    comment "{spec.owner}"
    chain arriving {{
        type filter hook ingress device "{spec.egress.interface}" priority filter; policy accept;
        ip daddr {fixed} tcp dport {ports} ether daddr set {mac}
        ip daddr {fixed} {about} {quoted} ether daddr set {mac}
    }}
}}
"""


def spreading(plan: LinkPlan, marks: Sequence[int], owner: str) -> str:
    """What gives new TCP flows of an egress to its lanes, by these marks.

    By a hash: where the host has forgotten a flow, it finds its lane again, as long as these are
    the same.

    A flow keeps its lane, by its connection's mark, also when that takes no new ones any more.
    `plan` is the first lane's. All else than TCP stays with that: datagrams come in fragments,
    of which only the first one says its port.
    """
    turns = ", ".join(f"{turn} : {mark}" for turn, mark in enumerate(marks))
    new = "ct state new ct mark 0 meta l4proto tcp"
    flow = "ip saddr . tcp sport . ip daddr . tcp dport"
    return f"""\
table ip {plan.inside}
delete table ip {plan.inside}
table ip {plan.inside} {{
    comment "{owner}"
    chain spread {{
        type filter hook prerouting priority mangle + 1; policy accept;
        meta mark != {plan.mark} accept
        {new} ct mark set jhash {flow} mod {len(marks)} seed 1 map {{ {turns} }}
        ct mark & {EXIT_MASK:#x} == {plan.mark} meta mark set ct mark
    }}
}}
"""


def counter_names() -> list[str]:
    """The names of all counters."""
    return ["out", "in", *(f"drop_{reason}" for reason in DROPS)]


def linger(spec: ForwarderSpec, seconds: float) -> str:
    """Let packets leave for so long after the fixed address is gone."""
    element = f"{spec.egress.fixed} timeout {round(seconds * 1000)}ms"
    return f"add element ip {TABLE} lingering {{ {element} }}\n"


def linger_no_more(spec: ForwarderSpec) -> str:
    """Undo `linger` before its time."""
    return f"flush set ip {TABLE} lingering\n"
