"""Egresses with real forwarders: keepalived, conntrackd and nftables, in network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from templated.errors import Conflict, HostError, InvalidRequest, NotFound, TemplatedError
from templated.model.egress import EgressState, EgressView, Role
from templated.services.egress import egresses
from tests.real.egress_parts import (
    Daemon,
    answer,
    both,
    daemon,
    in_thread,
    left_running,
    rigged,
    roles,
    server,
    until,
)
from tests.real.egress_rig import FIXED, NEEDS, Flows, Rig, run

pytestmark = NEEDS


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rigged(tmp_path) as made:
        yield made


def _dropped(view: EgressView, number: int, reason: str) -> int:
    return view.forwarders[number - 1].counters.get(f"drop_{reason}", (0, 0))[0]


def test_life(rig: Rig, tmp_path: Path) -> None:
    """Made, used, switched, adopted by the next daemon, removed: the host is as it was."""

    async def scenario() -> None:
        before = rig.shown()
        async with daemon(rig, tmp_path) as made:
            view = await made.egresses.create(rig.spec())
            assert (view.state, view.active, view.problem) == (EgressState.ACTIVE, 1, "")
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.watch()
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
                assert (await made.egresses.switch("acme")).active == 2
                assert await in_thread(answer, rig) == FIXED
                await until(made, both)
                assert [e["forwarder"] for e in made.seen("egress.active")] == [1, 2]
                assert rig.wrong() == 0
            pids = [one.pid for one in made.egresses.view("acme").forwarders]
        async with daemon(rig, tmp_path) as made:
            view = await until(made, both)
            assert [one.pid for one in view.forwarders] == pids
            assert view.active == 2
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            await made.egresses.remove("acme")
            assert made.egresses.views() == []
            assert await made.rows.egresses() == []
        rig.host.run("nft", "delete", "table", "ip", "marks")
        assert rig.shown() == before
        assert not left_running(rig)
        assert list(rig.directory.iterdir()) == []

    asyncio.run(scenario())


def test_refusals(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says what is wrong, and leaves nothing."""

    async def scenario() -> None:
        before = rig.shown()
        async with daemon(rig, tmp_path) as made:

            async def refused(kind: type[TemplatedError], part: str, **fields: object) -> None:
                with pytest.raises(kind) as caught:
                    await made.egresses.create(rig.spec(**fields))
                assert part in caught.value.message and "\n" not in caught.value.message

            await refused(HostError, "no interface eth77", interface="eth77")
            await refused(HostError, "has an address of the host", interface="templated0")
            await refused(HostError, "is a port of templated0", interface="tpclone")
            await refused(InvalidRequest, "10.78.0.0/16", to=("10.0.0.0/8",))
            await refused(InvalidRequest, "the forwarders' links", to=("100.64.0.0/10",))
            await refused(Conflict, "of its own kind", name="nat")
            with monkeypatch.context() as short:
                short.setattr(egresses, "SUN_PATH", 20)
                await refused(InvalidRequest, "longer than 20 bytes")
            with monkeypatch.context() as lacking:
                lacking.setattr(egresses, "find", lambda name: None)
                await refused(HostError, "ip is not installed")
            rig.vpc.ip("addr", "add", f"{FIXED}/16", "dev", "eth0")
            await refused(HostError, f"{FIXED} is taken")
            rig.vpc.ip("addr", "del", f"{FIXED}/16", "dev", "eth0")
            rig.host.ip("link", "set", "vpc0", "down")
            await refused(HostError, "interface vpc0 is down")
            rig.host.ip("link", "set", "vpc0", "up")
            assert made.egresses.views() == [] and await made.rows.egresses() == []
            assert rig.shown() == before and not left_running(rig)

            await made.egresses.create(rig.spec(forwarders=1))
            await refused(Conflict, "already")
            await refused(Conflict, "is that of egress acme", name="other")
            made.egresses.users.append(lambda name: ["python-fn"])
            with pytest.raises(Conflict, match="python-fn"):
                await made.egresses.remove("acme")
            with pytest.raises(Conflict, match="no standby"):
                await made.egresses.switch("acme")
            made.egresses.users.clear()
            await made.egresses.remove("acme")
            with pytest.raises(NotFound):
                await made.egresses.remove("acme")
        assert rig.shown() == before

    asyncio.run(scenario())


def _cut(rig: Rig, made: Daemon, number: int) -> None:
    """All links of a forwarder at once."""
    plan = made.egresses._egresses["acme"].plan
    pid = made.egresses.view("acme").forwarders[number - 1].pid
    for leg in (plan.port(number), plan.port(number, sync=True)):
        rig.host.ip("link", "set", leg, "down")
    run("nsenter", "-n", "-t", str(pid), "ip", "link", "set", "out", "down")


def _kill(rig: Rig, made: Daemon, number: int) -> None:
    """Its process, and with it its namespaces."""
    os.kill(made.egresses.view("acme").forwarders[number - 1].pid, signal.SIGKILL)


def _kill_program(pid: int, name: str) -> None:
    """A child of a forwarder's process."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # others come and go
            if Path(f"/proc/{child}/comm").read_text().strip() == name:
                os.kill(int(child), signal.SIGKILL)


def _kill_keepalived(rig: Rig, made: Daemon, number: int) -> None:
    """The program alone: the addresses would stay where they are."""
    pid = made.egresses.view("acme").forwarders[number - 1].pid
    _kill_program(pid, "keepalived")


@pytest.mark.parametrize(
    "failure",
    [_cut, *(pytest.param(one, marks=pytest.mark.long) for one in (_kill, _kill_keepalived))],
)
def test_failover(rig: Rig, tmp_path: Path, failure: Callable[[Rig, Daemon, int], None]) -> None:
    """The standby takes over, with all flows, under the same address."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.watch()
            flows = await asyncio.to_thread(Flows, rig, 50, 3.5)
            try:
                await asyncio.sleep(1)
                await in_thread(failure, rig, made, 1)
                await until(made, lambda view: view.active == 2)
                lost, _, sources = await asyncio.to_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources) == (0, {FIXED})
            assert rig.wrong() == 0
            if failure is not _cut:
                await until(made, both)
                assert made.egresses.view("acme").failovers == 1
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def test_split_brain(rig: Rig, tmp_path: Path) -> None:
    """The links between the two are cut, and none fails: one goes on, alone."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            plan = made.egresses._egresses["acme"].plan
            rig.mark(plan.mark)
            # As between two hosts: each reaches its own, and neither hears the other.
            rig.ports(plan, (1, 2), "isolated", "on")
            await until(made, lambda view: any(one.contested for one in view.forwarders))
            assert made.seen("egress.contested")
            await asyncio.sleep(2.5)
            view = made.egresses.view("acme")
            assert sorted(roles(view)) == [Role.ACTIVE, Role.FAULT], view
            assert "sends under" in view.problem and view.active
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            rig.ports(plan, (1, 2), "isolated", "off")
            await until(made, both)
            await made.egresses.remove("acme")

    asyncio.run(scenario())


@pytest.mark.long
def test_cut_off_from_the_host(rig: Rig, tmp_path: Path) -> None:
    """The active one reaches nobody, with its carrier: it gives up, and the other serves."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            plan = made.egresses._egresses["acme"].plan
            rig.mark(plan.mark)
            rig.ports(plan, (1,), "state", "disabled")
            await until(made, lambda v: roles(v) == [Role.FAULT, Role.ACTIVE])
            await until(made, lambda v: "does not answer" in v.forwarders[0].error)
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            rig.ports(plan, (1,), "state", "forwarding")
            await until(made, both)
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def test_policy_of_a_forwarder(rig: Rig, tmp_path: Path) -> None:
    """Only the clones' subnet, only to the egress's networks, only what was asked for back."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            rig.vpc.ip("addr", "add", "172.30.0.1/16", "dev", "eth0")
            await made.egresses.create(rig.spec(forwarders=1))
            plan = made.egresses._egresses["acme"].plan
            rig.mark(plan.mark)
            rig.watch()
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
                # Not one of its networks: the host's table has no route to it.
                assert await in_thread(answer, rig, 7, "172.30.0.1") == ""
                # And a host that sends it all the same is refused by the forwarder.
                rig.host.ip(
                    "route", "add", "172.30.0.0/16", "via", plan.shared, "table", str(plan.mark)
                )
                assert await in_thread(answer, rig, 7, "172.30.0.1") == ""
                # From outside, nothing that was not asked for.
                rig.vpc.ip("route", "add", "10.78.0.0/16", "via", FIXED)
                assert "172" not in await in_thread(_connects, rig, "10.78.200.3")
                assert "172" not in await in_thread(_connects, rig, FIXED)
                assert rig.wrong() == 0
            await until(made, lambda v: _dropped(v, 1, "unasked") > 0)
            await made.egresses.remove("acme")

    asyncio.run(scenario())


@pytest.mark.long
def test_internet(rig: Rig, tmp_path: Path) -> None:
    """Everywhere, but not to where the host's own networks are, or nobody's."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            rig.vpc.ip("addr", "add", "198.51.100.1/32", "dev", "eth0")
            await made.egresses.create(rig.spec(forwarders=1, to=(), internet=True))
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            with server(rig):
                assert await in_thread(answer, rig, 7, "198.51.100.1") == FIXED
                for never in ("100.127.9.9", "169.254.1.1"):
                    assert await in_thread(answer, rig, 7, never) == ""
            await until(made, lambda v: _dropped(v, 1, "destination") > 1)
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def _connects(rig: Rig, address: str) -> str:
    program = f"import socket; s = socket.create_connection(('{address}', 22), 1); print('172')"
    return rig.vpc.run("python3", "-c", program, check=False)


def test_interface_goes_and_comes_back(rig: Rig, tmp_path: Path) -> None:
    """Packets are dropped meanwhile, and the egress says why."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.host.ip("link", "del", "vpc0")
            view = await until(made, lambda view: "interface vpc0 has gone" in view.problem)
            view = await until(made, lambda view: view.active is None)
            assert "packets are dropped" in view.problem
            rig.join(rig.vpc, "vpc0", "eth0", "172.20.0.1/16")
            await until(made, both)
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def test_orphans(rig: Rig, tmp_path: Path) -> None:
    """What a daemon began and did not end, the next one takes away; and nothing of others."""

    async def scenario() -> None:
        rig.host.ip("rule", "add", "fwmark", "77", "table", "77")
        rig.host.ip("link", "add", "tlother01", "type", "bridge")
        before = rig.shown()
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            # as a daemon leaves it that is killed while it makes or removes one
            await made.rows.drop("acme")
        assert left_running(rig) and rig.shown() != before
        async with daemon(rig, tmp_path) as made:
            assert made.egresses.views() == []
            assert not left_running(rig) and rig.shown() == before
            assert list(rig.directory.iterdir()) == []

    asyncio.run(scenario())


def test_two_tenants_with_the_same_networks(rig: Rig, tmp_path: Path) -> None:
    """Both have 172.20.0.0/16 and a server at the same address: each reaches its own."""
    other = rig.net("other")

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            rig.join(other, "vpc1", "eth0", "172.20.0.1/16")
            await made.egresses.create(rig.spec(forwarders=1))
            await made.egresses.create(
                rig.spec(name="zeta", interface="vpc1", address="172.20.0.101/16", forwarders=1)
            )
            acme, zeta = (made.egresses._egresses[name].plan for name in ("acme", "zeta"))
            assert acme.mark != zeta.mark and not acme.network.overlaps(zeta.network)
            with server(rig):
                rig.mark(acme.mark)
                assert await in_thread(answer, rig) == FIXED
                rig.host.run("nft", "delete", "table", "ip", "marks")
                rig.mark(zeta.mark)
                assert await in_thread(answer, rig) == ""  # there is no server on that side
            for name in ("acme", "zeta"):
                await made.egresses.remove(name)

    asyncio.run(scenario())


@pytest.mark.long
def test_programs_that_end(rig: Rig, tmp_path: Path) -> None:
    """They are started again, which is counted, and the active one stays the active one."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            await made.egresses.create(rig.spec())
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            one, two = (forwarder.pid for forwarder in made.egresses.view("acme").forwarders)
            for pid in (one, two):
                _kill_program(pid, "conntrackd")
            _kill_program(two, "keepalived")
            view = await until(made, lambda v: [f.restarts for f in v.forwarders] == [1, 2])
            view = await until(made, lambda v: both(v) and not v.problem)
            assert (view.active, view.failovers) == (1, 0)
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            await made.egresses.remove("acme")

    asyncio.run(scenario())


def test_one_without_a_standby(rig: Rig, tmp_path: Path) -> None:
    """Killed, it is started again; until then packets are dropped."""

    async def scenario() -> None:
        async with daemon(rig, tmp_path) as made:
            pid = (await made.egresses.create(rig.spec(forwarders=1))).forwarders[0].pid
            rig.mark(made.egresses._egresses["acme"].plan.mark)
            rig.watch()
            os.kill(pid, signal.SIGKILL)
            await until(made, lambda view: view.active is None)
            view = await until(made, lambda view: view.active == 1)
            assert view.forwarders[0].pid != pid
            with server(rig):
                assert await in_thread(answer, rig) == FIXED
            assert rig.wrong() == 0
            await made.egresses.remove("acme")

    asyncio.run(scenario())
