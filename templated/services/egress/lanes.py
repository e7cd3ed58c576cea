"""The lanes of egresses: made, filled, drained and ended, as their load asks for.

The first one is there as long as its egress is. Another one is written into the journal before it
is begun, and stays there until nothing is left of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from templated.drivers.egress.host import Ways
from templated.drivers.egress.remote import Remote
from templated.errors import TemplatedError
from templated.journal import EgressRows
from templated.model.config import EgressConfig
from templated.model.egress import SEATS, EgressState, ForwarderSpec, LaneState, LinkPlan
from templated.model.units import seconds
from templated.services.egress.egress import BEGIN, SETTLE, Egress
from templated.services.egress.lane import Lane
from templated.services.egress.load import Pace, needed
from templated.services.reports.events import EventBus
from templated.services.tasks import Tasks

log = logging.getLogger(__name__)
_TICK = 2.0
"""Seconds between two looks at the load, which forwarders tell as often."""
_AGAIN = 10.0
"""Seconds after which rules are made again that somebody may have flushed."""
_LONGEST = 60.0
"""The same, as long as lanes cannot be made or ended."""


class Lanes:
    """Makes and ends lanes. `spec_of` says what a forwarder is to be."""

    def __init__(
        self,
        config: EgressConfig,
        rows: EgressRows,
        ways: Ways,
        tasks: Tasks,
        events: EventBus,
        turn: asyncio.Lock,
        spec_of: Callable[[Egress, LinkPlan, int], ForwarderSpec],
    ) -> None:
        self._config = config
        self._rows = rows
        self._ways = ways
        self._tasks = tasks
        self._events = events
        self._turn = turn
        self._spec_of = spec_of

    def know(self, egress: Egress, number: int, state: LaneState) -> Lane:
        """A lane of an egress, as the journal has it."""
        spec, plan = egress.row.spec, self._ways.plan(egress.row.index, number, egress.plan.side)
        forwarders = [
            Remote(self._spec_of(egress, plan, SEATS * number + seat), egress.heard)
            for seat in self._ways.seats(spec)
        ]
        lane = Lane(plan, spec.ports(number), forwarders, state)
        egress.lanes = dict(sorted({**egress.lanes, number: lane}.items()))
        return lane

    async def begin(self, egress: Egress, lane: Lane, *, fresh: bool = False) -> None:
        """Start a lane, and wait until it could serve. `fresh`: nobody has the address yet.

        Raises HostError or Timeout; what was made by then stays.
        """
        await self._ways.make(lane.plan, egress.row.spec)
        for forwarder in lane.forwarders:
            # The first one asks whether somebody has the address; then it has it itself.
            await forwarder.begin(BEGIN, fresh=fresh and forwarder is lane.forwarders[0])
            self.keep(forwarder)
        await egress.settled(lambda: lane.serves, SETTLE, "its start")

    def keep(self, forwarder: Remote) -> None:
        """Hear it, and start it again when it ends."""
        self._tasks.spawn(forwarder.keep(BEGIN), f"keeping forwarder {forwarder.spec.label}")

    async def end(self, lane: Lane) -> None:
        """Take a lane away. Raises HostError or Timeout when something of it stays."""
        for forwarder in lane.forwarders:
            forwarder.leave()  # the standby takes over in vain
        for forwarder in lane.forwarders:
            await forwarder.end()
        await self._ways.remove(lane.plan)

    async def spread(self, egress: Egress) -> None:
        """Have new flows go to the lanes that serve. Raises HostError."""
        if egress.row.spec.max == 1:
            return
        serving = [lane for lane in egress.lanes.values() if lane.state is LaneState.SERVING]
        up = [lane for lane in serving if lane.active is not None] or serving
        now, marks = time.monotonic(), [lane.plan.mark for lane in up]
        if marks != egress.marks or now - egress.ruled_at > _AGAIN:
            await self._ways.spread(egress.plan, marks)
            egress.marks, egress.ruled_at = marks, now

    def follow(self, egress: Egress) -> None:
        """Have the number of lanes follow the load from now on, and keep the host's rules."""
        if egress.row.spec.max > 1 or egress.row.spec.hosts:
            self._tasks.spawn(self._follow(egress), f"lanes of egress {egress.name}")

    async def _follow(self, egress: Egress) -> None:
        pace, wait, now = Pace(seconds(self._config.quiet)), _TICK, time.monotonic
        due = now()
        while True:
            await asyncio.sleep(_TICK)
            async with self._turn:
                if egress.state is not EgressState.ACTIVE:
                    return
                failed = await self._tried(egress, self.spread, self._join)
                if now() >= due:
                    adapt = partial(self._adapt, pace=pace)
                    failed += await self._tried(egress, adapt, self.spread, self._end_drained)
                    wait = min(2 * wait, _LONGEST) if failed else _TICK
                    due = now() + (wait if failed else 0)
                    egress.stuck = ""
                egress.stuck = "; ".join(failed) or egress.stuck

    async def _tried(
        self, egress: Egress, *steps: Callable[[Egress], Coroutine[Any, Any, None]]
    ) -> list[str]:
        """What failed of some steps, of which each is tried."""
        failed = []
        for step in steps:
            try:
                await step(egress)
            except TemplatedError as error:
                failed.append(error.message)
            except Exception as error:  # the next look goes on, whatever it is
                log.exception("lanes of egress %s", egress.name)
                failed.append(f"{error!r}")
        if failed:
            log.warning("lanes of egress %s: %s", egress.name, "; ".join(failed))
        return failed

    async def _join(self, egress: Egress) -> None:
        """Of two hosts: rules and devices between them, which somebody may have taken away."""
        now = time.monotonic()
        if egress.row.spec.hosts and now - egress.ruled_at > _AGAIN:
            egress.ruled_at = now
            await self._ways.join(egress.plan, egress.row.spec)

    async def _adapt(self, egress: Egress, pace: Pace) -> None:
        """One step: more lanes, or fewer."""
        spec, lanes = egress.row.spec, list(egress.lanes.values())
        views = [lane.view() for lane in lanes]
        need = needed(spec, sum(v.rate for v in views), sum(v.flows for v in views))
        wanted = pace.wanted(time.monotonic(), need)
        for lane in lanes:
            if lane.state is LaneState.STARTING:  # begun by a daemon before
                if lane.serves:
                    await self._move(egress, lane, LaneState.SERVING)
                elif lane.age > BEGIN + SETTLE:
                    await self._move(egress, lane, LaneState.ENDING)
        there = (LaneState.STARTING, LaneState.SERVING)
        serving = [lane for lane in lanes if lane.state in there]
        for lane in lanes:
            if lane.state is LaneState.DRAINING and len(serving) < wanted:
                await self._move(egress, lane, LaneState.SERVING)
                serving.append(lane)
        for lane in serving[:0:-1]:
            if len(serving) > wanted:
                began = lane.state is LaneState.SERVING
                await self._move(egress, lane, LaneState.DRAINING if began else LaneState.ENDING)
                serving.remove(lane)
        for _ in range(wanted - len(serving)):
            await self.add(egress)

    async def _end_drained(self, egress: Egress) -> None:
        """The end of lanes that have drained, and of what could not be ended before."""
        for lane in list(egress.lanes.values()):
            drains = lane.state is LaneState.DRAINING
            if lane.plan.mark in egress.marks:
                drains = False  # the rules that choose it could not be changed yet
            if drains and lane.has_ended(seconds(self._config.drain)):
                await self._move(egress, lane, LaneState.ENDING)
            if lane.state is LaneState.ENDING:
                await self._end(egress, lane)

    async def add(self, egress: Egress) -> None:
        """One more lane. Raises HostError or Timeout; nothing of it is left then, or it is
        `ending`. While another one is, there may be no room for it: then nothing is done."""
        number = next((n for n in range(egress.row.spec.max) if n not in egress.lanes), None)
        if number is None:
            return
        lane = self.know(egress, number, LaneState.STARTING)
        try:
            await self._write(egress)
            await self.begin(egress, lane)
        except BaseException:
            await self._move(egress, lane, LaneState.ENDING)
            await self._end(egress, lane)
            raise
        await self._move(egress, lane, LaneState.SERVING)
        await self.spread(egress)

    async def _end(self, egress: Egress, lane: Lane) -> None:
        await self.end(lane)
        egress.forget(lane)
        await self._write(egress)
        self._events.emit("egress.lane", egress.name, lane=lane.number + 1, state="ended")
        egress.told()

    async def _move(self, egress: Egress, lane: Lane, state: LaneState) -> None:
        lane.move(state)
        await self._write(egress)
        self._events.emit("egress.lane", egress.name, lane=lane.number + 1, state=state.value)
        log.info("egress %s: lane %d is %s", egress.name, lane.number + 1, state.value)
        egress.told()

    async def _write(self, egress: Egress) -> None:
        others = [(n, lane.state) for n, lane in egress.lanes.items() if n > 0]
        await self._rows.lanes(egress.name, others)
