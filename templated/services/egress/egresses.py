"""All egresses of this daemon: making and removing them, and finding them again.

Nothing here runs when a clone starts: the bridge's rules mark its packets by its policy, and the
mark leads them to the egress's forwarders.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from templated.drivers.egress.host import Ways
from templated.drivers.egress.remote import Remote
from templated.drivers.host.programs import find, missing
from templated.drivers.network import Network
from templated.errors import Conflict, HostError, InvalidRequest, NotFound, TemplatedError
from templated.journal import EgressRow, EgressRows
from templated.model.config import Config
from templated.model.egress import (
    SEATS,
    EgressSpec,
    EgressState,
    EgressView,
    ForwarderSpec,
    LaneState,
    LinkPlan,
)
from templated.model.network import AddressPlan, BridgeNetwork, Exit
from templated.services.egress.egress import Egress
from templated.services.egress.lanes import Lanes
from templated.services.places import SUN_PATH
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus
from templated.services.tasks import Tasks

log = logging.getLogger(__name__)
PROGRAMS = ("ip", "nft", "keepalived", "conntrackd")


class Egresses:
    """Who has which name; all changes are made one after the other."""

    def __init__(
        self,
        config: Config,
        rows: EgressRows,
        network: Network,
        plan: AddressPlan,
        directory: Path,
        owner: str,
        tasks: Tasks,
        events: EventBus,
        metrics: EgressMetrics,
    ) -> None:
        self._bridge = config.network if isinstance(config.network, BridgeNetwork) else None
        self._links = ipaddress.IPv4Network(config.egress.links)
        self._rows = rows
        self._network = network
        self._directory = directory
        self._tasks = tasks
        self._events = events
        self._metrics = metrics
        self._clones = plan.network
        self._ways = Ways(
            owner=f"templated:{owner}",
            clones=plan.network,
            links=self._links,
            netns=self._bridge.netns if self._bridge else None,
        )
        self._egresses: dict[str, Egress] = {}
        self._turn = asyncio.Lock()
        self._lanes = Lanes(
            config.egress, rows, self._ways, tasks, events, self._turn, self._forwarder
        )
        self.users: list[Callable[[str], list[str]]] = []
        """What names an egress in its policy, for people: none of these can be left without."""

    # --- what there is ------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether there is an egress that policies can name."""
        found = self._egresses.get(name)
        return found is not None and found.state is EgressState.ACTIVE

    def views(self) -> list[EgressView]:
        """All egresses, by name."""
        return [one.view() for _, one in sorted(self._egresses.items())]

    def view(self, name: str) -> EgressView:
        """One egress. Raises NotFound."""
        return self._find(name).view()

    # --- the daemon's start and end -----------------------------------------------------------

    async def load(self) -> None:
        """Know what there is, ahead of the first port: its policy may name an egress.

        Raises HostError when the journal cannot be read.
        """
        for row in await self._rows.egresses():
            self._egresses[row.spec.name] = self._known(row)
        await self._set_exits()

    async def open(self) -> None:
        """Find the forwarders that run, start those that lack, and remove what nobody needs.

        What cannot be mended is told of each egress, and keeps no other from serving.
        """
        if self._bridge is None:
            for egress in self._egresses.values():
                egress.problem = "the daemon's network is not of mode bridge any more"
            return
        if not self._egresses and not await asyncio.to_thread(self._leftovers):
            return
        try:
            await self._ways.open()
        except HostError as error:
            for egress in self._egresses.values():
                egress.problem = error.message
            return
        for egress in list(self._egresses.values()):
            if egress.state is EgressState.ACTIVE:
                await self._adopt(egress)
            else:
                await self._undo(egress)
        await self._remove_orphans()

    async def close(self) -> None:
        """Let go of all forwarders, which go on. Raises nothing."""
        for egress in self._egresses.values():
            for forwarder in egress.forwarders:
                forwarder.release()
        await self._ways.close()

    async def _adopt(self, egress: Egress) -> None:
        if not egress.forwarders:
            return
        # What was being ended is ended by who follows the load.
        lanes = [one for one in egress.lanes.values() if one.state is not LaneState.ENDING]
        try:
            for lane in lanes:
                await self._ways.make(lane.plan, egress.row.spec)
        except TemplatedError as error:
            egress.problem = error.message
            log.warning("egress %s: %s", egress.name, error.message)
        for forwarder in (one for lane in lanes for one in lane.forwarders):
            found = await forwarder.connect()
            log.info("forwarder %s %s", forwarder.spec.label, "runs" if found else "is started")
            self._lanes.keep(forwarder)
        self._lanes.follow(egress)

    async def _remove_orphans(self) -> None:
        for directory in await asyncio.to_thread(self._leftovers):
            with contextlib.suppress(OSError, msgspec.MsgspecError, TemplatedError):
                text = await asyncio.to_thread((directory / "spec.json").read_bytes)
                orphan = Remote(msgspec.json.decode(text, type=ForwarderSpec), lambda _: None)
                log.warning("ending forwarder %s, of no egress", orphan.spec.label)
                await orphan.end()
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        try:
            known = self._egresses.values()
            await self._ways.sweep([lane.plan for one in known for lane in one.lanes.values()])
        except HostError as error:
            log.warning("cannot look for ways of no egress: %s", error.message)

    def _leftovers(self) -> list[Path]:
        known = {Path(f.spec.directory) for e in self._egresses.values() for f in e.forwarders}
        found = self._directory.iterdir() if self._directory.is_dir() else []
        return [path for path in found if path.is_dir() and path not in known]

    # --- changes ------------------------------------------------------------------------------

    async def create(self, spec: EgressSpec) -> EgressView:
        """Make an egress, and return it once it can be used.

        Raises Conflict, InvalidRequest, HostError or Timeout; nothing of it is left then.
        """
        return await self._tasks.run(self._in_turn(self._create(spec)))

    async def switch(self, name: str) -> EgressView:
        """Have the standby take over. Raises NotFound, Conflict; Timeout when it does not."""
        return await self._tasks.run(self._in_turn(self._switch(name)))

    async def _switch(self, name: str) -> EgressView:
        egress = self._find(name)
        await egress.switch()
        return egress.view()

    async def remove(self, name: str) -> None:
        """Take an egress away. Raises NotFound; Conflict while a policy names it; HostError or
        Timeout when something of it stays: it is `removing` then, and can be removed again."""
        await self._tasks.run(self._in_turn(self._remove(name)))

    async def _in_turn(self, work: Coroutine[Any, Any, Any]) -> Any:
        async with self._turn:
            return await work

    async def _create(self, spec: EgressSpec) -> EgressView:
        self._check(spec)
        await self._ways.open()
        await self._ways.check(spec)
        taken = {one.plan.index for one in self._egresses.values()}
        plan = await self._ways.find(taken, spec)
        row = await self._rows.add(spec, plan.index)
        egress = self._egresses[spec.name] = self._known(row)
        try:
            await self._lanes.begin(egress, egress.lanes[0], fresh=True)
            for _ in range(1, spec.min):
                await self._lanes.add(egress)
            await self._lanes.spread(egress)
            await self._rows.state(spec.name, EgressState.ACTIVE)
            egress.state = EgressState.ACTIVE
            await self._set_exits()
            self._lanes.follow(egress)
        except BaseException:
            egress.state = EgressState.REMOVING
            await self._undo(egress)
            raise
        self._events.emit("egress.created", spec.name, address=spec.address, mark=plan.mark)
        return egress.view()

    async def _remove(self, name: str) -> None:
        egress = self._find(name)
        if users := sorted({user for asked in self.users for user in asked(name)}):
            raise Conflict(
                f"egress {name} is in use: the policy of {', '.join(users)} names it",
                hint="give them another way out, and then: templated net apply",
            )
        before, egress.state = egress.state, EgressState.REMOVING  # no policy can name it now
        if before is not EgressState.REMOVING:
            try:
                await self._rows.state(name, EgressState.REMOVING)
            except BaseException:
                egress.state = before
                raise
        await self._set_exits()
        await self._take_away(egress)
        self._events.emit("egress.removed", name)

    async def _undo(self, egress: Egress) -> None:
        """Take away what was begun; what cannot be is left for the next `rm`, or daemon."""
        try:
            await self._take_away(egress)
        except TemplatedError as error:
            egress.problem = error.message
            log.warning("egress %s stays: %s", egress.name, error.message)
            with contextlib.suppress(TemplatedError):
                await self._rows.state(egress.name, EgressState.REMOVING)
            egress.state = EgressState.REMOVING

    async def _take_away(self, egress: Egress) -> None:
        await self._ways.open()
        for lane in reversed(egress.lanes.values()):
            await self._lanes.end(lane)
        await self._rows.drop(egress.name)
        self._egresses.pop(egress.name, None)
        self._metrics.forget(egress.name)

    def _check(self, spec: EgressSpec) -> None:
        if self._bridge is None or not self._bridge.host_address:
            raise Conflict(
                "an egress needs the host as the clones' gateway",
                hint="network: {mode: bridge, host_address: true}",
            )
        longest = self._directory / f"{spec.name}-{SEATS * spec.max}" / "conntrackd"
        if len(bytes(longest)) > SUN_PATH:
            raise InvalidRequest(
                f"{longest} would be longer than {SUN_PATH} bytes, which a socket may have",
                hint="choose a shorter name, or a shorter runtime_dir",
            )
        if spec.name in self._egresses:
            raise Conflict(f"there is an egress {spec.name} already", hint="templated egress ls")
        if spec.name in ("none", "nat"):
            raise Conflict(f"{spec.name} is an egress of its own kind", hint="choose another name")
        for other in self._egresses.values():
            if other.row.spec.interface == spec.interface:
                raise Conflict(
                    f"interface {spec.interface} is that of egress {other.name}",
                    hint="take another one, such as a VLAN of it",
                )
        for program in PROGRAMS:
            if find(program) is None:
                raise missing(program)

    # --- inside -------------------------------------------------------------------------------

    def _known(self, row: EgressRow) -> Egress:
        try:
            return self._planned(row)
        except ValueError as error:
            raise HostError(
                f"egress {row.spec.name}: {error}", hint="set egress.links back to what it was"
            ) from error

    def _planned(self, row: EgressRow) -> Egress:
        seats = self._ways.seats(row.spec)
        plan = self._ways.plan(row.index, side=seats[0] if row.spec.hosts and seats else 1)
        egress = Egress(row, plan, self._events, self._metrics)
        if not seats:
            egress.problem = f"neither of its hosts has its clones in {self._clones}, as this one"
        for number, state in ((0, LaneState.SERVING), *row.lanes):
            self._lanes.know(egress, number, state)
        return egress

    def _forwarder(self, egress: Egress, plan: LinkPlan, number: int) -> ForwarderSpec:
        return ForwarderSpec(
            egress=egress.row.spec,
            number=number,
            owner=self._ways.owner,
            index=plan.index,
            link=str(plan.network),
            inside=plan.inside,
            sync=plan.sync,
            clones=str(self._clones),
            links=str(self._links),
            netns=self._bridge.netns if self._bridge else None,
            directory=str(self._directory / f"{egress.name}-{number}"),
        )

    async def _set_exits(self) -> None:
        active = [one for one in self._egresses.values() if one.state is EgressState.ACTIVE]
        await self._network.set_exits([Exit(e.name, e.plan.mark, e.plan.inside) for e in active])

    def _find(self, name: str) -> Egress:
        try:
            return self._egresses[name]
        except KeyError:
            raise NotFound(f"there is no egress {name}", hint="see: templated egress ls") from None
