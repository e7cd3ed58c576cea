"""The host's side of egresses: bridges to the forwarders, and a table of routes for each mark.

What is made is this owner's: bridges carry its alias, rules and tables a number that is made of it
(`link_plan`). Nothing else is ever removed. A table ends with a route that refuses all, so that
packets of an egress never leave by the host's own routes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from templated.drivers.egress import ip
from templated.drivers.host.programs import run_here
from templated.drivers.network.links import disable_ipv6, forwards_ipv4
from templated.drivers.network.worker import Worker, enter_namespace
from templated.errors import Conflict, HostError
from templated.model.egress import MAX_EGRESSES, EgressSpec, LinkPlan, check_overlap, link_plan

T = TypeVar("T")
_PRIORITY = 20000
"""Of the rules: before the host's own table, after those that people write at the top."""
_PROTOCOL = 84
"""Marks rules and routes as ours (ip-route(8), `protocol`)."""
_INTERNET = "0.0.0.0/0"


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

    def plan(self, index: int) -> LinkPlan:
        """The plan of an egress that has this index."""
        return link_plan(self._links, index, self.owner)

    async def find(self, taken: Collection[int]) -> LinkPlan:
        """A plan that no egress has and that is free on this host. Conflict when there is none."""
        return await self._run(lambda: self._find(taken))

    async def check(self, spec: EgressSpec) -> None:
        """Whether the interface can be used, and where the egress leads is not the host's own.

        Raises HostError, InvalidRequest, Conflict.
        """
        await self._run(lambda: self._check(spec))

    async def make(self, plan: LinkPlan, spec: EgressSpec) -> None:
        """Make the way; what is there already stays, and what lacks is made again."""
        await self._run(lambda: self._make(plan, spec))

    async def remove(self, plan: LinkPlan) -> None:
        """Take a way away, as far as it is there."""
        await self._run(lambda: self._remove(plan))

    async def sweep(self, keep: Collection[int]) -> list[int]:
        """Remove this owner's ways but for these indexes; which they were."""
        return await self._run(lambda: self._sweep(keep))

    async def present(self, interface: str) -> bool:
        """Whether there is an interface of this name."""
        return await self._run(lambda: bool(_link(interface)))

    async def _run(self, call: Callable[[], T]) -> T:
        if self._worker is None:
            raise HostError("egresses are not open")
        return await self._worker.run(call)

    # In the worker's thread.

    def _find(self, taken: Collection[int]) -> LinkPlan:
        routes = _networks(ip.shown("route", "show", "table", "all"))
        marks = _marks()
        for index in range(1, MAX_EGRESSES + 1):
            if index in taken:
                continue
            plan = self.plan(index)
            free = not any(plan.network.overlaps(route) for route in routes)
            if free and plan.mark not in marks:
                return plan
        raise Conflict(f"all of {self._links} is in use", hint="set egress.links to another range")

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

    def _make(self, plan: LinkPlan, spec: EgressSpec) -> None:
        for name in (plan.inside, plan.sync):
            self._bridge(name)
        inside = plan.inside
        _sysctl(f"conf/{inside}/rp_filter", "0")  # what comes by it has addresses from elsewhere
        ip.apply(f"addr replace {plan.host}/{plan.network.prefixlen} dev {inside}")
        tail = f"table {plan.mark} proto {_PROTOCOL}"
        to = [_INTERNET] if spec.internet else [str(network) for network in spec.networks]
        ip.apply(
            f"route replace unreachable default metric 4278198272 {tail}",
            *(f"route replace {net} via {plan.shared} dev {inside} {tail}" for net in to),
        )
        if plan.mark not in _marks():
            rule = f"fwmark {plan.mark} table {plan.mark} priority {_PRIORITY} protocol {_PROTOCOL}"
            ip.apply(f"rule add {rule}")

    def _bridge(self, name: str) -> None:
        link = _link(name)
        if link and link.get("ifalias") != self.owner:
            raise Conflict(f"interface {name} is not this daemon's", hint=f"ip link show {name}")
        if not link:
            mac = (b"\x0a" + hashlib.sha256(f"{self.owner} {name}".encode()).digest()[:5]).hex(":")
            ip.apply(
                f"link add {name} address {mac} type bridge"
                " stp_state 0 forward_delay 0 mcast_snooping 0"
            )
            ip.apply(f"link set dev {name} alias {self.owner}")
        disable_ipv6(name)
        ip.apply(f"link set dev {name} up")

    def _remove(self, plan: LinkPlan) -> None:
        if plan.mark in _marks():
            ip.apply(f"rule del fwmark {plan.mark} table {plan.mark} protocol {_PROTOCOL}")
        ip.discard(f"route flush table {plan.mark}")
        for name in (plan.inside, plan.sync):
            link = _link(name)
            if link and link.get("ifalias") == self.owner:
                for port in (1, 2):
                    ip.discard(f"link del {name}.{port}")
                ip.discard(f"link del {name}")
        # The guards last: nothing reaches the forwarders any more, whose namespaces may still go.
        for table in _guards() & {plan.port(port) for port in (1, 2)}:
            run_here("nft", "delete", "table", "netdev", table, stdin="")

    def _sweep(self, keep: Collection[int]) -> list[int]:
        names = {link["ifname"] for link in ip.shown("link", "show")}
        marks, guards = _marks(), _guards()
        stale = []
        for index in range(1, MAX_EGRESSES + 1):
            plan = self.plan(index)
            found = {plan.inside, plan.sync} & names or plan.mark in marks
            found = found or guards & {plan.port(1), plan.port(2)}
            if found and index not in keep:
                self._remove(plan)
                stale.append(index)
        return stale


def _enter(netns: str) -> None:
    try:
        enter_namespace(netns)
    except OSError as error:
        raise HostError(f"cannot enter namespace {netns}: {error.strerror}") from error


def _marks() -> set[int]:
    return {int(rule["fwmark"], 0) for rule in ip.shown("rule", "show") if "fwmark" in rule}


def _guards() -> set[str]:
    """The names of all tables that guard interfaces; also those of others."""
    text = run_here("nft", "-j", "list", "tables", "netdev", stdin="")
    return {item["table"]["name"] for item in json.loads(text)["nftables"] if "table" in item}


def _link(name: str) -> dict[str, Any]:
    try:
        return ip.shown("-d", "addr", "show", "dev", name)[0]
    except (HostError, IndexError):
        return {}


def _networks(routes: list[dict[str, Any]]) -> list[IPv4Network]:
    found = [route["dst"] for route in routes if route.get("dst", "default") != "default"]
    return [IPv4Network(dst) for dst in found if ":" not in dst]


def _sysctl(name: str, value: str) -> None:
    (Path("/proc/sys/net/ipv4") / name).write_text(value)
