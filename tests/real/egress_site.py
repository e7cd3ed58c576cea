"""Two hosts for tests of egresses: both have an interface in one VPC, and a network between them.

What connects them is a namespace with two bridges, where either network is cut.
"""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from templated.bench.netrig import LENGTH, SERVER, Net
from templated.drivers.egress.host import Ways
from templated.model.egress import EgressHost, EgressSpec
from tests.real.egress_parts import end
from tests.real.egress_rig import LINKS, Rig

LINK = 200
HOSTS = (
    EgressHost(address="10.9.0.1", clones="10.78.0.0/16"),
    EgressHost(address="10.9.0.2", clones="10.79.0.0/16"),
)


class Host(Rig):
    """One of the two. It shares the VPC with the other one."""

    def __init__(self, site: Site, side: int, directory: Path) -> None:
        self.tag = f"{site.vpc.name}-{side}"
        self.side = side
        self.directory = directory / "forwarders"
        self.vpc = site.vpc
        self._site = site
        self._nets = []
        self.host, self.clone = map(self.net, ("host", "clone"))
        self.host.sysctl("ipv4/ip_forward", "1")
        site.plug(self.host, "vpc0", f"vpc{side}", "vpc")
        site.plug(self.host, "under0", f"under{side}", "under")
        self.host.ip("addr", "add", f"{HOSTS[side - 1].address}/24", "dev", "under0")
        self.clones = IPv4Network(HOSTS[side - 1].clones)
        self.host.ip("link", "add", "templated0", "type", "bridge")
        self.host.ip("addr", "add", f"{self.clones[1]}/16", "dev", "templated0")
        self.host.ip("link", "set", "templated0", "up")
        self.join(self.clone, "tpclone", "eth0", f"{self.clones[200]}/16")
        self.host.ip("link", "set", "tpclone", "master", "templated0")
        self.clone.ip("route", "replace", "default", "via", str(self.clones[1]))
        self.ways = Ways(
            owner=f"templated:{site.owner or self.tag}",
            clones=self.clones,
            links=LINKS,
            netns=self.host.name,
        )

    def spec(self, **fields: Any) -> EgressSpec:
        """The same on both."""
        return super().spec(**({"hosts": HOSTS, "link": LINK} | fields))

    def cut(self, *links: str, state: str = "down") -> None:
        """Its links to the others, `vpc` and `under`."""
        for link in links:
            self._site.switch.ip("link", "set", f"{link}{self.side}", state)


class Site:
    """Both hosts, the VPC with its server, and what connects them. `close` removes all.

    `owner`: of both daemons, as on hosts that were made from one image.
    """

    def __init__(self, tag: str, directory: Path, owner: str = "") -> None:
        self.owner = owner
        self._nets: list[Net] = []
        self.hosts: list[Host] = []
        try:
            self.vpc, self.switch = self._net(f"{tag}-vpc"), self._net(f"{tag}-switch")
            for bridge in ("vpc", "under"):
                self.switch.ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
                self.switch.ip("link", "set", bridge, "up")
            self.plug(self.vpc, "eth0", "server", "vpc")
            self.vpc.ip("addr", "add", f"{SERVER}/{LENGTH}", "dev", "eth0")
            for side in (1, 2):
                self.hosts.append(Host(self, side, directory / f"host{side}"))
        except BaseException:
            self.close()
            raise

    def _net(self, name: str) -> Net:
        made = Net(name)
        self._nets.append(made)
        return made

    def plug(self, net: Net, name: str, port: str, bridge: str) -> None:
        """Connect an interface of this name with a port of one of the two bridges."""
        net.ip("link", "add", name, "type", "veth", "peer", port, "netns", self.switch.name)
        self.switch.ip("link", "set", port, "master", bridge)
        self.switch.ip("link", "set", port, "up")
        net.ip("link", "set", name, "up")

    def close(self) -> None:
        """End all forwarders, and remove all namespaces. Raises nothing."""
        for host in self.hosts:
            with suppress(OSError):
                end(host)
            host.close()
        while self._nets:
            self._nets.pop().close()
