"""One lane of an egress: a slice of its ports, the forwarder that has it, and the standby."""

from __future__ import annotations

import time
from collections.abc import Iterator

from templated.drivers.egress.remote import Remote
from templated.model.egress import (
    LANE_TRANSITIONS,
    LaneState,
    LaneView,
    LinkPlan,
    Peer,
    Role,
)
from templated.model.lifecycle import move

_NEARLY_ALL = 0.9
_SURE = 5.0
"""Seconds after which what a forwarder says of its flows is newer than that it leaves."""


class Lane:
    """What this daemon knows of a lane. Its forwarders go on without."""

    def __init__(
        self, plan: LinkPlan, ports: tuple[int, int], forwarders: list[Remote], state: LaneState
    ) -> None:
        self.plan = plan
        self.ports = ports
        self.forwarders = forwarders
        self.state = state
        self.last_active: int | None = None
        self._since = time.monotonic()

    @property
    def number(self) -> int:
        """From 0."""
        return self.plan.lane

    @property
    def active(self) -> Remote | None:
        """The forwarder that sends; None: packets of this lane are dropped."""
        found = [one for one in self.forwarders if one.view.role is Role.ACTIVE]
        # For a moment after a takeover both may say so: the later one is right.
        return max(found, key=lambda one: one.view.since, default=None)

    @property
    def standby(self) -> Remote | None:
        """One that could take over."""
        return next((one for one in self.forwarders if one.view.role is Role.STANDBY), None)

    @property
    def peer(self) -> Peer:
        """Of two hosts: what the forwarder here sees of the other one."""
        return self.forwarders[0].view.peer if self.forwarders else Peer.NONE

    @property
    def other_host(self) -> str:
        """The address of the other of two hosts."""
        return self.forwarders[0].spec.egress.hosts[2 - self.plan.side].address

    @property
    def active_number(self) -> int | None:
        """The forwarder that sends, here or on the other host."""
        if (active := self.active) is not None:
            return active.spec.number
        return 3 - self.plan.side if self.peer is Peer.SENDS else None

    @property
    def standby_number(self) -> int | None:
        """One that could take over, here or on the other host, where all that is known is that it
        answers."""
        if (standby := self.standby) is not None:
            return standby.spec.number
        return 3 - self.plan.side if self.peer is Peer.SEEN else None

    @property
    def serves(self) -> bool:
        """One sends, and the other one, if there is to be one, could. The other host may come
        later."""
        if self.peer is not Peer.NONE:
            return self.active is not None or (
                self.standby is not None and self.active_number is not None
            )
        return self.active is not None and (len(self.forwarders) < 2 or self.standby is not None)

    @property
    def age(self) -> float:
        """Seconds that it has been in its state, as far as this daemon knows."""
        return time.monotonic() - self._since

    def move(self, state: LaneState) -> None:
        """Take new flows, or none any more. Raises Defect when it does so already."""
        self.state = move(LANE_TRANSITIONS, self.state, state, f"lane {self.number + 1}")
        self._since = time.monotonic()

    def has_ended(self, bound: float) -> bool:
        """Whether the last flow of a lane that leaves has ended, or its time has, in seconds."""
        past, active = self.age, self.active
        if past > bound:
            return True
        return past > _SURE and active is not None and active.view.flows == 0

    def view(self) -> LaneView:
        """What users see."""
        active = self.active
        return LaneView(
            number=self.number + 1,
            state=self.state,
            active=self.active_number,
            ports=self.ports,
            flows=0 if active is None else active.view.flows,
            rate=0 if active is None else active.view.rate,
        )

    def problems(self) -> Iterator[str]:
        """What an operator should look at."""
        if self.state is LaneState.ENDING:
            return
        if self.peer is Peer.UNSEEN:
            yield f"forwarder {3 - self.plan.side}, on host {self.other_host}, is not seen"
        for one in self.forwarders:
            if one.view.error:
                yield f"forwarder {one.spec.number}: {one.view.error}"
            if one.view.flows > _NEARLY_ALL * (self.ports[1] - self.ports[0]):
                yield f"forwarder {one.spec.number}: nearly all ports are in use"
