"""The interfaces of a forwarder: `in` to the host, `out` to the networks outside, and `sync`.

`in` and `sync` are veth pairs whose other ends are ports of bridges of the host. `out` is a macvlan
child of the operator's interface, which stays where it is: several may have children of it, and
frames between these need not leave the host. All of them end with the forwarder's namespace.

While that goes, its rules go first (see `rules`). What comes by `out` would then be taken for the
forwarder's own, and be answered by a reset. So it is led to the clones, by rules of routing that
stay for as long as `out`, or nowhere; all that looks for the fixed address itself are questions of
ARP, which have a mark.

Where an egress has several lanes, only the first one's forwarders are heard of outside, so that the
fixed address has one MAC there. What comes for the ports of another lane is led to its active
forwarder as it comes in by the operator's interface, before that asks whose MAC it is (`steer`).
"""

from __future__ import annotations

import hashlib
import os

from templated.drivers.egress import ip, rules
from templated.drivers.egress.namespaces import inside
from templated.drivers.egress.programs import sync_address
from templated.drivers.host.programs import run_here
from templated.errors import HostError
from templated.model.egress import ForwarderSpec

_METRIC = 100
_REPLIES = 100
"""The table of what comes by `out`."""
_DUMMY = "192.0.0.8/32"
"""Of `out`, for itself alone (RFC 7600). The kernel takes away all routes of an interface whose
last address goes, and a forwarder that gives up the fixed one goes on with what is on its way."""


def make(spec: ForwarderSpec, host: int, own: int) -> None:
    """Make all legs, and set them up. `host` and `own` are descriptors of the two namespaces.

    The calling process is in its own one. Raises HostError; what is made by then ends with it.
    """
    make_out(spec, host, own)
    plan = spec.plan
    with inside(host):
        mtu = _mtu(plan.tunnel() if spec.egress.hosts else spec.egress.interface)
        for name, bridge, port in (
            ("in", spec.inside, plan.port(spec.seat)),
            ("sync", spec.sync, plan.port(spec.seat, sync=True)),
        ):
            ip.discard(f"link del {port}")  # one of a forwarder that ended a moment ago
            ip.apply(
                f"link add {port} mtu {mtu} type veth peer name {name}"
                f" address {mac(spec, name)} mtu {mtu} netns {_path(own)}",
                f"link set dev {port} alias {spec.owner}",
                f"link set dev {port} addrgenmode none",
                f"link set dev {port} master {bridge}",
                f"link set dev {port} up",
            )
    ip.apply(
        "rule add priority 3 table local",
        "rule del priority 0 table local",
        f"rule add priority 1 iif out fwmark {rules.ARP_MARK} table local",
        f"rule add priority 2 iif out table {_REPLIES}",
        f"route add blackhole default table {_REPLIES}",
        "link set dev lo up",
        f"addr add {plan.own(spec.seat)}/{plan.network.prefixlen} dev in",
        f"addr add {sync_address(spec.seat)}/28 dev sync",
        "link set dev sync up",
        "link set dev in up",
        *(
            f"route replace {net} via {host} dev in {table}"
            for net, host in spec.sources.items()
            for table in ("", f"table {_REPLIES}")
        ),
    )
    set_up_out(spec)


def make_out(spec: ForwarderSpec, host: int, own: int) -> None:
    """Make `out`, in its namespace. Raises HostError."""
    guard(spec, host)
    with inside(host):
        ip.apply(
            f"link add link {spec.egress.interface} name out address {mac(spec, 'out')}"
            f" netns {_path(own)} type macvlan mode bridge"
        )
    if spec.lane:
        run_here("nft", "-f", "-", stdin=rules.unheard(spec))


def guard(spec: ForwarderSpec, host: int) -> None:
    """Load the host's rules for what `out` sends. Raises HostError."""
    with inside(host):
        run_here("nft", "-f", "-", stdin=rules.guard(spec, mac(spec, "out")))


def steer(spec: ForwarderSpec, host: int) -> None:
    """Have what comes for the lane's ports come to this forwarder. Raises HostError."""
    if spec.lane:
        with inside(host):
            run_here("nft", "-f", "-", stdin=rules.steering(spec, mac(spec, "out")))


def set_up_out(spec: ForwarderSpec) -> None:
    """Set `out` up, with its routes; also again, after it was down."""
    egress = spec.egress
    via = f"via {egress.gateway} dev out metric {_METRIC}"
    ip.apply(
        "link set dev out up",
        f"addr replace {_DUMMY} dev out scope host",
        f"route replace {egress.outside} dev out metric {_METRIC}",
        *(f"route replace {net} {via}" for net in egress.networks if net != egress.outside),
        *([f"route replace default {via}"] if egress.internet else []),
    )


def give_up_addresses(spec: ForwarderSpec) -> None:
    """Take away what makes a forwarder the active one, however it got it."""
    plan = spec.plan
    ip.discard(
        f"addr del {spec.egress.address} dev out",
        f"addr del {plan.shared}/{plan.network.prefixlen} dev in",
    )


def take_addresses(spec: ForwarderSpec) -> None:
    """Make this the active forwarder, where there is no other that could be."""
    plan = spec.plan
    ip.apply(
        f"addr replace {plan.shared}/{plan.network.prefixlen} dev in",
        f"addr replace {spec.egress.address} dev out",
    )


def without_carrier() -> str:
    """Which legs cannot be used at present, for an error; empty: all can."""
    flags = {link["ifname"]: link["flags"] for link in ip.shown("link", "show")}
    lost = [name for name in ("in", "out") if name not in flags or "LOWER_UP" not in flags[name]]
    return " and ".join(lost)


def mac(spec: ForwarderSpec, leg: str) -> str:
    """The address of a leg: the same whenever the forwarder is made again."""
    seed = f"{spec.owner} {spec.label} {leg}".encode()
    return (b"\x0e" + hashlib.sha256(seed).digest()[:5]).hex(":")


def _mtu(interface: str) -> int:
    try:
        return int(ip.shown("link", "show", "dev", interface)[0]["mtu"])
    except (IndexError, KeyError):
        raise HostError(f"there is no interface {interface}") from None


def _path(namespace: int) -> str:
    # Of this process, since `ip` does not inherit the descriptor.
    return f"/proc/{os.readlink('/proc/self')}/fd/{namespace}"
