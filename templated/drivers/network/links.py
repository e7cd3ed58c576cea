"""Interfaces, addresses and routes by netlink: the only module that knows pyroute2.

The synchronous API, for one thread. Every method raises OSError with the kernel's errno.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from templated import failpoints
from templated.drivers.network.base import Way

_IFF_UP = 1
_DUMPS = 10
# ::1 as /proc/net/tcp6 has it; 127.0.0.0/8 ends in 7F there, as words are little-endian.
_LOOPBACK = ("00000000000000000000000001000000",)
_RTN_LOCAL = 2  # linux/rtnetlink.h
# No route; a route that says so: unreachable, blackhole, prohibit.
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface, as far as this project needs to know it."""

    index: int
    name: str
    kind: str
    alias: str
    mtu: int
    up: bool
    master: int


class Route(NamedTuple):
    """A route of the kernel, as far as overlap with our subnet is concerned."""

    network: ipaddress.IPv4Network
    oif: int


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


class Links:
    """A netlink socket in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        if failpoints.armed:
            failpoints.hit("network.open")
        self._ipr: Any = IPRoute()

    def close(self) -> None:
        self._ipr.close()

    def find(self, name: str) -> Link | None:
        if failpoints.armed:
            failpoints.hit("network.find")
        try:
            return _link(self._ipr.link("get", ifname=name)[0])
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise OSError(error.code, os.strerror(error.code)) from error

    def all(self) -> list[Link]:
        if failpoints.armed:
            failpoints.hit("network.list")
        return [_link(message) for message in _dump(lambda: self._ipr.link("dump"))]

    def ports(self, bridge: int) -> list[Link]:
        return [link for link in self.all() if link.master == bridge]

    def add_bridge(self, name: str, mac: str, alias: str) -> Link:
        """A bridge that is down. A fixed MAC, since it would change as ports come and go.

        STP and snooping only cost: there are no loops and no multicast. The alias is a second
        request, the kernel does not take it in the first.
        """
        with _os_errors():
            self._ipr.link(
                "add",
                ifname=name,
                kind="bridge",
                address=mac,
                br_stp_state=0,
                br_forward_delay=0,
                br_mcast_snooping=0,
            )
            index = self._ipr.link("get", ifname=name)[0]["index"]
            if failpoints.armed:
                failpoints.hit("network.bridge")
            self._ipr.link("set", index=index, ifalias=alias)
            return _link(self._ipr.link("get", index=index)[0])

    def label(self, index: int, *, alias: str, mac: str, mtu: int) -> None:
        if failpoints.armed:
            failpoints.hit("network.label")
        with _os_errors():
            self._ipr.link("set", index=index, ifalias=alias, address=mac, mtu=mtu)

    def enslave(self, index: int, master: int, *, isolated: bool) -> None:
        if failpoints.armed:
            failpoints.hit("network.enslave")
        with _os_errors():
            self._ipr.link("set", index=index, master=master)
            self._ipr.brport("set", index=index, isolated=int(isolated))

    def isolate(self, index: int, *, isolated: bool) -> None:
        """Say whether a bridge's port reaches other isolated ones."""
        with _os_errors():
            self._ipr.brport("set", index=index, isolated=int(isolated))

    def way(self, address: str, mark: int) -> Way:
        """Where the kernel routes a packet to this address that has a firewall mark."""
        marked = {"mark": mark} if mark else {}
        try:
            message = next(iter(self._ipr.route("get", dst=address, **marked)))
        except NetlinkError as error:
            if error.code in _NO_WAY:
                return Way(local=False, ifname="")
            raise OSError(error.code, os.strerror(error.code)) from error
        if message["type"] == _RTN_LOCAL:
            return Way(local=True, ifname="")
        link = self._ipr.link("get", index=message.get_attr("RTA_OIF"))[0]
        return Way(local=False, ifname=str(link.get_attr("IFLA_IFNAME")))

    def set_up(self, index: int) -> None:
        if failpoints.armed:
            failpoints.hit("network.up")
        with _os_errors():
            self._ipr.link("set", index=index, state="up")

    def delete(self, index: int) -> None:
        """No error when it is gone already."""
        if failpoints.armed:
            failpoints.hit("network.delete")
        try:
            self._ipr.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise OSError(error.code, os.strerror(error.code)) from error

    def addresses(self, index: int) -> set[tuple[str, int]]:
        """IPv4 addresses and prefix lengths of one interface."""
        messages = _dump(lambda: self._ipr.addr("dump", family=socket.AF_INET))
        return {
            (str(message.get_attr("IFA_LOCAL")), int(message["prefixlen"]))
            for message in messages
            if message["index"] == index
        }

    def own_addresses(self) -> frozenset[ipaddress.IPv4Address]:
        """The IPv4 addresses of all interfaces."""
        messages = _dump(lambda: self._ipr.addr("dump", family=socket.AF_INET))
        return frozenset(
            ipaddress.IPv4Address(message.get_attr("IFA_LOCAL")) for message in messages
        )

    def set_address(self, index: int, address: str, prefix: int) -> None:
        """Make this the only IPv4 address of the interface."""
        present = self.addresses(index)
        with _os_errors():
            if (address, prefix) not in present:
                self._ipr.addr("add", index=index, address=address, prefixlen=prefix)
            for other, length in present - {(address, prefix)}:
                self._ipr.addr("del", index=index, address=other, prefixlen=length)

    def routes(self) -> list[Route]:
        """IPv4 routes of all tables, but for default routes."""
        messages = _dump(lambda: self._ipr.route("dump", family=socket.AF_INET))
        return [
            Route(
                ipaddress.IPv4Network((message.get_attr("RTA_DST"), message["dst_len"])),
                message.get_attr("RTA_OIF") or 0,
            )
            for message in messages
            if message["dst_len"]
        ]


def disable_ipv6(name: str) -> None:
    """Give the interface no IPv6, or a clone could set up the host by router advertisements.

    Does nothing in a kernel without IPv6; raises OSError when /proc/sys is read-only.
    """
    path = Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6"
    if path.exists():
        path.write_text("1")


def forwards_ipv4() -> bool:
    """Whether the host routes between its interfaces."""
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"


def listening() -> frozenset[tuple[str, int]]:
    """Protocols and ports that programs listen to, in the calling thread's namespace.

    From /proc/net/tcp and the like (proc(5)), but for sockets on loopback alone: what is
    published leaves those alone. Raises OSError.
    """
    found = set()
    for protocol, state in (("tcp", "0A"), ("udp", "07")):
        for name in (protocol, f"{protocol}6"):
            path = Path("/proc/thread-self/net") / name
            for line in path.read_text().splitlines()[1:] if path.exists() else ():
                _, local, _, now, *_ = line.split()
                address, _, port = local.partition(":")
                if now == state and address not in _LOOPBACK and address[-2:] != "7F":
                    found.add((protocol, int(port, 16)))
    return frozenset(found)


def _dump(request: Callable[[], Iterable[Any]]) -> list[Any]:
    """All answers. A table that changed under the dump makes it incomplete: ask again."""
    for _ in range(_DUMPS):
        with _os_errors():
            try:
                return list(request())
            except NetlinkDumpInterrupted:
                continue
    raise OSError(errno.EAGAIN, "the kernel's tables kept changing while they were read")


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & _IFF_UP),
        master=message.get_attr("IFLA_MASTER") or 0,
    )
