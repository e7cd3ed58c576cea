"""Which rules hold on a bridge: the state that `nft` is told, change by change.

What is known here is the truth: when the kernel has something else, because somebody has flushed
or deleted our tables, the next change makes them anew as a whole. Tables of others are never read.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from templated.drivers.network import nft
from templated.drivers.network.base import Counted
from templated.drivers.network.elements import Element, Elements
from templated.drivers.network.nft import GUARD, Member
from templated.errors import HostError
from templated.model.network import AddressPlan, BridgeNetwork, Exit
from templated.model.policy import Policy

_log = logging.getLogger(__name__)


class Held(NamedTuple):
    """A port of a clone."""

    number: int
    """Its index, of which its addresses are."""
    groups: tuple[str, ...]
    """The groups that it is in, the closest first: the first that has a policy holds."""


class Policing:
    """The tables of one bridge. Methods may be called by any thread in the bridge's namespace.

    Those that change something raise HostError, with nothing changed here or in the kernel.
    """

    def __init__(self, config: BridgeNetwork, plan: AddressPlan) -> None:
        self._guards = config.antispoof
        self._segment = nft.Segment(config.bridge, str(plan.network), plan.gateway, config.nat)
        self._plan = plan
        self.policies: dict[str, Policy] = {}
        self.exits: tuple[Exit, ...] = ()
        self._published: dict[tuple[str, int], tuple[str, int]] = {}
        self._ports: dict[str, Held] = {}
        """By interface."""
        self._open = False
        self._elements: Elements | None = None
        self._lock = threading.RLock()

    @property
    def needed(self) -> bool:
        """Whether there is anything to hold clones to; without, nft need not be installed."""
        return self._guards or self._segment.nat or bool(self.policies)

    def open(self, ports: Mapping[str, Held]) -> None:
        """Make the tables anew, in one step, for ports that are there already."""
        with self._lock:
            self._ports = dict(ports)
            self._open = True
            if self.needed:
                self._replace()
            elif shutil.which("nft") is not None:
                with contextlib.suppress(HostError):  # of an earlier daemon that needed them
                    nft.remove_tables(self._segment.bridge)

    def close(self, *, remove: bool) -> None:
        """Forget all; with `remove` the tables, too."""
        with self._lock:
            opened, self._open = self._open, False
            self._ports.clear()
            if self._elements is not None:
                self._elements.close()
                self._elements = None
            if remove and opened and self.needed:
                nft.remove_tables(self._segment.bridge)

    def policy(self, ifname: str) -> Policy | None:
        """The policy that a port is held to, which also says whether it has peers."""
        held = self._ports.get(ifname)
        return None if held is None else self.policies.get(_closest(self.policies, held) or "")

    def join(self, ifname: str, index: int, groups: tuple[str, ...]) -> None:
        """Put a port under the rules of its groups, from one packet to the next."""
        with self._lock:
            self._hold(ifname, Held(index, groups))

    def leave(self, ifname: str) -> None:
        """Take a port out of all rules. Nothing happens when it is in none."""
        with self._lock:
            self._hold(ifname, None)

    def move(self, ifname: str, groups: tuple[str, ...]) -> None:
        """Put a port that has joined under the rules of other groups. HostError for others."""
        with self._lock:
            held = self._ports.get(ifname)
            if held is None:
                raise HostError(f"there is no port {ifname} with an address of its own")
            self._hold(ifname, held._replace(groups=groups))

    def rename(self, ifname: str, groups: tuple[str, ...]) -> bool:
        """As `move`, when no rule changes by it; False, and nothing done, otherwise. At once."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            held = self._ports.get(ifname)
            if held is None:
                return False
            wanted = held._replace(groups=groups)
            if _closest(self.policies, held) != _closest(self.policies, wanted):
                return False
            self._ports[ifname] = wanted
            return True
        finally:
            self._lock.release()

    def set_policies(self, changes: Mapping[str, Policy | None]) -> list[str]:
        """Hold all ports of groups to other policies, from one packet to the next; None: to none.

        Returns the interfaces that are under another group's rules now.
        """
        with self._lock:
            before = self.policies
            wanted = {**before, **changes}
            after = {group: policy for group, policy in wanted.items() if policy is not None}
            if after == before:
                return []
            turned = self._turned(before, after)
            had, self.policies = self.needed, after
            try:
                if not self._open:
                    return []
                if not had:
                    self._replace()
                elif not self.needed:
                    nft.remove_tables(self._segment.bridge)
                else:
                    self._apply(self._changed(before, turned))
            except HostError:
                self.policies = before
                raise
            return turned

    def freed(self, changes: Mapping[str, Policy | None]) -> list[str]:
        """The interfaces that would have no policy any more."""
        with self._lock:
            wanted = {**self.policies, **changes}
            left = {group: policy for group, policy in wanted.items() if policy is not None}
            return [
                ifname
                for ifname in self._turned(self.policies, left)
                if _closest(left, self._ports[ifname]) is None
            ]

    def _turned(self, before: Mapping[str, Policy], after: Mapping[str, Policy]) -> list[str]:
        """The interfaces that another group's policy holds for now."""
        return [
            ifname
            for ifname, held in self._ports.items()
            if _closest(before, held) != _closest(after, held)
        ]

    def _changed(self, before: Mapping[str, Policy], turned: Sequence[str]) -> str:
        lines = [
            nft.group_rules(self._segment, group, policy, self.exits)
            for group, policy in self.policies.items()
            if before.get(group) != policy
        ]
        take, put = set[Element](), set[Element]()
        for ifname in turned:
            take |= self._elements_of(ifname, self._ports[ifname], before)
            put |= self._elements_of(ifname, self._ports[ifname], self.policies)
        lines.append(nft.moved(self._segment, take - put, put - take))
        lines += [
            nft.without(self._segment, group) for group in before if group not in self.policies
        ]
        return "\n".join(lines)

    def set_exits(self, exits: Sequence[Exit]) -> None:
        """As `Network.set_exits`."""
        with self._lock:
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
        with self._lock:
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

    def _hold(self, ifname: str, held: Held | None) -> None:
        before = self._ports.get(ifname)
        take, put = (self._elements_of(ifname, one, self.policies) for one in (before, held))
        self._know(ifname, held)
        if not self._open or take == put:
            return
        try:
            self._swap(take - put, put - take)
        except HostError:
            self._know(ifname, before)
            raise

    def _know(self, ifname: str, held: Held | None) -> None:
        if held is None:
            self._ports.pop(ifname, None)
        else:
            self._ports[ifname] = held

    def _elements_of(
        self, ifname: str, held: Held | None, policies: Mapping[str, Policy]
    ) -> set[Element]:
        member = None if held is None else self._member(ifname, held, policies)
        return set() if member is None else set(nft.elements(self._segment, member))

    def _member(self, ifname: str, held: Held, policies: Mapping[str, Policy]) -> Member | None:
        group = _closest(policies, held) or (GUARD if self._guards else None)
        if group is None:
            return None
        return Member(ifname, self._plan.mac(held.number), self._plan.ip(held.number), group)

    def _swap(self, take: set[Element], put: set[Element]) -> None:
        """Change elements, as fast as it goes; without a process, unless the tables are gone."""
        try:
            if self._elements is None:
                self._elements = Elements(self._segment.table)
            self._elements.change(take, put)
        except OSError as error:
            self._mend(error.strerror or str(error))

    def _apply(self, script: str) -> None:
        try:
            nft.apply(script + "\n")
        except HostError as error:
            self._mend(error.message)

    def _mend(self, why: str) -> None:
        """Make the tables anew when they are not what they should be."""
        _log.warning("making the tables of %s anew: %s", self._segment.bridge, why)
        self._replace()

    def _replace(self) -> None:
        ports = (self._member(ifname, held, self.policies) for ifname, held in self._ports.items())
        members = [member for member in ports if member is not None]
        script = nft.replaced(self._segment, self.policies, self.exits, members)
        nft.apply(script + nft.publishing(self._segment, self._published) + "\n")


def _closest(policies: Mapping[str, Policy], held: Held) -> str | None:
    """The group whose policy holds for a port; None: it has none."""
    return next((group for group in held.groups if group in policies), None)
