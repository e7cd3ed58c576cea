"""The bridge itself: found or made, checked against the host's routes, and taken away."""

from __future__ import annotations

import hashlib
import logging

from templated.drivers.network.links import Link, Links, disable_ipv6, forwards_ipv4
from templated.errors import HostError
from templated.model.network import AddressPlan, BridgeNetwork

_log = logging.getLogger(__name__)
# 0.0.0.0/1 and 128.0.0.0/1 are how VPN clients write a default route.
_NEARLY_DEFAULT = 1


class Segment:
    """The bridge that a config describes. Methods run in the worker's thread. They raise OSError
    when the kernel refuses, HostError when the host does not fit the config."""

    def __init__(self, config: BridgeNetwork, plan: AddressPlan, alias: str) -> None:
        self._config = config
        self._plan = plan
        self._alias = alias

    def open(self, links: Links) -> Link:
        """The bridge, up. On failure, one made here is gone again."""
        found = links.find(self._config.bridge)
        if found is None and not self._config.create:
            raise HostError(
                f"there is no bridge {self._config.bridge}",
                hint="make it, or set create: true",
            )
        if found is not None and found.kind != "bridge":
            kind = found.kind or "another device"
            raise HostError(
                f"interface {found.name} is not a bridge but {kind}",
                hint="name another bridge",
            )
        self._check_routes(links, found)
        self._check_forwarding()
        if found is not None and found.alias != self._alias:
            self._check_foreign(links, found)
            return found
        return self._own(links, found)

    def remove(self, links: Links, bridge: Link) -> None:
        """Take away the bridge if it is this owner's and has no port left."""
        if bridge.alias != self._alias:
            return
        others = [link.name for link in links.ports(bridge.index)]
        if others:
            _log.warning("bridge %s stays, it has ports of others: %s", bridge.name, others)
            return
        links.delete(bridge.index)

    def _own(self, links: Links, found: Link | None) -> Link:
        """Make the bridge, or correct one that an earlier daemon of this owner made."""
        bridge = found or links.add_bridge(self._config.bridge, self._mac(), self._alias)
        try:
            disable_ipv6(bridge.name)
            if self._config.host_address:
                links.set_address(bridge.index, self._plan.gateway, self._plan.prefix)
            links.set_up(bridge.index)
        except BaseException:
            if found is None:
                links.delete(bridge.index)
            raise
        return bridge

    def _check_foreign(self, links: Links, bridge: Link) -> None:
        """Somebody else's bridge is used as it is, so it has to be right already."""
        if not bridge.up:
            raise HostError(f"bridge {bridge.name} is down", hint=f"ip link set {bridge.name} up")
        wanted = (self._plan.gateway, self._plan.prefix)
        if self._config.host_address and wanted not in links.addresses(bridge.index):
            text = f"{wanted[0]}/{wanted[1]}"
            raise HostError(
                f"bridge {bridge.name} was not made by this daemon and has no address {text}",
                hint=f"ip addr add {text} dev {bridge.name}, or set host_address: false",
            )

    def _check_routes(self, links: Links, bridge: Link | None) -> None:
        """The host's address brings a route for the whole subnet: it must not hide another."""
        if not self._config.host_address:
            return
        for route in links.routes():
            if bridge is not None and route.oif == bridge.index:
                continue
            if route.network.prefixlen <= _NEARLY_DEFAULT:
                continue
            if route.network.overlaps(self._plan.network):
                raise HostError(
                    f"subnet {self._plan.network} overlaps the host's route to {route.network}",
                    hint="choose another subnet; see: ip route show table all",
                )

    def _check_forwarding(self) -> None:
        """Routing concerns all of the host's interfaces, so it is not switched on from here."""
        if self._config.nat and not forwards_ipv4():
            raise HostError(
                "nat: true needs a host that forwards IPv4",
                hint="sysctl -w net.ipv4.ip_forward=1",
            )

    def _mac(self) -> str:
        return host_mac(0x0A, self._alias + self._config.bridge)


def host_mac(first: int, seed: str) -> str:
    """A MAC of the host's side: the same each time, and not in 02, where clones have theirs."""
    return (bytes([first]) + hashlib.sha256(seed.encode()).digest()[:5]).hex(":")
