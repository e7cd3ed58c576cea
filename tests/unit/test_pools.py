"""Pools over a fake hypervisor: who gets a member, and what happens to those that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from templated.drivers.host.pressure import Pressure
from templated.drivers.host.procfs import Memory
from templated.drivers.hypervisor.fake import FakeHypervisor, FakeMachine
from templated.drivers.hypervisor.states import MachineState
from templated.errors import Busy, HostError, InvalidRequest, NotFound, StartError, Timeout
from templated.model.api import CloneRequest, PoolRequest
from templated.model.clone import CloneView, StartPath
from templated.services.daemon import Services
from templated.services.pools import capacity, refill
from templated.services.pools.capacity import Demand, require_room
from templated.services.pools.members import Pool
from tests.unit.fake_daemon import play, until

WARM: Pool = ("t", StartPath.WARM)
STANDBY: Pool = ("t", StartPath.STANDBY)


async def fill(running: Services, standby: int = 0, warm: int = 0) -> None:
    """Set the pools of `t` and wait until they are full."""
    pools = running.pools
    await pools.set("t", PoolRequest(standby=standby, warm=warm))
    await until(lambda: not pools.missing(WARM) and not pools.missing(STANDBY))


async def clone(running: Services, name: str, path: str | None = None) -> CloneView:
    (view,) = await running.clones.create(CloneRequest(name=name, path=path))  # type: ignore[arg-type]
    return view


def waiting(running: Services, fake: FakeHypervisor, pool: Pool) -> list[FakeMachine]:
    """The fake machines of a pool's members, oldest first."""
    return [fake.machines[m.vm.machine.pid] for m in running.pools.ready(pool)]


def counted(running: Services, name: str, **labels: str) -> float:
    return running.context.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(autouse=True)
def no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on this host."""
    monkeypatch.setattr(capacity, "read_pressure", lambda _: None)


def stop_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the host is under pressure."""
    monkeypatch.setattr(capacity, "read_pressure", lambda _: Pressure(some=99.0, full=0.0))


def test_the_fastest_path_that_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=1, warm=1)
        stop_refill(monkeypatch)
        made = [await clone(running, name) for name in ("a", "b", "c")]
        assert [view.path.value for view in made] == ["warm", "standby", "direct"]
        assert list(made[0].phases_ms) == ["allocate", "resume", "identify", "link"]
        assert list(made[1].phases_ms) == ["allocate", "restore", "resume", "identify", "link"]
        assert [v.identity.hostname for v in made] == ["a", "b", "c"]
        assert len({v.identity.machine_id for v in made}) == 3
        assert all(m.link_up for m in fake.running() if m.launch.uuid in {v.uuid for v in made})
        assert counted(running, "templated_pool_misses_total", template="t", tier="warm") == 2
        assert counted(running, "templated_pool_misses_total", template="t", tier="standby") == 1
        assert counted(running, "templated_pool_size", template="t", tier="warm") == 0
        rows = {row.name: row for row in await running.context.journal.clones()}
        assert [rows[name].path.value for name in "abc"] == ["warm", "standby", "direct"]
        assert rows["a"].pid == made[0].pid and rows["a"].total_ms == made[0].total_ms
        for name in "abc":
            await running.clones.remove(name)

    play(tmp_path, scenario)


def test_a_demanded_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        with pytest.raises(StartError, match="no warm VM of t is ready"):
            await clone(running, "a", "warm")
        await fill(running, standby=1, warm=1)
        stop_refill(monkeypatch)
        assert (await clone(running, "a", "direct")).path == "direct"
        assert (await clone(running, "b", "standby")).path == "standby"
        with pytest.raises(StartError, match="no standby VM") as caught:
            await clone(running, "c", "standby")
        assert caught.value.reason == "busy"
        assert (await clone(running, "c", "warm")).path == "warm"

    play(tmp_path, scenario)


def test_a_member_that_ends_is_never_handed_out(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=2)
        first = waiting(running, fake, WARM)[0]
        first.end("was killed by SIGKILL")
        await until(lambda: first not in waiting(running, fake, WARM))
        view = await clone(running, "a")
        assert view.path == "warm" and view.pid != first.pid
        await until(lambda: not running.pools.missing(WARM))
        lost = {"template": "t", "tier": "warm", "reason": "exited"}
        assert counted(running, "templated_pool_refill_failures_total", **lost) == 1
        events = [e for e in running.context.events.recent() if e.type == "pool.member_lost"]
        assert "SIGKILL" in str(events)

    play(tmp_path, scenario)


def test_a_claim_that_fails_takes_the_next_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=2)
        stop_refill(monkeypatch)
        bad, good = waiting(running, fake, WARM)
        bad.fail = "claim"
        view = await clone(running, "a")
        assert (view.path, view.pid) == ("warm", good.pid)
        await until(bad.exited.done)
        slots = {slot.uuid for slot in await running.context.journal.free_slots()}
        assert bad.launch.uuid not in slots
        lost = {"template": "t", "tier": "warm", "reason": "claim"}
        assert counted(running, "templated_pool_refill_failures_total", **lost) == 1

    play(tmp_path, scenario)


@pytest.mark.parametrize("step", ["resume", "claim", "link", "silence", "clock"])
def test_when_all_claims_fail_the_clone_starts_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=2)
        stop_refill(monkeypatch)
        members = waiting(running, fake, WARM)
        for machine in members:
            machine.fail = step
        view = await clone(running, "a")
        assert view.path == "direct" and list(view.phases_ms)[:2] == ["allocate", "spawn"]
        assert all(machine.exited.done() for machine in members)
        await running.clones.remove("a")

    play(tmp_path, scenario)


def test_a_claim_that_cannot_be_written_down(tmp_path: Path) -> None:
    """A full disk is no fault of the member's: no further ones are spent on it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=2)

        async def full(*_: object, **__: object) -> None:
            raise HostError("the journal cannot be used: disk full")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(running.context.journal, "new_clone", full)
            with pytest.raises(StartError, match="disk full"):
                await clone(running, "a")
        assert running.clones.views() == []
        await until(lambda: not running.pools.missing(WARM))

    play(tmp_path, scenario)


def test_two_hundred_requests_for_a_pool_of_five(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=2, warm=5)
        made = await asyncio.gather(*(clone(running, f"c{i}") for i in range(200)))
        assert len({view.name for view in made}) == 200
        for key in ("uuid", "pid"):
            assert len({getattr(view, key) for view in made}) == 200
        for key in ("mac", "ip", "machine_id", "boot_id", "hostname"):
            assert len({getattr(view.identity, key) for view in made}) == 200
        paths = [view.path.value for view in made]
        assert paths.count("warm") >= 5 and paths.count("direct") > 0
        assert len(await running.context.journal.clones()) == 200

    play(tmp_path, scenario)


def test_refill_that_fails_backs_off(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        fake.fail = "claim"
        await running.pools.set("t", PoolRequest(warm=1))
        await until(lambda: running.pools.problems)
        assert "failed once: " in running.pools.view("t").problem
        assert (await clone(running, "a")).path == "direct"
        failures = {"template": "t", "tier": "warm", "reason": "identity"}
        name = "templated_pool_refill_failures_total"
        assert counted(running, name, **failures) == 1
        await until(lambda: counted(running, name, **failures) == 2)
        assert [m.launch.uuid for m in fake.running()] == [running.clones.view("a").uuid]
        fake.fail = ""
        await until(lambda: not running.pools.missing(WARM))
        await until(lambda: not running.pools.view("t").problem)

    play(tmp_path, scenario)


def test_a_member_gives_way_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host whose CPUs are busy it would otherwise never be ready."""
    monkeypatch.setattr(refill, "_GIVES_WAY", 0.05)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        held = fake.hold("restore")
        await running.pools.set("t", PoolRequest(warm=1))
        await until(lambda: [m.priorities for m in fake.running()] == [[True, False]])
        assert running.pools.missing(WARM)
        held.set()
        await until(lambda: not running.pools.missing(WARM))
        monkeypatch.setattr(refill, "_GIVES_WAY", 60.0)
        await fill(running, warm=2)
        quick = waiting(running, fake, WARM)[1]
        assert quick.priorities == [True, False]

    play(tmp_path, scenario)


def test_refill_stops_under_pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        stop_refill(monkeypatch)
        await running.pools.set("t", PoolRequest(warm=1))
        await until(lambda: running.pools.problems)
        assert "cpu pressure is 99 % (limit 80)" in running.pools.view("t").problem
        assert counted(running, "templated_pool_refill_blocked", resource="cpu") == 1
        assert fake.machines == {}
        monkeypatch.setattr(capacity, "read_pressure", lambda _: None)
        await until(lambda: not running.pools.missing(WARM))
        assert counted(running, "templated_pool_refill_blocked", resource="cpu") == 0

    play(tmp_path, scenario)


def test_pools_shrink(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=2, warm=2)
        await running.pools.set("t", PoolRequest(warm=1, standby=0))
        await until(lambda: len(fake.running()) == 1)
        assert running.pools.view("t").warm.ready == 1

    play(tmp_path, scenario)


def test_members_that_do_not_answer_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refill, "_HEALTH_TIMEOUT", 0.05)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=1, warm=2)
        (standby,) = waiting(running, fake, STANDBY)
        silent, ill = waiting(running, fake, WARM)
        silent.fail, ill.says, standby.says = "status", MachineState.RUNNING, MachineState.PAUSED
        pools = running.pools
        for pool in (WARM, STANDBY):
            await running.refill.check(pool)
        assert all(machine.exited.done() for machine in (standby, silent, ill))
        await until(lambda: not pools.missing(WARM) and not pools.missing(STANDBY))
        lost = {"template": "t", "tier": "warm", "reason": "unhealthy"}
        assert counted(running, "templated_pool_refill_failures_total", **lost) == 2

    play(tmp_path, scenario)


def test_members_of_a_libvirt_that_hangs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can be asked how they are; those that say that they are ill go all the same."""
    monkeypatch.setattr(refill, "_HEALTH_TIMEOUT", 0.05)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=3)
        hanging, slow, ill = machines = waiting(running, fake, WARM)
        for machine in machines:
            machine.placed = True
        ill.says = MachineState.RUNNING
        monkeypatch.setattr(hanging, "status", asyncio.Event().wait)
        monkeypatch.setattr(slow, "status", AsyncMock(side_effect=Timeout("libvirt hangs")))
        await running.refill.check(WARM)
        assert [machine.exited.done() for machine in machines] == [False, False, True]

    play(tmp_path, scenario)


def test_members_that_are_too_old_are_replaced(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, warm=2)
        old, other = running.pools.ready(WARM)
        old.made -= 1e6
        pools = running.pools
        await running.refill.check(WARM)
        assert old.vm.machine.exited.done() and not other.vm.machine.exited.done()
        await until(lambda: not pools.missing(WARM))

    play(tmp_path, scenario)


def test_a_restart_ends_members_and_keeps_sizes(tmp_path: Path) -> None:
    async def first(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=1, warm=1)
        await clone(running, "a")

    async def second(running: Services, fake: FakeHypervisor) -> None:
        pools = running.pools
        assert pools.view("t").warm.target == 1
        await until(lambda: not pools.missing(WARM) and not pools.missing(STANDBY))
        assert len(fake.running()) == 3
        assert running.clones.view("a").path == "warm"
        view = await pools.set("t", PoolRequest(reset=True))
        assert (view.warm.target, view.standby.target) == (0, 0)
        await until(lambda: len(fake.running()) == 1)

    play(tmp_path, first, second)


def test_a_removed_template_takes_its_members_along(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        await fill(running, standby=1, warm=1)
        await running.templates.remove("t")
        assert fake.running() == [] and running.pools.views() == []
        assert await running.context.journal.pool_sizes() == {}
        assert await running.context.journal.free_slots() == []

    play(tmp_path, scenario)


def test_bad_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        pools = running.pools
        with pytest.raises(NotFound):
            await pools.set("none", PoolRequest(warm=1))
        with pytest.raises(InvalidRequest, match="exclude"):
            await pools.set("t", PoolRequest(warm=1, reset=True))
        await fill(running, warm=1)
        memory = Memory(total=8 << 30, available=1 << 30)
        monkeypatch.setattr(capacity, "read_memory", lambda: memory)
        with pytest.raises(Busy, match="1999 warm t x 1 MiB = 1999 MiB, but of the 1024 MiB"):
            await pools.set("t", PoolRequest(warm=2000))
        with pytest.raises(Busy, match="addresses"):
            await pools.set("t", PoolRequest(warm=70000, standby=70000))
        assert pools.view("t").warm.target == 1

    play(tmp_path, scenario)


def test_the_arithmetic() -> None:
    memory = Memory(total=10 << 30, available=2 << 30)
    demand = Demand("warm t", count=100, have=90, cost=40 << 20)
    require_room([demand], 1000, memory)
    with pytest.raises(Busy, match=r"10 warm t x 400 MiB = 4000 MiB, but of the 2048 MiB"):
        require_room([Demand("warm t", 100, 90, 400 << 20)], 1000, memory)
    with pytest.raises(Busy, match="100 pool members are more than the subnet's 99 addresses"):
        require_room([demand], 99, memory)


def test_what_is_promised_holds_a_pool_back(tmp_path: Path) -> None:
    """A pool that may have no more members is not broken: it says why, and goes on when it may.

    A clone that takes a member adds nothing; a request for too many is refused before any starts.
    """

    async def scenario(running: Services, _: FakeHypervisor) -> None:
        pools = running.pools
        await pools.set("t", PoolRequest(standby=3))
        await until(lambda: len(pools.ready(STANDBY)) == 2 and "256 MiB" in pools.view("t").problem)
        failures = "templated_pool_refill_failures_total"
        assert not counted(running, failures, template="t", tier="standby", reason="busy")
        await clone(running, "a")
        with pytest.raises(Busy, match="may come to use 128 MiB of memory"):
            await clone(running, "b", "direct")
        with pytest.raises(Busy, match="2 VMs of t may come to use 256 MiB of memory"):
            await running.clones.create(CloneRequest(name="c", count=3))
        assert [view.name for view in running.clones.views()] == ["a"]
        await running.clones.remove("a")
        await until(lambda: len(pools.ready(STANDBY)) == 2)
        assert not counted(running, "templated_clone_failures_total", template="t", reason="busy")

    play(tmp_path, scenario, limits={"memory": "300MiB"})


def test_clones_of_an_earlier_daemon_count(tmp_path: Path) -> None:
    """Those that run, and not those that are dead."""

    async def before(running: Services, fake: FakeHypervisor) -> None:
        for name in ("alive", "dies"):
            await clone(running, name)
        dies = running.clones.running("dies").machine
        fake.machines[dies.pid].end("was killed by SIGKILL")
        await until(lambda: running.clones.view("dies").state.value == "dead")

    async def after(running: Services, _: FakeHypervisor) -> None:
        await clone(running, "second")
        with pytest.raises(Busy, match="and 256 MiB of the 300 MiB"):
            await clone(running, "third")
        await running.clones.remove("alive")
        await clone(running, "third")

    play(tmp_path, before, after, limits={"memory": "300MiB"})
