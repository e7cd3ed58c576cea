"""Which rules hold on a bridge: the state that `nft` is told, change by change.

What is known here is the truth: when the kernel has something else, because somebody has flushed
or deleted our tables, the next change makes them anew as a whole. Tables of others are never read.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence

from templated.drivers.network import nft
from templated.drivers.network.base import Counted
from templated.drivers.network.nft import GUARD, Member
from templated.errors import HostError
from templated.model.network import AddressPlan, BridgeNetwork, Exit
from templated.model.policy import Policy

_log = logging.getLogger(__name__)


class Policing:
    """The tables of one bridge. Methods run in the worker's thread.

    Those that change something raise HostError, with nothing changed here or in the kernel.
    """

    def __init__(self, config: BridgeNetwork, plan: AddressPlan) -> None:
        self._guards = config.antispoof
        self._segment = nft.Segment(config.bridge, str(plan.network), plan.gateway, config.nat)
        self._plan = plan
        self.policies: dict[str, Policy] = {}
        self.exits: tuple[Exit, ...] = ()
        self._published: dict[tuple[str, int], tuple[str, int]] = {}
        self._ports: dict[str, tuple[int, str]] = {}
        """By interface: the clone's index, and the group that it is asked to be in."""
        self._open = False

    @property
    def needed(self) -> bool:
        """Whether there is anything to hold clones to; without, nft need not be installed."""
        return self._guards or self._segment.nat or bool(self.policies)

    def open(self, ports: Mapping[str, tuple[int, str]]) -> None:
        """Make the tables anew, in one step, for ports that are there already."""
        self._ports = dict(ports)
        self._open = True
        if self.needed:
            self._replace()
        elif shutil.which("nft") is not None:
            with contextlib.suppress(HostError):  # of an earlier daemon that needed them
                nft.remove_tables(self._segment.bridge)

    def close(self, *, remove: bool) -> None:
        """Forget all; with `remove` the tables, too."""
        opened, self._open = self._open, False
        self._ports.clear()
        if remove and opened and self.needed:
            nft.remove_tables(self._segment.bridge)

    def policed(self, ifname: str) -> bool:
        """Whether a port is held to a policy, which also says whether it has peers."""
        return ifname in self._ports and self._ports[ifname][1] in self.policies

    def join(self, ifname: str, index: int, group: str) -> None:
        """Put a port, whose interface is not up yet, under its group's rules."""
        before = self._ports.get(ifname)
        self._ports[ifname] = (index, group)
        lines = [] if before is None else self._script(nft.parting, ifname, *before)
        self._change([*lines, *self._script(nft.joining, ifname, index, group)], ifname, before)

    def leave(self, ifname: str) -> None:
        """Take a port out of all rules. Nothing happens when it is in none."""
        before = self._ports.pop(ifname, None)
        if before is not None:
            self._change(self._script(nft.parting, ifname, *before), ifname, before)

    def groups(self) -> dict[str, list[str]]:
        """The interfaces of each group."""
        found: dict[str, list[str]] = {}
        for ifname, (_, group) in self._ports.items():
            found.setdefault(group, []).append(ifname)
        return found

    def set_policy(self, group: str, policy: Policy | None) -> None:
        """Hold all ports of a group to another policy, from one packet to the next."""
        before = self.policies.get(group)
        if before == policy:
            return
        if policy is None:
            del self.policies[group]
        else:
            self.policies[group] = policy
        try:
            if not self._open:
                return
            if before is not None and policy is not None:
                self._apply(nft.group_rules(self._segment, group, policy, self.exits))
            elif self.needed:
                self._replace()
            else:
                nft.remove_tables(self._segment.bridge)
        except HostError:
            if before is None:
                del self.policies[group]
            else:
                self.policies[group] = before
            raise

    def set_exits(self, exits: Sequence[Exit]) -> None:
        """As `Network.set_exits`."""
        before, wanted = self.exits, tuple(sorted(exits))
        if before == wanted:
            return
        self.exits = wanted
        try:
            if self._open and self.needed:
                self._apply(nft.rerouted(self._segment, self.policies, wanted))
        except HostError:
            self.exits = before
            raise

    def publish(self, ports: Mapping[tuple[str, int], tuple[str, int]]) -> None:
        """As `Network.publish`."""
        before = self._published
        if before == ports:
            return
        self._published = dict(ports)
        try:
            if self._open and self.needed:
                self._apply(nft.publishing(self._segment, ports))
        except HostError:
            self._published = before
            raise

    def counters(self) -> dict[str, dict[str, Counted]]:
        """What has been counted, by group and name. Empty without tables; raises HostError."""
        return nft.counters(self._segment) if self._open and self.needed else {}

    # --- inside ---------------------------------------------------------------------------------

    def _script(
        self, make: Callable[[nft.Segment, Member], str], ifname: str, index: int, group: str
    ) -> list[str]:
        member = self._member(ifname, index, group)
        return [] if member is None else [make(self._segment, member)]

    def _member(self, ifname: str, index: int, group: str) -> Member | None:
        if group not in self.policies:
            if not self._guards:
                return None
            group = GUARD
        return Member(ifname, self._plan.mac(index), self._plan.ip(index), group)

    def _change(self, lines: Iterable[str], ifname: str, before: tuple[int, str] | None) -> None:
        script = "\n".join(lines)
        if not script or not self._open:
            return
        try:
            self._apply(script)
        except HostError:
            self._ports.pop(ifname, None)
            if before is not None:
                self._ports[ifname] = before
            raise

    def _apply(self, script: str) -> None:
        """Change the tables, or make them anew when they are not what they should be."""
        try:
            nft.apply(script + "\n")
        except HostError as error:
            _log.warning("making the tables of %s anew: %s", self._segment.bridge, error.message)
            self._replace()

    def _replace(self) -> None:
        ports = (self._member(ifname, *port) for ifname, port in self._ports.items())
        members = [member for member in ports if member is not None]
        script = nft.replaced(self._segment, self.policies, self.exits, members)
        nft.apply(script + nft.publishing(self._segment, self._published) + "\n")
