"""Clones on a bridge of the host, each by a tap of its own.

An interface is this owner's when its alias (`ip link set alias`) is "templated:" and the owner.
The alias is in the kernel, so it outlives the daemon. An interface without it is never removed,
and a bridge without it is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Mapping, Sequence

from templated.drivers.network import tap
from templated.drivers.network.base import (
    Counted,
    HostFacts,
    Port,
    PortOwner,
    Way,
    check_tag,
    host_errors,
)
from templated.drivers.network.links import Link, Links, disable_ipv6, forwards_ipv4, listening
from templated.drivers.network.policing import Held, Policing
from templated.drivers.network.segment import Segment, host_mac
from templated.drivers.network.worker import Worker, enter_namespace
from templated.errors import Conflict, HostError, InvalidRequest
from templated.model.network import AddressPlan, BridgeNetwork, Exit, Forward, Tap
from templated.model.policy import NONE, Policy

_PREFIX = "tp"
_OWNER = re.compile(r"[A-Za-z0-9-]{1,64}")


class TapNetwork:
    """Taps on one bridge, see `templated.drivers.network.base.Network`.

    All state is used by the worker's thread only, but for `attach`, which reads a port.
    """

    def __init__(self, config: BridgeNetwork, plan: AddressPlan, owner: str) -> None:
        """Raises ValueError when `owner` is not 1 to 64 letters, digits and dashes."""
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"bad owner {owner!r}")
        self._config = config
        self._plan = plan
        self._alias = f"templated:{owner}"
        self._segment = Segment(config, plan, self._alias)
        self._worker: Worker | None = None
        self._mover: Worker | None = None
        """A thread for what a start waits for, which no other call holds up."""
        self._links: Links | None = None
        self._bridge: Link | None = None
        self._ports: dict[str, Port] = {}
        self._policing = Policing(config, plan)

    @property
    def created(self) -> bool:
        """Whether the bridge is this owner's, made now or by a daemon before this one."""
        return self._bridge is not None and self._bridge.alias == self._alias

    @property
    def stalled(self) -> float:
        return max((w.stalled for w in (self._worker, self._mover) if w is not None), default=0.0)

    @property
    def exits(self) -> tuple[Exit, ...]:
        return self._policing.exits

    async def open(self, ports: Mapping[str, PortOwner] | None = None) -> None:
        if self._worker is not None:
            return
        self._worker, self._mover = Worker("templated-net"), Worker("templated-net-move")
        there = {
            _PREFIX + tag: Held(port.index, port.groups) for tag, port in (ports or {}).items()
        }
        try:
            await self._worker.run(lambda: self._open(there, sweep=ports is not None))
            await self._mover.run(self._enter)
        except BaseException:
            await self.close(remove=False)
            raise

    async def make_port(
        self, tag: str, index: int | None = None, groups: tuple[str, ...] = ()
    ) -> Port:
        check_tag(tag)
        if index is not None:
            self._plan.ip(index)
        elif self._config.antispoof or any(one in self._policing.policies for one in groups):
            raise InvalidRequest("a guarded port is made for one address", hint="pass index")
        return await self._running().run(lambda: self._make_port(tag, index, groups))

    async def move_port(self, tag: str, groups: tuple[str, ...]) -> None:
        check_tag(tag)
        if self._mover is None:
            raise HostError("the network is not open")
        if self._policing.rename(_PREFIX + tag, groups):
            return
        await self._mover.run(lambda: self._move_port(_PREFIX + tag, groups))

    async def drop_port(self, tag: str) -> None:
        check_tag(tag)
        await self._running().run(lambda: self._drop_ports([tag]))

    async def sweep(self, keep: set[str]) -> list[str]:
        kept = frozenset(keep)
        return await self._running().run(lambda: self._sweep(kept))

    async def set_policies(self, changes: Mapping[str, Policy | None]) -> None:
        wanted = dict(changes)
        await self._in_turn(lambda: self._set_policies(wanted))

    async def set_exits(self, exits: Sequence[Exit]) -> None:
        await self._in_turn(lambda: self._policing.set_exits(exits))

    async def publish(self, ports: Mapping[tuple[str, int], tuple[str, int]]) -> None:
        wanted = dict(ports)
        await self._in_turn(lambda: self._policing.publish(wanted))

    async def counters(self) -> dict[str, dict[str, Counted]]:
        return await self._running().run(self._policing.counters)

    async def host(self) -> HostFacts:
        if self._worker is None:
            return HostFacts(frozenset(), frozenset())
        return await self._worker.run(self._host)

    async def way(self, address: str, mark: int = 0) -> Way:
        return await self._running().run(lambda: self._way(address, mark))

    async def _in_turn(self, change: Callable[[], None]) -> None:
        """In the worker's thread once there is one; before, nothing else uses the state."""
        if self._worker is None:
            change()
        else:
            await self._worker.run(change)

    async def close(self, *, remove: bool) -> None:
        worker = self._worker
        if worker is None:
            return
        try:
            await worker.run(lambda: self._close(remove))
        finally:
            mover, self._worker, self._mover = self._mover, None, None
            await worker.stop()
            if mover is not None:
                await mover.stop()

    def attach(self, port: Port, index: int, forwards: Sequence[Forward] = ()) -> Tap:
        if forwards:
            raise InvalidRequest(
                "a bridge forwards no ports",
                hint=f"reach the clone at {self._plan.ip(index)}",
            )
        if port.fd is None:
            raise InvalidRequest(f"port {port.tag} has been handed over already")
        if port.index not in (None, index):
            raise InvalidRequest(f"port {port.tag} was made for index {port.index}, not {index}")
        self._plan.ip(index)
        return Tap(port.fd)

    def _running(self) -> Worker:
        if self._worker is None:
            raise HostError("the network is not open")
        return self._worker

    # From here on in the worker's thread.

    def _enter(self) -> None:
        if self._config.netns is None:
            return
        try:
            enter_namespace(self._config.netns)
        except FileNotFoundError:
            raise HostError(
                f"there is no network namespace {self._config.netns}",
                hint=f"ip netns add {self._config.netns}",
            ) from None
        except OSError as error:
            reason = f"cannot enter namespace {self._config.netns}: {error.strerror}"
            raise HostError(reason, hint="run the daemon as root") from error

    def _open(self, ports: Mapping[str, Held], *, sweep: bool) -> None:
        self._enter()
        with host_errors("make tap devices", missing="modprobe tun"):
            tap.probe()
        with host_errors("set up the bridge", missing="modprobe bridge"):
            self._links = Links()
            found = self._links.find(self._config.bridge)
            self._bridge = self._segment.open(self._links)
        try:
            if sweep:
                # While the rules of the daemon before still hold: none are left open meanwhile.
                self._sweep(frozenset(name.removeprefix(_PREFIX) for name in ports))
            self._policing.open(ports)
        except BaseException:
            if found is None:
                self._links.delete(self._bridge.index)
            raise

    def _opened(self) -> tuple[Links, Link]:
        if self._links is None or self._bridge is None:
            raise HostError("the network is not open")
        return self._links, self._bridge

    def _make_port(self, tag: str, index: int | None, groups: tuple[str, ...]) -> Port:
        links, bridge = self._opened()
        if tag in self._ports:
            raise Conflict(f"port {tag} is there already")
        name = _PREFIX + tag
        with host_errors(f"make tap {name}"):
            port = Port(tag, ifname=name, fd=self._tap(links, name), index=index)
            try:
                self._connect(links, bridge, port, groups)
            except BaseException:
                port.close()
                self._policing.leave(name)
                raise
        self._ports[tag] = port
        return port

    def _tap(self, links: Links, name: str) -> int:
        """A new tap, or one that a daemon before this one left and nobody uses."""
        try:
            return tap.open_tap(name, new=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        link = links.find(name)
        if link is not None and (link.alias != self._alias or link.kind != "tun"):
            raise Conflict(
                f"interface {name} is not this daemon's",
                hint=f"see: ip -d link show {name}",
            )
        try:
            return tap.open_tap(name, new=False)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise Conflict(f"tap {name} is in use by a running process") from None

    def _connect(self, links: Links, bridge: Link, port: Port, groups: tuple[str, ...]) -> None:
        """Alias first, persistence last: a tap that outlives its fd always names its owner.

        Rules and isolation come before the interface is up: no frame passes without them.
        """
        link = links.find(port.ifname)
        if link is None or port.fd is None:
            raise OSError(errno.ENODEV, "the tap went away")
        mac = host_mac(6, self._alias + port.ifname)
        links.label(link.index, alias=self._alias, mac=mac, mtu=bridge.mtu)
        disable_ipv6(port.ifname)
        if port.index is not None:
            self._policing.join(port.ifname, port.index, groups)
        links.enslave(link.index, bridge.index, isolated=self._isolated(port.ifname))
        links.set_up(link.index)
        tap.persist(port.fd)

    def _drop_ports(self, tags: Sequence[str]) -> None:
        links, _ = self._opened()
        for tag in tags:
            port = self._ports.pop(tag, None)
            if port is not None:
                port.close()
            with host_errors(f"remove tap {_PREFIX}{tag}"):
                link = links.find(_PREFIX + tag)
                if link is not None and link.alias == self._alias:
                    links.delete(link.index)
            self._policing.leave(_PREFIX + tag)

    def _isolated(self, ifname: str) -> bool:
        """Where a policy says who the peers are, its rules keep the others out, and count them."""
        return self._config.isolate and self._policing.policy(ifname) is None

    def _move_port(self, ifname: str, groups: tuple[str, ...]) -> None:
        had = self._policing.policy(ifname)
        self._policing.move(ifname, groups)
        now = self._policing.policy(ifname)
        # The kernel's own isolation, of a port that had no policy, is left where it does no harm:
        # to change it takes a lock that others hold for long.
        if had is None and now is not None and now.peers and self._config.isolate:
            with contextlib.closing(Links()) as links:
                self._isolate(links, [ifname])

    def _set_policies(self, changes: Mapping[str, Policy | None]) -> None:
        routed = (p is not None and (p.egress != NONE or p.publish) for p in changes.values())
        if self._bridge is not None and any(routed):
            with host_errors("read what the host forwards"):
                if not forwards_ipv4():
                    raise HostError(
                        "network.egress and network.publish need a host that forwards IPv4",
                        hint="sysctl -w net.ipv4.ip_forward=1",
                    )
        if self._links is None:
            self._policing.set_policies(changes)
            return
        freed = self._policing.freed(changes)
        try:
            # Before their rules go: nothing passes between ports that have neither.
            self._isolate(self._links, freed, as_all=True)
            turned = self._policing.set_policies(changes)
        except HostError:
            self._isolate(self._links, freed)
            raise
        self._isolate(self._links, turned)

    def _isolate(self, links: Links, names: Sequence[str], *, as_all: bool = False) -> None:
        with host_errors("isolate ports"):
            for name in names:
                if (link := links.find(name)) is not None:
                    isolated = self._config.isolate if as_all else self._isolated(name)
                    links.isolate(link.index, isolated=isolated)

    def _host(self) -> HostFacts:
        links, _ = self._opened()
        with host_errors("read what the host's addresses and ports are"):
            return HostFacts(links.own_addresses(), listening())

    def _way(self, address: str, mark: int) -> Way:
        links, _ = self._opened()
        with host_errors(f"find the route to {address}"):
            return links.way(address, mark)

    def _sweep(self, keep: frozenset[str]) -> list[str]:
        links, _ = self._opened()
        with host_errors("list interfaces"):
            mine = [x for x in links.all() if x.alias == self._alias and x.kind == "tun"]
        tags = {x.name.removeprefix(_PREFIX) for x in mine if x.name.startswith(_PREFIX)}
        stale = sorted(tags - keep)
        self._drop_ports(stale)
        return stale

    def _close(self, remove: bool) -> None:
        try:
            if remove and self._links is not None and self._bridge is not None:
                self._sweep(frozenset())
                self._policing.close(remove=True)
                with host_errors("remove the bridge"):
                    self._segment.remove(self._links, self._bridge)
        finally:
            for port in self._ports.values():
                port.close()
            self._ports.clear()
            self._policing.close(remove=False)
            if self._links is not None:
                self._links.close()
            self._links = self._bridge = None
