"""One egress: what its forwarders say, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from templated.drivers.egress.remote import Remote
from templated.errors import Conflict, Timeout
from templated.journal import EgressRow
from templated.model.egress import (
    EgressState,
    EgressView,
    ForwarderView,
    LaneState,
    LinkPlan,
    Peer,
)
from templated.services.egress.lane import Lane
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus

BEGIN = 20.0
"""Seconds within which a forwarder tells of itself."""
SETTLE = 10.0
"""Seconds within which one of them is the active one, after a start or a switch."""


class Egress:
    """One egress, as this daemon knows it. Its forwarders go on without."""

    def __init__(
        self, row: EgressRow, plan: LinkPlan, events: EventBus, metrics: EgressMetrics
    ) -> None:
        self.row = row
        self.plan = plan
        """Of its first lane."""
        self.state = row.state
        self.problem = ""
        """Why its way could not be made as it should be."""
        self.stuck = ""
        """Why lanes, or the host's rules, are not as they should be."""
        self.lanes: dict[int, Lane] = {}
        """By number; the first one is always there, and serves."""
        self.marks: list[int] = []
        """Of the lanes that new flows go to."""
        self.ruled_at = 0.0
        """When the host's rules for it were last made, by the monotonic clock."""
        self._events = events
        self._metrics = metrics
        self._failovers = 0
        self._seen: dict[int, ForwarderView] = {}
        self._changed = asyncio.Event()

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.spec.name

    @property
    def forwarders(self) -> list[Remote]:
        """Those of all lanes."""
        return [one for lane in self.lanes.values() for one in lane.forwarders]

    def view(self) -> EgressView:
        """What users see."""
        spec = self.row.spec
        lanes = tuple(lane.view() for lane in self.lanes.values())
        return EgressView(
            name=spec.name,
            interface=spec.interface,
            address=spec.address,
            gateway=spec.gateway,
            to=spec.to,
            internet=spec.internet,
            state=self.state,
            active=lanes[0].active,
            forwarders=tuple(one.view for one in self.forwarders),
            lanes=lanes,
            min=spec.min,
            max=spec.max,
            failovers=self._failovers,
            mark=self.plan.mark,
            link=str(self.plan.network),
            created=self.row.created,
            problem="; ".join(self._problems()),
            hosts=spec.hosts,
            here=self.plan.side if spec.hosts and self.forwarders else None,
            peer=self.lanes[0].peer,
        )

    def heard(self, forwarder: Remote) -> None:
        """A forwarder's view has changed."""
        view, before = forwarder.view, self._seen.get(forwarder.spec.number)
        self._seen[view.number] = view
        self._metrics.count(self.name, view, before)
        self._metrics.show(self.view())
        if before is None or (view.role, view.error) != (before.role, before.error):
            details = {"forwarder": view.number, "role": view.role.value, "error": view.error}
            self._events.emit("egress.forwarder", self.name, **details)
        if before is not None and view.contested > before.contested:
            self._events.emit("egress.contested", self.name, forwarder=view.number)
        for lane in self.lanes.values():
            self._note_active(lane)
        self._changed.set()

    def told(self) -> None:
        """What is known of it has changed otherwise than by a forwarder's word."""
        self._metrics.show(self.view())

    def forget(self, lane: Lane) -> None:
        """A lane has gone."""
        del self.lanes[lane.number]
        for one in lane.forwarders:
            self._seen.pop(one.spec.number, None)
            self._metrics.forget_forwarder(self.name, one.spec.number)

    def _note_active(self, lane: Lane) -> None:
        """By the later of two that say so: one that is about to give up may speak once more."""
        active = lane.active_number
        if active is None or active == lane.last_active:
            return
        if lane.last_active is not None:
            self._failovers += 1
            self._metrics.failovers.labels(self.name).inc()
        lane.last_active = active
        self._events.emit("egress.active", self.name, forwarder=lane.last_active)

    async def settled(self, what: Callable[[], bool], seconds: float, doing: str) -> None:
        """Wait until `what` holds. Raises Timeout that says what of `doing` it was."""
        try:
            async with asyncio.timeout(seconds):
                while not what():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            problems = "; ".join(self._problems()) or "no forwarder says why"
            raise Timeout(
                f"egress {self.name}: {doing} took longer than {seconds:g} s: {problems}",
                hint=f"see: templated egress show {self.name}",
            ) from None

    async def switch(self) -> None:
        """Have each lane's standby take over. Conflict when one has none: then nothing is done.

        Raises Timeout when one does not take over; lanes that were switched by then stay so.
        """
        used = (LaneState.SERVING, LaneState.DRAINING)
        chosen = []
        for lane in self.lanes.values():
            if lane.state not in used:
                continue
            active, standby = lane.active, lane.standby_number
            if active is None and lane.peer is Peer.SENDS:
                raise Conflict(
                    f"the active forwarder of egress {self.name} is on host {lane.other_host}",
                    hint=f"there: templated egress switch {self.name}",
                )
            if active is None or standby is None:
                raise Conflict(
                    f"egress {self.name} has no standby that could take over",
                    hint=f"see: templated egress show {self.name}",
                )
            chosen.append((lane, active, standby))
        for lane, active, standby in chosen:
            active.resign()
            await self._takeover(lane, standby)

    async def _takeover(self, lane: Lane, standby: int) -> None:
        await self.settled(lambda: lane.active_number == standby, SETTLE, "the takeover")

    def _problems(self) -> list[str]:
        found = [self.problem] if self.problem else []
        if self.stuck:
            found.append(f"it cannot be kept as it should be: {self.stuck}")
        if self.state is EgressState.ACTIVE:
            for lane in self.lanes.values():
                quiet = lane.state in (LaneState.STARTING, LaneState.ENDING)
                if lane.active_number is None and not quiet:
                    which = f" of lane {lane.number + 1}" if len(self.lanes) > 1 else ""
                    found.append(f"no forwarder{which} is active: packets are dropped")
        return found + [problem for lane in self.lanes.values() for problem in lane.problems()]
