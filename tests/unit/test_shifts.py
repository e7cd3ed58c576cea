"""Requests that move to another version: once its instances are ready, and what if not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from templated.drivers.guest_functions import InitFailed, LoadOrder
from templated.errors import Busy, Changed, Conflict, InvalidRequest, NotFound, StartError, Timeout
from templated.model.function import UpdateView
from templated.services.functions.kept import Kept
from templated.services.functions.shifts import Shifts, share
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, Held, World, echo, loaded, settle
from tests.unit.test_registry import Rig, play, refused

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


class House:
    """Functions of a registry over instances that are fakes."""

    def __init__(self, rig: Rig, patience: float = 60.0, **settings: Any) -> None:
        self.rig = rig
        self.registry = rig.registry
        self.world = World(rig.registry, **settings)  # type: ignore[arg-type]
        self.crews = self.world.crews
        self.shifts = Shifts(rig.registry, self.crews, self.world.tasks, rig.bus, patience)
        self.kept = Kept(rig.registry, self.crews)
        rig.registry.on_changed.append(self.shifts.changed)
        rig.registry.on_removed += [self.world.router.removed, self.shifts.removed]
        rig.registry.on_kept.append(self.kept.changed)
        self.gate = asyncio.Event()
        self.gate.set()
        self.world.start = self._started

    async def _started(self, _: str) -> None:
        await self.gate.wait()

    async def busy(self, count: int, qualifier: str | None = None) -> None:
        """So many requests at once, and their end: the demand that there is then."""
        held = Held()
        self.world.handler = held
        tasks = [self.world.asking(n, qualifier=qualifier) for n in range(count)]
        await until(lambda: len(held.waiting) == count)
        for n in range(count):
            held.answer(n)
        await asyncio.gather(*tasks)
        self.world.handler = echo

    async def versions_of(self, count: int, qualifier: str | None = None) -> list[str]:
        """The versions that serve so many requests, one after the other, and how."""
        views = [(await self.world.ask(1, qualifier=qualifier)).view for _ in range(count)]
        return [f"{view.version} {view.start}" for view in views]

    def served(self) -> list[str]:
        """The versions of the instances that there are."""
        return sorted(clone.function for clone in self.world.clones.values())

    def codes(self) -> set[str]:
        """The code of the instances of `$LATEST`."""
        return {i.version.code.digest for i in self.world.instances if not i.version.number}

    def told(self, kind: str = "function.shifted") -> list[dict[str, Any]]:
        """What events of a kind say."""
        return [e.details for e in self.rig.bus.recent() if e.type == kind]

    async def close(self) -> None:
        """Nothing is left."""
        self.gate.set()
        await self.world.router.close()
        await self.world.tasks.end()
        assert self.world.clones == {}


async def broken(_: FakeGuest, __: LoadOrder) -> None:
    raise InitFailed("no module named app", payload=b'{"errorType": "ImportError"}')


def test_how_many_a_share_needs() -> None:
    """All of it at a weight of 1; of a part a margin more; at least one, and never more than
    all."""
    assert [share(20, weight) for weight in (1.0, 0.5, 0.1, 0.01)] == [20, 17, 5, 2]
    assert [share(4, weight) for weight in (1.0, 0.5, 0.1)] == [4, 4, 2]
    assert (share(1, 0.1), share(0, 1.0), share(0, 0.1)) == (1, 1, 1)


# --- $LATEST ----------------------------------------------------------------------------------


def test_the_old_code_serves_until_the_new_one_is_ready(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = House(rig)
        old = await rig.deploy()
        assert house.shifts.update("f") is None  # nothing served
        await house.busy(3)
        house.gate.clear()
        new = await rig.deploy(content=b"2")
        assert rig.registry.resolve("f", None) == new
        assert house.shifts.update("f") == UpdateView(done=False, wanted=3, ready=0)
        assert await house.versions_of(2) == ["$LATEST warm"] * 2
        assert house.world.ensured.count(new.code.digest) == 3  # they are on their way
        assert house.codes() == {old.code.digest, new.code.digest}
        settled = asyncio.create_task(house.shifts.settled("f"))
        await settle()
        assert not settled.done()
        house.gate.set()
        await settled
        assert house.shifts.update("f") == UpdateView(done=True, wanted=3, ready=3)
        await until(lambda: house.codes() == {new.code.digest})  # the old ones end behind it
        assert await house.versions_of(2) == ["$LATEST warm"] * 2
        assert len(house.world.made) == 6
        assert house.told() == [{"version": "$LATEST", "ready": 3, "wanted": 3}]
        await house.close()

    play(tmp_path, work)


def test_requests_under_way_end_on_their_code(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house, held = House(rig), Held()
        old = await rig.deploy()
        house.world.handler = held
        task = house.world.asking(1)
        await until(lambda: held.waiting)
        new = await rig.deploy(content=b"2")
        await house.shifts.settled("f")
        assert house.codes() == {old.code.digest, new.code.digest}
        held.answer(1)
        assert (await task).view.error is None
        await until(lambda: house.codes() == {new.code.digest})
        await house.close()

    play(tmp_path, work)


def test_a_deploy_that_does_not_wait(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await house.busy(2)
        house.gate.clear()
        new = await rig.deploy(content=b"2")
        house.shifts.hurry("f", 0)
        await house.shifts.settled("f")
        update = house.shifts.update("f")
        assert update is not None and update.done and update.problem == ""
        task = house.world.asking(1)
        await until(lambda: house.codes() == {new.code.digest})
        house.gate.set()
        assert (await task).view.start == "pool"
        house.shifts.hurry("f", 5)  # too late to mean anything
        house.shifts.hurry("g", 5)
        await house.close()

    play(tmp_path, work)


def test_new_code_that_fails_takes_over_and_says_so(tmp_path: Any) -> None:
    """The last deploy wins: one that breaks, too. But not by one failure."""

    async def work(rig: Rig) -> None:
        house = House(rig, pace=0.01)
        await rig.deploy()
        await house.busy(1)
        house.world.load = broken
        await rig.deploy(content=b"2")
        await house.shifts.settled("f")
        update = house.shifts.update("f")
        assert update is not None and update.done and update.ready == 0
        assert update.problem == "its init fails: no module named app"
        assert house.told()[0]["problem"] == update.problem
        assert (await house.world.ask(1)).view.error == "Unhandled"
        house.world.load = loaded
        await rig.deploy(content=b"3")
        assert house.shifts.update("f") is None
        assert (await house.world.ask(1)).view.error is None
        await house.close()

    play(tmp_path, work)


def test_new_code_that_takes_too_long_takes_over(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await house.busy(2)
        house.gate.clear()
        await rig.deploy(content=b"2")
        house.shifts.hurry("f", 0.01)
        await house.shifts.settled("f")
        update = house.shifts.update("f")
        assert update is not None
        assert update.problem == "only 0 of 2 instances were ready in time"
        await house.close()

    play(tmp_path, work)


def test_a_deploy_while_another_one_is_on_its_way(tmp_path: Any) -> None:
    """The one in the middle never serves; the first does until the last is ready."""

    async def work(rig: Rig) -> None:
        house = House(rig)
        first = await rig.deploy()
        await house.busy(1)
        house.gate.clear()
        second = await rig.deploy(content=b"2")
        await settle()
        third = await rig.deploy(content=b"3")
        assert await house.versions_of(1) == ["$LATEST warm"]
        assert house.codes() >= {first.code.digest}
        house.gate.set()
        await house.shifts.settled("f")
        await until(lambda: house.codes() == {third.code.digest})
        assert second.code.digest not in house.codes()
        assert len(house.told()) == 1
        await house.close()

    play(tmp_path, work)


def test_old_instances_that_die_meanwhile(tmp_path: Any) -> None:
    """No new one of the old code is begun: the new code serves."""

    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await house.busy(1)
        house.gate.clear()
        new = await rig.deploy(content=b"2")
        house.world.made[0].vm.machine.end()
        await until(lambda: not house.world.clones)
        task = house.world.asking(1)
        await settle()
        house.gate.set()
        assert (await task).view.start == "pool"
        await house.shifts.settled("f")
        assert house.codes() == {new.code.digest}
        await house.close()

    play(tmp_path, work)


def test_no_room_for_both(tmp_path: Any) -> None:
    """What fits beside those that serve is waited for; when nothing does, nothing is."""

    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await rig.registry.scale("f", most=3)
        await house.busy(2)
        await rig.deploy(content=b"2")
        await house.shifts.settled("f")
        update = house.shifts.update("f")
        assert update is not None and (update.wanted, update.ready) == (1, 1)
        await until(lambda: house.served() == ["f:$LATEST"])
        await rig.registry.scale("f", most=1)
        await rig.deploy(content=b"3")
        await house.shifts.settled("f")
        update = house.shifts.update("f")
        assert update is not None and "there was no room" in update.problem
        assert (await house.world.ask(1)).view.error is None
        await house.close()

    play(tmp_path, work)


def test_what_is_kept_follows_a_deploy(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await rig.registry.scale("f", least=2)
        await until(lambda: house.served() == ["f:$LATEST"] * 2)
        for instance in house.crews.of(rig.registry.latest("f")).resting:
            instance.used -= 3600.0  # nobody has asked for long: there is no demand
        new = await rig.deploy(content=b"2")
        await house.shifts.settled("f")
        assert house.shifts.update("f") == UpdateView(done=True, wanted=2, ready=2)
        await until(lambda: house.codes() == {new.code.digest} and len(house.world.clones) == 2)
        await house.close()

    play(tmp_path, work)


def test_a_removal_in_the_middle(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await house.busy(1)
        house.gate.clear()
        await rig.deploy(content=b"2")
        settled = asyncio.create_task(house.shifts.settled("f"))
        await settle()
        await rig.registry.remove("f")
        await settled
        assert house.shifts.update("f") is None
        house.gate.set()
        await until(lambda: not house.world.clones)
        with pytest.raises(NotFound):
            await house.world.ask(1)
        await house.close()

    play(tmp_path, work)


def test_a_daemon_that_ends_in_the_middle(tmp_path: Any) -> None:
    """Whoever waits is not left waiting, and the next daemon serves the new code."""

    async def first(rig: Rig) -> None:
        house = House(rig)
        await rig.deploy()
        await house.busy(1)
        house.gate.clear()
        await rig.deploy(content=b"2")
        settled = asyncio.create_task(house.shifts.settled("f"))
        await settle()
        await house.close()
        await settled

    async def second(rig: Rig) -> None:
        house = House(rig)
        assert (await house.world.ask(1)).view.start == "pool"
        assert house.codes() == {rig.registry.latest("f").code.digest}
        await house.close()

    play(tmp_path, first, second)


# --- aliases ----------------------------------------------------------------------------------


async def two_versions(rig: Rig, **settings: Any) -> House:
    """An alias of version 1, beside which there is another."""
    house = House(rig, **settings)
    await rig.published(2)
    await house.shifts.move("f", "live", {"1": 1.0})
    return house


def test_an_alias_moves_when_instances_are_ready(tmp_path: Any) -> None:
    """In steps, and back; all requests of the new version are served warm."""

    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(4, "live")
        house.gate.clear()
        moving = asyncio.create_task(house.shifts.move("f", "live", {"1": 0.9, "2": 0.1}))
        await until(lambda: house.crews.supply(rig.registry.version("f", "2")).starting)
        rig.drawn = 0.95
        assert await house.versions_of(2, "live") == ["1 warm"] * 2
        house.gate.set()
        assert (await moving).versions == {"1": 0.9, "2": 0.1}
        assert house.served() == ["f:1"] * 4 + ["f:2"] * 2
        assert await house.versions_of(2, "live") == ["2 warm"] * 2
        await house.shifts.move("f", "live", {"1": 0.5, "2": 0.5})
        assert house.served().count("f:2") == 4  # as many as were ever of use at once
        await house.shifts.move("f", "live", {"2": 1.0})
        assert await house.versions_of(3, "live") == ["2 warm"] * 3
        made = len(house.world.made)
        await house.shifts.move("f", "live", {"1": 1.0})
        assert await house.versions_of(1, "live") == ["1 warm"]
        assert len(house.world.made) >= made
        told = house.told()
        assert told[0] == {"version": "2", "ready": 2, "wanted": 2, "alias": "live"}
        assert house.crews.supply(rig.registry.version("f", "2")).aim == 0
        await house.close()

    play(tmp_path, work)


def test_less_weight_waits_for_nothing(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        house.gate.clear()
        # Nothing serves: there is no demand to be ready for.
        await house.shifts.move("f", "live", {"2": 1.0})
        await house.shifts.move("f", "new", {"1": 0.5, "2": 0.5})
        assert house.world.made == []
        await house.close()

    play(tmp_path, work)


def test_an_alias_that_is_moved_at_once(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(1, "live")
        house.gate.clear()
        await house.shifts.move("f", "live", {"2": 1.0}, within=0)
        assert rig.registry.resolve("f", "live").number == 2
        await house.close()

    play(tmp_path, work)


def test_instances_that_take_too_long(tmp_path: Any) -> None:
    """Nothing has moved, and the message says how far it came."""

    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(2, "live")
        house.gate.clear()
        move = house.shifts.move("f", "live", {"2": 1.0}, within=0.02)
        error = await refused(Timeout, move, "alias live of f has not moved")
        assert "after 0.02 s 0 of 2 of f:2 are ready" in error.message
        assert "--wait" in error.hint and "--now" in error.hint
        assert rig.registry.aliases("f")[0].versions == {"1": 1.0}
        assert house.crews.supply(rig.registry.version("f", "2")).aim == 0
        await house.close()

    play(tmp_path, work)


def test_instances_that_cannot_be_had(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig, pace=0.01)
        await house.busy(1, "live")
        house.world.load = broken
        move = house.shifts.move("f", "live", {"2": 1.0})
        error = await refused(StartError, move, "no instance of f:2 can be had: its init fails")
        assert "function logs f" in error.hint
        assert rig.registry.resolve("f", "live").number == 1
        await house.close()

    play(tmp_path, work)


def test_no_room_for_another_version(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await rig.registry.scale("f", most=2)
        await house.busy(2, "live")
        move = house.shifts.move("f", "live", {"2": 1.0})
        error = await refused(Busy, move, "no room for an instance of f:2")
        assert "--now" in error.hint
        await house.close()

    play(tmp_path, work)


def test_what_no_alias_can_be_is_said_at_once(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(1, "live")
        move = house.shifts.move
        await refused(NotFound, move("f", "live", {"9": 1.0}), "no version 9")
        await refused(NotFound, move("g", "live", {"1": 1.0}), "no function g")
        await refused(InvalidRequest, move("f", "live", {"1": 0.5, "2": 0.4}), "add up to 0.9")
        assert house.world.made[1:] == []
        await house.close()

    play(tmp_path, work)


def test_an_alias_that_changes_meanwhile(tmp_path: Any) -> None:
    """The later one has its way, and the first is told."""

    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(1, "live")
        house.gate.clear()
        slow = asyncio.create_task(house.shifts.move("f", "live", {"2": 1.0}))
        await settle()
        await house.shifts.move("f", "live", {"1": 1.0}, description="stays", within=0)
        house.gate.set()
        with pytest.raises(Changed):
            await slow
        assert rig.registry.aliases("f")[0].description == "stays"
        await house.close()

    play(tmp_path, work)


def test_what_is_provisioned_is_ready_before_an_alias_moves(tmp_path: Any) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await rig.registry.provision("f", "live", 3)
        await until(lambda: house.served() == ["f:1"] * 3)
        await house.shifts.move("f", "live", {"1": 0.9, "2": 0.1})
        assert house.served().count("f:2") >= 1
        await house.shifts.move("f", "live", {"2": 1.0})
        assert house.served().count("f:2") >= 3
        await house.close()

    play(tmp_path, work)


def test_requests_follow_an_alias_that_was_written(tmp_path: Any) -> None:
    """As the gateway has it: it is answered, and requests go to the old one for a moment."""

    async def work(rig: Rig) -> None:
        house = await two_versions(rig)
        await house.busy(2, "live")
        house.gate.clear()
        alias = await rig.registry.set_alias("f", "live", {"2": 1.0}, hold=True)
        house.shifts.follow(alias)
        assert rig.registry.aliases("f") == [alias]
        assert await house.versions_of(1, "live") == ["1 warm"]
        await refused(Conflict, rig.registry.remove("f", "1"), "the alias live points at version 1")
        house.gate.set()
        await until(lambda: rig.registry.resolve("f", "live").number == 2)
        assert await house.versions_of(2, "live") == ["2 warm"] * 2
        await rig.registry.remove("f", "1")
        await house.close()

    play(tmp_path, work)


@pytest.mark.parametrize("how", ["slow", "fails", "nothing", "again", "gone"])
def test_requests_follow_in_any_case(tmp_path: Any, how: str) -> None:
    async def work(rig: Rig) -> None:
        house = await two_versions(rig, patience=0.05, pace=0.005)
        if how != "nothing":
            await house.busy(1, "live")
        if how == "fails":
            house.world.load = broken
        else:
            house.gate.clear()
        alias = await rig.registry.set_alias("f", "live", {"2": 1.0}, hold=True)
        house.shifts.follow(alias)
        if how == "nothing":
            assert rig.registry.resolve("f", "live").number == 2  # at once
        if how == "again":
            await house.shifts.move("f", "live", {"1": 1.0}, within=0)
            await asyncio.sleep(0.1)
            assert rig.registry.resolve("f", "live").number == 1
            await house.close()
            return
        if how == "gone":
            await rig.registry.remove_alias("f", "live")
            await until(house.told)
            await house.close()
            return
        await until(lambda: rig.registry.resolve("f", "live").number == 2)
        if how != "nothing":
            await until(lambda: house.told() and house.told()[0].get("problem"))
        await house.close()

    play(tmp_path, work)
