"""The nftables rules of a forwarder. Pure: text from a spec.

They are loaded before the forwarder has any interface but lo. While its namespace goes, though, the
kernel takes the rules away before the interfaces; `guard`, a table of the host's, holds what leaves
by the operator's interface to the fixed address then, too.

What leaves by `out` has the fixed address as its source, whatever else may go wrong: the hook
after source NAT checks each packet, and that the address is here (`fib saddr type local`). A
forwarder that has given it away sends nothing, without anybody having to tell it. `lingering` is
for a planned switch: the old one goes on with what is on its way, for a moment.
"""

from __future__ import annotations

from templated.model.egress import NEVER, PORTS, ForwarderSpec

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
        iifname "out" oifname "in" ct state established,related counter name in accept
        iifname "out" counter name drop_unasked drop
        counter name drop_other drop
    }}
    chain leave {{
        ip saddr != {spec.clones} counter name drop_source drop
        ip daddr @never counter name drop_destination drop
        ip daddr {spec.clones} counter name drop_destination drop
        ip daddr != @to counter name drop_destination drop
        ct state invalid counter name drop_other drop
        tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
        counter name out accept
    }}
    chain translate {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "out" meta l4proto {{ tcp, udp }} snat to {egress.fixed}:{PORTS[0]}-{PORTS[1]}
        oifname "out" snat to {egress.fixed}
    }}
    chain leaving {{
        type filter hook postrouting priority srcnat + 10; policy accept;
        oifname "out" ip saddr != {egress.fixed} counter name drop_address drop
        oifname "out" ip saddr @lingering accept
        oifname "out" fib saddr type != local counter name drop_standby drop
    }}
    chain arrive {{
        type filter hook prerouting priority dstnat + 10; policy accept;
        iifname "out" ip daddr {egress.fixed} counter name drop_unasked drop
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
        oifname "sync" accept
        counter name drop_local drop
    }}
}}
table arp {TABLE}
delete table arp {TABLE}
table arp {TABLE} {{
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "out" meta mark set {ARP_MARK}
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "out" arp saddr ip != {{ 0.0.0.0, {egress.fixed} }} drop
    }}
}}
"""


def guard_table(spec: ForwarderSpec) -> str:
    """The name of the table that `guard` makes."""
    return spec.plan.port(spec.number)


def guard(spec: ForwarderSpec, mac: str) -> str:
    """What lets nothing of a forwarder, which has this MAC, leave under another address."""
    name, fixed = guard_table(spec), spec.egress.fixed
    return f"""\
table netdev {name}
delete table netdev {name}
table netdev {name} {{
    comment "{spec.owner}"
    counter {GUARD} {{ }}
    chain leaving {{
        type filter hook egress device "{spec.egress.interface}" priority filter; policy accept;
        ether saddr != {mac} accept
        ip saddr {fixed} accept
        arp saddr ip {{ 0.0.0.0, {fixed} }} accept
        counter name {GUARD} drop
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
