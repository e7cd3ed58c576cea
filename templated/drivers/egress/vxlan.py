"""The two hosts of an egress, and what joins their bridges: a VXLAN device (RFC 7348) in each.

The devices send to the one other host, and to nobody else. Who may send to them is a matter of
rules, since the kernel looks at no more than the number of a network: a table of the host's drops
what has one of these two numbers and does not come from the other host.

Packets of clones have the mark of their egress, which has done its work once they leave by the
bridge. The kernel would look for the way to the other host by it again, in the egress's own table,
which leads nowhere else: so the mark is taken away.
"""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Network

from templated.drivers.egress import ip
from templated.drivers.host.programs import run_here
from templated.drivers.network.links import disable_ipv6
from templated.errors import Conflict, HostError, InvalidRequest
from templated.model.egress import EgressHost, EgressSpec, LinkPlan

PORT = 14789
"""UDP; apart from 4789 and 8472, which networks of containers have on many hosts."""
OVERHEAD = 50
"""Bytes of the headers of IPv4, UDP, VXLAN and Ethernet around each frame."""
_USUAL = 1500
_NETWORKS = 0x740000
"""Numbers of networks begin here; each link has two."""


def check(spec: EgressSpec, clones: IPv4Network) -> None:
    """Whether this host is one of the egress's two. Raises InvalidRequest, HostError."""
    here = {
        address["local"]
        for link in ip.shown("-4", "addr", "show")
        for address in link.get("addr_info", ())
    }
    found = [one for one in spec.hosts if one.address in here]
    names = " and ".join(one.address for one in spec.hosts)
    if len(found) != 1:
        which = "none" if not found else "more than one"
        raise InvalidRequest(
            f"of the hosts {names}, {which} is this one", hint="see: ip -4 addr show"
        )
    if IPv4Network(found[0].clones) != clones:
        raise InvalidRequest(
            f"clones of host {found[0].address} are in {clones}, not {found[0].clones}",
            hint="as in network.subnet of that host's configuration",
        )


def ends(spec: EgressSpec, side: int) -> tuple[EgressHost, EgressHost]:
    """This host, and the other one."""
    return spec.hosts[side - 1], spec.hosts[2 - side]


def make(plan: LinkPlan, spec: EgressSpec, owner: str) -> None:
    """Join both bridges with those of the other host; what is there already stays."""
    here, peer = ends(spec, plan.side)
    run_here("nft", "-f", "-", stdin=rules(plan, here.address, peer.address, owner))
    mtu = _mtu(here.address, peer.address) - OVERHEAD
    for sync in (False, True):
        name, bridge = plan.tunnel(sync=sync), plan.sync if sync else plan.inside
        found = _aliases()
        if found.get(name, owner) != owner:
            raise Conflict(f"interface {name} is not this daemon's", hint=f"ip link show {name}")
        if name not in found:
            ip.make(
                f"link add {name} type vxlan id {_number(plan, sync=sync)} local {here.address}"
                f" remote {peer.address} dstport {PORT} nolearning",
                name,
                owner,
            )
        disable_ipv6(name)
        ip.apply(
            f"link set dev {name} mtu {mtu}",
            f"link set dev {name} addrgenmode none",
            f"link set dev {name} master {bridge}",
            f"link set dev {name} up",
        )


def remove(plan: LinkPlan, owner: str) -> None:
    """Take away the devices, as far as they are there; not the rules. Raises HostError."""
    found = _aliases()
    for name in (plan.tunnel(), plan.tunnel(sync=True)):
        if found.get(name) == owner:
            ip.discard(f"link del {name}")


def rules(plan: LinkPlan, here: str, peer: str, owner: str) -> str:
    """A script for `nft -f` that lets in what comes from the other host alone. Pure."""
    numbers = ", ".join(str(_number(plan, sync=sync)) for sync in (False, True))
    return f"""\
table ip {plan.tunnel()}
delete table ip {plan.tunnel()}
table ip {plan.tunnel()} {{
    comment "{owner}"
    counter other {{ }}
    chain input {{
        type filter hook input priority raw; policy accept;
        udp dport {PORT} @th,96,24 {{ {numbers} }} jump from
    }}
    chain from {{
        ip saddr {peer} ip daddr {here} accept
        counter name other drop
    }}
    chain postrouting {{
        type filter hook postrouting priority mangle; policy accept;
        oifname "{plan.inside}" meta mark set 0
    }}
}}
"""


def _number(plan: LinkPlan, *, sync: bool) -> int:
    """Of a VXLAN network: on both hosts the same."""
    return _NETWORKS + 2 * plan.index + sync


def _mtu(here: str, peer: str) -> int:
    """What leaves for the other host in one piece. It may not be reached yet: the host boots."""
    with suppress(HostError, LookupError):
        route = ip.shown("route", "get", peer, "from", here)[0]
        told = [int(one["mtu"]) for one in route.get("metrics", ()) if "mtu" in one]
        return min(told, default=int(ip.shown("link", "show", "dev", route["dev"])[0]["mtu"]))
    return _USUAL


def _aliases() -> dict[str, str]:
    return {link["ifname"]: link.get("ifalias", "") for link in ip.shown("link", "show")}
