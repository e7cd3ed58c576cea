"""One egress: what its forwarders say, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from templated.drivers.egress.remote import Remote
from templated.errors import Conflict, Timeout
from templated.journal import EgressRow
from templated.model.egress import (
    PORTS,
    EgressState,
    EgressView,
    ForwarderView,
    LinkPlan,
    Role,
)
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus

BEGIN = 20.0
"""Seconds within which a forwarder tells of itself."""
SETTLE = 10.0
"""Seconds within which one of them is the active one, after a start or a switch."""
_NEARLY_ALL = 0.9


class Egress:
    """One egress, as this daemon knows it. Its forwarders go on without."""

    def __init__(
        self, row: EgressRow, plan: LinkPlan, events: EventBus, metrics: EgressMetrics
    ) -> None:
        self.row = row
        self.plan = plan
        self.state = row.state
        self.problem = ""
        """Why its way could not be made as it should be."""
        self.forwarders: list[Remote] = []
        self._events = events
        self._metrics = metrics
        self._failovers = 0
        self._last_active: int | None = None
        self._seen: dict[int, ForwarderView] = {}
        self._changed = asyncio.Event()

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.spec.name

    @property
    def active(self) -> Remote | None:
        """The forwarder that sends; None: packets are dropped."""
        found = [one for one in self.forwarders if one.view.role is Role.ACTIVE]
        # For a moment after a takeover both may say so: the later one is right.
        return max(found, key=lambda one: one.view.since, default=None)

    def view(self) -> EgressView:
        """What users see."""
        spec, active = self.row.spec, self.active
        return EgressView(
            name=spec.name,
            interface=spec.interface,
            address=spec.address,
            gateway=spec.gateway,
            to=spec.to,
            internet=spec.internet,
            state=self.state,
            active=None if active is None else active.spec.number,
            forwarders=tuple(one.view for one in self.forwarders),
            failovers=self._failovers,
            mark=self.plan.mark,
            link=str(self.plan.network),
            created=self.row.created,
            problem="; ".join(self._problems()),
        )

    def heard(self, forwarder: Remote) -> None:
        """A forwarder's view has changed."""
        view, before = forwarder.view, self._seen.get(forwarder.spec.number)
        self._seen[view.number] = view
        self._metrics.count(self.name, view, before)
        self._metrics.show(self.view(), None if self.active is None else self.active.view)
        if before is None or (view.role, view.error) != (before.role, before.error):
            details = {"forwarder": view.number, "role": view.role.value, "error": view.error}
            self._events.emit("egress.forwarder", self.name, **details)
        if before is not None and view.contested > before.contested:
            self._events.emit("egress.contested", self.name, forwarder=view.number)
        self._note_active()
        self._changed.set()

    def _note_active(self) -> None:
        """By the later of two that say so: one that is about to give up may speak once more."""
        active = self.active
        if active is None or active.spec.number == self._last_active:
            return
        if self._last_active is not None:
            self._failovers += 1
            self._metrics.failovers.labels(self.name).inc()
        self._last_active = active.spec.number
        self._events.emit("egress.active", self.name, forwarder=self._last_active)

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
        """Have the standby take over. Conflict when there is none, Timeout when it does not."""
        active = self.active
        standby = next((one for one in self.forwarders if one.view.role is Role.STANDBY), None)
        if active is None or standby is None:
            raise Conflict(
                f"egress {self.name} has no standby that could take over",
                hint=f"see: templated egress show {self.name}",
            )
        active.resign()
        await self.settled(lambda: self.active is standby, SETTLE, "the takeover")

    def _problems(self) -> list[str]:
        found = [self.problem] if self.problem else []
        if self.forwarders and self.active is None and self.state is EgressState.ACTIVE:
            found.append("no forwarder is active: packets are dropped")
        for one in self.forwarders:
            if one.view.error:
                found.append(f"forwarder {one.spec.number}: {one.view.error}")
            if one.view.flows > _NEARLY_ALL * (PORTS[1] - PORTS[0]):
                found.append(f"forwarder {one.spec.number}: nearly all ports are in use")
        return found
