"""The host's side of egresses: bridges to the forwarders, and a table of routes for each mark.

What is made is this owner's: bridges carry its alias, rules and tables a number that is made of it
(`link_plan`). Nothing else is ever removed. A table ends with a route that refuses all, so that
packets of an egress never leave by the host's own routes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from templated.drivers.egress import ip, rules, vxlan
from templated.drivers.host.programs import run_here
from templated.drivers.network.links import disable_ipv6, forwards_ipv4
from templated.drivers.network.worker import Worker, enter_namespace
from templated.errors import Conflict, HostError, host_errors
from templated.model.egress import (
    MAX_EGRESSES,
    MAX_LANES,
    SEATS,
    EgressSpec,
    LinkPlan,
    check_overlap,
    link_plan,
)
from templated.model.network import EXIT_MASK

T = TypeVar("T")
_PRIORITY = 20000
"""Of the rules: before the host's own table, after those that people write at the top."""
_PROTOCOL = 84
"""Marks rules and routes as ours (ip-route(8), `protocol`)."""
_INTERNET = "0.0.0.0/0"
_ALL = "0xffffffff"


class Ways:
    """Ways from the clones' bridge to forwarders, in the network namespace of the daemon's network.

    Each call runs in one thread, in order. All raise HostError when the host refuses.
    """

    def __init__(
        self, *, owner: str, clones: IPv4Network, links: IPv4Network, netns: str | None
    ) -> None:
        self.owner = owner
        self._clones = clones
        self._links = links
        self._netns = netns
        self._worker: Worker | None = None

    async def open(self) -> None:
        """Enter the namespace. May be called again."""
        if self._worker is None:
            self._worker = Worker("egress")
            if self._netns is not None:
                netns = self._netns
                await self._run(lambda: _enter(netns))

    async def close(self) -> None:
        """End the thread; all that was made stays."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()

    def plan(self, index: int, lane: int = 0, side: int = 1) -> LinkPlan:
        """The plan of a lane of the egress that has this index; of two hosts, on this side."""
        return link_plan(self._links, index, self.owner, lane, side)

    def seats(self, spec: EgressSpec) -> list[int]:
        """Which of each lane's forwarders are on this host, from 1."""
        return spec.seats(self._clones)

    async def find(self, taken: Collection[int], spec: EgressSpec) -> LinkPlan:
        """The first lane's plan of an egress, which nobody has on this host.

        Raises Conflict when there is none.
        """
        return await self._run(lambda: self._find(taken, spec))

    async def check(self, spec: EgressSpec) -> None:
        """Whether the interface can be used, and where the egress leads is not the host's own.

        Raises HostError, InvalidRequest, Conflict.
        """
        await self._run(lambda: self._check(spec))

    async def make(self, plan: LinkPlan, spec: EgressSpec) -> None:
        """Make the way; what is there already stays, and what lacks is made again."""
        await self._run(lambda: self._make(plan, spec))

    async def join(self, plan: LinkPlan, spec: EgressSpec) -> None:
        """Make again what lacks between two hosts, or is not as the way to the other one wants."""
        await self._run(lambda: vxlan.make(plan, spec, self.owner))

    async def spread(self, plan: LinkPlan, marks: Sequence[int]) -> None:
        """Give new flows to the lanes of these marks, in turn; `plan` is the first lane's."""
        script = rules.spreading(plan, marks, self.owner)
        await self._run(lambda: run_here("nft", "-f", "-", stdin=script))

    async def remove(self, plan: LinkPlan) -> None:
        """Take a way away, as far as it is there."""
        await self._run(lambda: self._remove(plan))

    async def sweep(self, keep: Collection[LinkPlan]) -> None:
        """Remove this owner's ways but for these."""
        await self._run(lambda: self._sweep(keep))

    async def present(self, interface: str) -> bool:
        """Whether there is an interface of this name."""
        return await self._run(lambda: bool(_link(interface)))

    async def _run(self, call: Callable[[], T]) -> T:
        if self._worker is None:
            raise HostError("egresses are not open")
        return await self._worker.run(call)

    # In the worker's thread.

    def _find(self, taken: Collection[int], spec: EgressSpec) -> LinkPlan:
        routes = _networks(ip.shown("route", "show", "table", "all"))
        marks = {rule.mark for rule in _rules()}
        for index in range(1, MAX_EGRESSES + 1) if spec.link is None else (spec.link,):
            if index in taken:
                continue
            try:
                plans = [self.plan(index, lane) for lane in range(spec.max)]
            except ValueError:
                break
            free = not any(p.network.overlaps(route) for route in routes for p in plans)
            if free and marks.isdisjoint(p.mark for p in plans):
                return plans[0]
        if spec.link is not None:
            raise Conflict(
                f"link {spec.link} of {self._links} is not free on this host",
                hint="choose another one, on both hosts",
            )
        raise Conflict(
            f"{self._links} has no room for another egress of {spec.max} lanes",
            hint="set egress.links to a larger range, or to another one",
        )

    def _check(self, spec: EgressSpec) -> None:
        name = spec.interface
        link = _link(name)
        if not link:
            raise HostError(f"there is no interface {name}", hint="see: ip link")
        if "UP" not in link["flags"]:
            raise HostError(f"interface {name} is down", hint=f"ip link set {name} up")
        if "LOOPBACK" in link["flags"] or link.get("link_type") != "ether":
            raise HostError(f"interface {name} is not an Ethernet one", hint="name another one")
        if link.get("master"):
            raise HostError(
                f"interface {name} is a port of {link['master']}", hint="name one of its own"
            )
        for address in link["addr_info"]:
            if address["scope"] != "link":
                raise HostError(
                    f"interface {name} has an address of the host, {address['local']}",
                    hint="take one that is the egress's alone, such as a VLAN",
                )
        if not forwards_ipv4():
            raise HostError(
                "egresses need a host that forwards IPv4", hint="sysctl -w net.ipv4.ip_forward=1"
            )
        own = [r for r in ip.shown("route", "show", "table", "main") if r.get("scope") == "link"]
        others = {f"the host's {r['dev']}": IPv4Network(r["dst"]) for r in own if "/" in r["dst"]}
        others |= {"the clones' subnet": self._clones, "the forwarders' links": self._links}
        check_overlap(spec, others)
        if spec.hosts:
            vxlan.check(spec, self._clones)

    def _make(self, plan: LinkPlan, spec: EgressSpec) -> None:
        for name in (plan.inside, plan.sync):
            self._bridge(name, plan.side)
        if spec.hosts:
            vxlan.make(plan, spec, self.owner)
        inside = plan.inside
        _sysctl(f"conf/{inside}/rp_filter", "0")  # what comes by it has addresses from elsewhere
        ip.apply(f"addr replace {plan.host}/{plan.network.prefixlen} dev {inside}")
        tail = f"table {plan.mark} proto {_PROTOCOL}"
        to = [_INTERNET] if spec.internet else [str(network) for network in spec.networks]
        ip.apply(
            f"route replace unreachable default metric 4278198272 {tail}",
            *(f"route replace {net} via {plan.shared} dev {inside} {tail}" for net in to),
        )
        mark, mask, priority = _rule(plan)
        found = {(rule.mark, rule.mask) for rule in _rules()}
        if (mark, mask) not in found:
            ip.apply(
                f"rule add fwmark {mark}/{mask:#x} table {mark} priority {priority}"
                f" protocol {_PROTOCOL}"
            )

    def _bridge(self, name: str, side: int) -> None:
        link = _link(name)
        if link and link.get("ifalias") != self.owner:
            raise Conflict(f"interface {name} is not this daemon's", hint=f"ip link show {name}")
        if not link:
            # Hosts made from one image may have the same owner.
            seed = f"{self.owner} {name} {side}".encode()
            mac = (b"\x0a" + hashlib.sha256(seed).digest()[:5]).hex(":")
            ip.make(
                f"link add {name} address {mac} type bridge"
                " stp_state 0 forward_delay 0 mcast_snooping 0",
                name,
                self.owner,
            )
        disable_ipv6(name)
        ip.apply(f"link set dev {name} up")

    def _remove(self, plan: LinkPlan) -> None:
        for rule in _rules():
            if rule.mark == plan.mark:
                ip.apply(
                    f"rule del fwmark {rule.mark}/{rule.mask:#x} table {rule.mark}"
                    f" priority {rule.priority}"
                )
        ip.discard(f"route flush table {plan.mark}")
        vxlan.remove(plan, self.owner)
        for name in (plan.inside, plan.sync):
            link = _link(name)
            if link and link.get("ifalias") == self.owner:
                for seat in range(1, SEATS + 1):
                    ip.discard(f"link del {name}.{seat}")
                ip.discard(f"link del {name}")
        # Tables last, for the guards: nothing reaches the forwarders any more, whose namespaces may
        # still go.
        for family, name in _tables() & _tables_of(plan):
            run_here("nft", "delete", "table", family, name, stdin="")

    def _sweep(self, keep: Collection[LinkPlan]) -> None:
        names = {link["ifname"] for link in ip.shown("link", "show")}
        marks, tables = {rule.mark for rule in _rules()}, _tables()
        for plan in self._plans():
            found = names & _links_of(plan) or plan.mark in marks
            if (found or tables & _tables_of(plan)) and plan not in keep:
                self._remove(plan)

    def _plans(self) -> Iterator[LinkPlan]:
        """All that there can be in this owner's range of links."""
        for lane in range(MAX_LANES):
            for index in range(1, MAX_EGRESSES + 1):
                with contextlib.suppress(ValueError):
                    yield self.plan(index, lane)


def _enter(netns: str) -> None:
    try:
        enter_namespace(netns)
    except OSError as error:
        raise HostError(f"cannot enter namespace {netns}: {error.strerror}") from error


class _Rule(NamedTuple):
    """One that has packets with this mark follow the table of the same number."""

    mark: int
    mask: int
    priority: int


def _rules() -> list[_Rule]:
    """All that go by a mark; also those of others."""
    found = [rule for rule in ip.shown("rule", "show") if "fwmark" in rule]
    return [
        _Rule(int(one["fwmark"], 0), int(one.get("fwmask", _ALL), 0), one["priority"])
        for one in found
    ]


def _rule(plan: LinkPlan) -> _Rule:
    """The one that has a lane's packets follow its table of routes.

    The first lane's comes after the others', and holds for what is left of a lane that has ended,
    too: nothing of an egress ever follows the host's own routes.
    """
    if plan.lane == 0:
        return _Rule(plan.mark, EXIT_MASK, _PRIORITY + 1)
    return _Rule(plan.mark, int(_ALL, 0), _PRIORITY)


def _tables() -> set[tuple[str, str]]:
    """Family and name of all tables of nft; also those of others."""
    found = json.loads(run_here("nft", "-j", "list", "tables", stdin=""))["nftables"]
    tables = [item["table"] for item in found if "table" in item]
    return {(table["family"], table["name"]) for table in tables}


def _tables_of(plan: LinkPlan) -> set[tuple[str, str]]:
    """What a lane may have: a guard for each forwarder, its steering, and more."""
    guards = {("netdev", plan.port(seat)) for seat in range(1, SEATS + 1)}
    spread, joined = ("ip", plan.inside), ("ip", plan.tunnel())
    return guards | {("netdev", rules.steering_table(plan)), spread, joined}


def _links_of(plan: LinkPlan) -> set[str]:
    """The bridges of a lane, and what joins them with those of another host."""
    return {plan.inside, plan.sync, plan.tunnel(), plan.tunnel(sync=True)}


def _link(name: str) -> dict[str, Any]:
    try:
        return ip.shown("-d", "addr", "show", "dev", name)[0]
    except (HostError, IndexError):
        return {}


def _networks(routes: list[dict[str, Any]]) -> list[IPv4Network]:
    found = [route["dst"] for route in routes if route.get("dst", "default") != "default"]
    return [IPv4Network(dst) for dst in found if ":" not in dst]


def _sysctl(name: str, value: str) -> None:
    with host_errors(f"cannot set net/ipv4/{name}"):
        (Path("/proc/sys/net/ipv4") / name).write_text(value)
