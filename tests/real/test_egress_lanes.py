"""Several active forwarders of one egress: new flows spread, replies steered, lanes come and go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from templated.model.egress import EgressView, LaneState
from tests.real.egress_parts import Daemon, answer, daemon, in_thread, rigged, server, until
from tests.real.egress_rig import FIXED, NEEDS, Flows, Rig, run

pytestmark = NEEDS
_DELAYED = "net.netfilter.nf_conntrack_tcp_timeout_time_wait"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as made:
        yield made


@asynccontextmanager
async def quick(rig: Rig, tmp_path: Path, quiet: str = "4s") -> AsyncIterator[Daemon]:
    """A daemon whose lanes leave soon."""
    async with daemon(rig, tmp_path, quiet=quiet, drain="60s") as made:
        yield made


def states(view: EgressView) -> list[LaneState]:
    return [lane.state for lane in view.lanes]


def forget_closed(view: EgressView) -> None:
    """Flows that have ended are tracked for two minutes otherwise."""
    for one in view.forwarders:
        with contextlib.suppress(Exception):
            run("nsenter", "-n", "-t", str(one.pid), "sysctl", "-qw", f"{_DELAYED}=1")


def test_lanes_follow_the_load(rig: Rig, tmp_path: Path) -> None:
    """1, 3, 1 under flows that go on all the time: none is lost, none moves, all is given back."""

    async def scenario() -> None:
        before = rig.shown()
        async with quick(rig, tmp_path) as made:
            await made.egresses.create(rig.spec(max=3, bandwidth="256KiB"))
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.watch()
            flows = await in_thread(Flows, rig, 20, 24.0, 9000)
            load = await in_thread(Flows, rig, 400, 9.0, 9001)
            try:
                view = await until(made, lambda v: states(v) == [LaneState.SERVING] * 3)
                later = await in_thread(Flows, rig, 60, 12.0, 9002)
                forget_closed(view)
                view = await until(made, lambda v: all(lane.flows > 5 for lane in v.lanes[1:]))
                lost, _, sources = await in_thread(load.result)
                assert (lost, sources) == (0, {FIXED})
                view = await until(made, lambda v: LaneState.DRAINING in states(v), 30)
                # Those that began when there were three stay where they are.
                assert all(lane.flows > 5 for lane in view.lanes[1:])
                for one in (later, flows):
                    lost, _, sources = await in_thread(one.result)
                    assert (lost, sources) == (0, {FIXED})
                view = await until(made, lambda v: len(v.lanes) == 1, 60)
            finally:
                for one in (flows, load):
                    one.close()
            assert rig.wrong() == 0
            assert [one.number for one in view.forwarders] == [1, 2]
            assert len(list(rig.directory.iterdir())) == 2
            await made.egresses.remove("acme")
        rig.host.run("nft", "delete", "table", "ip", "marks")
        assert rig.shown() == before

    asyncio.run(scenario())


@pytest.mark.long
def test_takeover_in_another_lane(rig: Rig, tmp_path: Path) -> None:
    """Killed, switched, adopted: flows of both lanes go on, and outside there is one MAC."""

    async def scenario() -> None:
        before = rig.shown()
        async with quick(rig, tmp_path) as made:
            view = await made.egresses.create(rig.spec(min=2, max=2))
            assert [lane.active for lane in view.lanes] == [1, 3]
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.watch()
            flows = await in_thread(Flows, rig, 50, 6.0)
            try:
                macs = _neighbours(rig)
                await asyncio.sleep(1)
                os.kill(view.forwarders[2].pid, signal.SIGKILL)
                await until(made, lambda v: v.lanes[1].active == 4)
                assert _neighbours(rig) == macs
                await until(made, lambda v: all(one.pid for one in v.forwarders) and not v.problem)
                await made.egresses.switch("acme")
                assert [lane.active for lane in made.egresses.view("acme").lanes] == [2, 3]
                lost, _, sources = await in_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources, rig.wrong()) == (0, {FIXED}, 0)
            pids = {one.pid for one in made.egresses.view("acme").forwarders}
        async with quick(rig, tmp_path) as made:
            view = await until(made, lambda v: len([one for one in v.forwarders if one.pid]) == 4)
            assert {one.pid for one in view.forwarders} == pids
            with server(rig):
                assert {await in_thread(answer, rig) for _ in range(6)} == {FIXED}
            await made.egresses.remove("acme")
        rig.host.run("nft", "delete", "table", "ip", "marks")
        assert rig.shown() == before

    asyncio.run(scenario())


def _neighbours(rig: Rig) -> list[str]:
    """The MACs that the VPC has for the fixed address."""
    rows = msgspec.json.decode(rig.vpc.ip("-j", "neigh", "show", FIXED))
    return [row["lladdr"] for row in rows]
