"""Instances ahead of requests: how many there are, who comes first, and what fails again and
again."""

from __future__ import annotations

import asyncio
import json

import pytest

from templated.drivers.guest_functions import InitFailed, LoadOrder
from templated.errors import Busy, GuestError, HostError, StartError
from templated.services.functions.backoff import Backoff, Pace
from templated.services.functions.crew import KEPT
from templated.services.functions.crews import Supply
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, Held, World, play, settle, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
F = {"function": "f", "version": "$LATEST"}


def supply(world: World, name: str = "f") -> Supply:
    return next(s for s in world.crews.supplies() if s.version.function == name)


async def broken(_: FakeGuest, __: LoadOrder) -> None:
    raise InitFailed("no module named app", payload=b'{"errorType": "ImportError"}')


# --- how many there are -----------------------------------------------------------------------


def test_instances_ahead_of_requests() -> None:
    """They are paused at once, and the first request is warm: it had to wait for none."""

    async def scenario(world: World) -> None:
        world.crews.aim(version(), 3)
        await until(lambda: world.states() == {"paused": 3})
        seen = supply(world)
        assert (seen.up, seen.resting, seen.starting, seen.aim) == (3, 3, 0, 3)
        await until(lambda: [c.vm.machine.steps for c in world.made] == [["pause"]] * 3)
        view = (await world.ask(1)).view
        assert view.start == "warm" and list(view.phases_ms) == ["route", "run"]
        assert len(world.made) == 3
        assert world.counted("templated_function_cold_starts_total", **F) == 0
        ahead = "templated_function_starts_ahead_total"
        assert world.counted(ahead, **F, outcome="ok") == 3
        assert world.counted(ahead, **F, outcome="failed") == 0
        assert world.counted("templated_function_aim", **F) == 3
        await settle()
        assert world.states() == {"idle": 1, "paused": 2}  # it has served: a burst may go on

    play(scenario)


def test_an_aim_that_sinks_ends_nothing_by_itself() -> None:
    """Scaling in is `trim`: those that have rested longest, and as many as are said."""

    async def scenario(world: World) -> None:
        world.crews.aim(version(), 5)
        await until(lambda: world.states() == {"paused": 5})
        world.crews.aim(version(), 1)
        await settle()
        assert world.states() == {"paused": 5}
        oldest = world.crews.of(version()).resting[:2]
        assert world.crews.trim(version(), 2) == 2
        assert all(instance.gone for instance in oldest)
        await until(lambda: world.states() == {"paused": 3})
        assert world.crews.trim(version(), 9) == 2  # the aim holds
        await until(lambda: world.states() == {"paused": 1})
        assert world.crews.trim(version(), 1) == 0

    play(scenario)


def test_what_serves_and_what_is_kept_is_not_trimmed() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        world.crews.aim(version(), 3)
        world.crews.aim(version(), 2, KEPT)
        await until(lambda: world.states() == {"paused": 3})
        task = world.asking(1)
        await until(lambda: held.waiting)
        world.crews.aim(version(), 0)
        assert supply(world).kept == 2
        assert world.crews.trim(version(), 9) == 1
        held.answer(1)
        await task

    play(scenario)


def test_starts_ahead_are_bounded_over_all_functions() -> None:
    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        for name in ("a", "b", "c"):
            world.crews.aim(version(name), 4)
        await settle()
        assert world.states() == {"starting": 3}
        # Each gets its first before any gets its second.
        assert [s.starting for s in world.crews.supplies()] == [1, 1, 1]
        gate.set()
        await until(lambda: world.states() == {"paused": 12})

    play(scenario, version("a"), version("b"), version("c"), ahead=3)


def test_requests_come_first() -> None:
    """While they need all the starts that are left to both, none is begun ahead."""

    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        tasks = [world.asking(n, "a") for n in range(2)]
        await settle()
        world.crews.aim(version("b"), 2)
        await settle()
        assert (supply(world, "a").starting, supply(world, "b").starting) == (2, 0)
        gate.set()
        await asyncio.gather(*tasks)
        await until(lambda: supply(world, "b").up == 2)
        assert world.counted("templated_function_cold_starts_total", **{**F, "function": "a"}) == 2

    play(scenario, version("a"), version("b"), ahead=2)


def test_a_request_takes_what_is_begun_already() -> None:
    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        world.crews.aim(version(), 1)
        await settle()
        task = world.asking(1)
        await settle()
        assert world.states() == {"starting": 1}
        gate.set()
        view = (await task).view
        assert view.start == "pool" and len(world.made) == 1

    play(scenario)


def test_never_more_than_there_may_be() -> None:
    """Of all functions, and of one; nothing that rests ends for it."""

    async def scenario(world: World) -> None:
        await world.ask(1, "a")
        world.crews.aim(version("b"), 9)
        world.crews.aim(version("c"), 9)
        await until(lambda: sum(world.states().values()) == 5)
        await settle()
        assert sum(world.states().values()) == 5
        assert supply(world, "a").up == 1 and supply(world, "b").up <= 2
        assert world.crews.room("a") == 0
        world.crews.release(version("c"))
        assert world.crews.trim(version("c"), 1) == 1
        await until(lambda: supply(world, "c").up == 1)
        assert world.crews.room("b") == 0 and world.crews.room("a") == 1

    play(scenario, version("a"), version("b"), version("c"), concurrency=5, most={"b": 2})


def test_requests_evict_what_is_ahead_but_not_what_is_kept() -> None:
    async def scenario(world: World) -> None:
        world.crews.aim(version("a"), 1, KEPT)
        await until(lambda: world.states() == {"paused": 1})
        world.crews.aim(version("b"), 1)
        await until(lambda: world.states() == {"paused": 2})
        await world.ask(1, "c")
        await until(lambda: len(world.clones) == 2)
        assert supply(world, "a").up == 1 and supply(world, "b").up == 0

    play(scenario, version("a"), version("b"), version("c"), concurrency=2)


def test_a_function_that_has_all_it_may_have_changes_its_own() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1, qualifier="1")
        await world.ask(1)
        await until(lambda: len(world.clones) == 1)
        assert [c.function for c in world.clones.values()] == ["f:$LATEST"]

    play(scenario, version(), version(number=1), most={"f": 1})


def test_keep_alive_is_not_used_while_something_scales() -> None:
    async def scenario(world: World) -> None:
        world.crews.aim(version(), 2)
        await until(lambda: world.states() == {"paused": 2})
        world.crews.aim(version(), 0)
        await asyncio.sleep(0.05)
        assert world.states() == {"paused": 2}
        world.crews.release(version())
        await until(lambda: not world.clones)

    play(scenario, freeze_after=0.001, keep_alive=0.01)


def test_what_is_kept_outlives_keep_alive_and_no_more() -> None:
    async def scenario(world: World) -> None:
        world.crews.aim(version(), 1, KEPT)
        await asyncio.gather(*(world.ask(n) for n in range(4)))
        await until(lambda: world.states() == {"paused": 1})
        await asyncio.sleep(0.05)
        assert world.states() == {"paused": 1}
        world.crews.release(version(), KEPT)
        await until(lambda: not world.clones)

    play(scenario, freeze_after=0.001, keep_alive=0.01)


def test_what_is_kept_is_paused_even_when_keep_alive_is_short() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        world.crews.aim(version(), 1, KEPT)
        await until(lambda: world.states() == {"paused": 1})

    play(scenario, freeze_after=1.0, keep_alive=0.01)


def test_one_that_dies_is_replaced() -> None:
    async def scenario(world: World) -> None:
        world.crews.aim(version(), 2)
        await until(lambda: world.states() == {"paused": 2})
        await world.ask(1)
        served = next(i for i in world.instances if i.served)
        world.clones[served.name].vm.machine.end()
        await until(lambda: len(world.made) == 3 and supply(world).up == 2)

    play(scenario)


def test_those_that_die_unused_are_replaced_later_and_later() -> None:
    async def scenario(world: World) -> None:
        world.crews.aim(version(), 1)
        for count in range(1, 4):
            await until(lambda: supply(world).up == 1)
            world.made[-1].vm.machine.end()
            await until(lambda: supply(world).up == 0)
            failures = world.counted("templated_function_start_failures", **F)
            assert failures == count and len(world.made) == count
        pauses = [
            e.details["seconds"] for e in world.events.recent() if e.type == "function.backing_off"
        ]
        assert len(pauses) == 3
        await until(lambda: supply(world).up == 1)
        await world.ask(1)  # it works, after all
        assert world.counted("templated_function_start_failures", **F) == 0

    play(scenario, pace=0.005)


def test_a_version_that_is_gone_is_left_alone() -> None:
    async def scenario(world: World) -> None:
        old = version(code="a")
        world.crews.aim(old, 1)
        await until(lambda: supply(world).up == 1)
        new = version(code="b")
        world.versions.found["f", "$LATEST"] = new
        world.crews.changed(new)
        world.crews.aim(old, 5)
        world.crews.release(old)
        assert world.crews.trim(old, 1) == 0
        await until(lambda: not world.clones)
        world.crews.aim(new, 1)
        await until(lambda: supply(world).up == 1)
        del world.versions.found["f", "$LATEST"]
        await world.router.removed("f", None)
        world.crews.aim(new, 1)
        await settle()
        assert await world.crews.readied(new, 1) == "it was changed or removed meanwhile"
        assert world.crews.supplies() == [] and not world.clones

    play(scenario)


def test_an_aim_of_a_daemon_that_ends() -> None:
    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        world.crews.aim(version(), 5)
        await settle()
        await world.router.close()
        world.crews.aim(version(), 7)
        await settle()
        assert list(world.instances) == []

    play(scenario)


# --- what fails again and again -----------------------------------------------------------------


def test_an_init_that_always_fails_makes_no_storm() -> None:
    """Everybody gets the real error; there are eight starts at first and one at each try."""

    async def scenario(world: World) -> None:
        world.load = broken
        outcomes = await asyncio.gather(*(world.ask(n) for n in range(50)))
        kinds = {json.loads(bytes(o.view.payload))["errorType"] for o in outcomes}
        assert kinds == {"ImportError"} and len(world.made) == 8
        later = await world.ask(1)
        assert json.loads(bytes(later.view.payload))["errorType"] == "ImportError"
        assert list(later.view.phases_ms) == ["route"] and later.view.start == "pool"
        assert b"The init failed before; it is tried again in" in later.log
        assert len(world.made) == 8
        events = [e for e in world.events.recent() if e.type == "function.backing_off"]
        assert [e.details["failures"] for e in events] == [1]
        assert events[0].subject == "f" and "no module named app" in str(events[0].details)
        assert world.counted("templated_function_start_failures", **F) == 1
        crew = world.crews.of(version())
        crew.broken.until = 0.0  # the time has come
        await asyncio.gather(*(world.ask(n) for n in range(20)))
        assert len(world.made) == 9
        crew.broken.until = 0.0
        world.load = FakeLoad()
        outcomes = await asyncio.gather(*(world.ask(n) for n in range(5)))
        assert {o.view.error for o in outcomes} == {None}
        assert world.counted("templated_function_start_failures", **F) == 0

    play(scenario)


class FakeLoad:
    """It works again."""

    async def __call__(self, _: FakeGuest, __: LoadOrder) -> None:
        await asyncio.sleep(0)


def test_an_init_that_fails_ahead_of_requests() -> None:
    """It is tried later and later, and a request is told why at once."""

    async def scenario(world: World) -> None:
        world.load = broken
        world.crews.aim(version(), 3)
        await until(lambda: world.counted("templated_function_start_failures", **F) == 1)
        made = len(world.made)
        assert made <= 4
        await settle()
        assert len(world.made) == made and supply(world).pause > 0
        assert (await world.ask(1)).view.error == "Unhandled"
        assert len(world.made) == made

    play(scenario)


def test_it_is_tried_again() -> None:
    async def scenario(world: World) -> None:
        world.load = broken
        world.crews.aim(version(), 1)
        await until(lambda: len(world.made) == 3)
        world.load = FakeLoad()
        await until(lambda: supply(world).up == 1)
        ahead = "templated_function_starts_ahead_total"
        assert (world.counted(ahead, **F, outcome="failed") or 0) >= 3

    play(scenario, pace=0.005)


def test_a_deploy_forgives() -> None:
    async def scenario(world: World) -> None:
        world.load = broken
        await world.ask(1)
        world.load = FakeLoad()
        new = version(code="b")
        world.versions.found["f", "$LATEST"] = new
        world.router.changed(new)
        assert (await world.ask(1)).view.error is None

    play(scenario)


def test_requests_wait_for_instances_that_work() -> None:
    """An init that fails now and then: who waits gets one that comes free, not the error."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        first = world.asking(1)
        await until(lambda: held.waiting)
        world.load = broken
        second = await world.ask(2)
        assert second.view.error == "Unhandled"
        third = world.asking(3)
        await settle()
        assert not third.done() and len(world.made) == 2
        held.answer(1)
        await until(lambda: "3" in held.waiting)
        held.answer(3)
        assert (await third).view.start == "warm" and (await first).view.error is None
        # And when there is none any more, it is told.
        fourth = world.asking(4)
        await until(lambda: "4" in held.waiting)
        fifth = world.asking(5)
        await settle()
        world.made[0].vm.machine.end()
        with pytest.raises(GuestError):
            await fourth
        assert (await fifth).view.error == "Unhandled" and len(world.made) == 2

    play(scenario)


def test_a_vm_that_dies_in_the_init_is_the_functions_fault() -> None:
    async def scenario(world: World) -> None:
        async def dies(guest: FakeGuest, _: LoadOrder) -> None:
            guest.machine.end()
            await asyncio.Event().wait()

        world.load = dies
        for _ in range(3):
            with pytest.raises(StartError) as caught:
                await world.ask()
        assert "it is tried again in" in caught.value.hint and len(world.made) == 1

    play(scenario)


@pytest.mark.parametrize("error", [HostError("no space"), Busy("the limit of clones is reached")])
def test_what_is_not_its_fault_stops_no_request(error: Exception) -> None:
    """But nothing is begun ahead for some time."""

    async def scenario(world: World) -> None:
        async def fails(_: str) -> None:
            raise error

        world.start = fails
        world.crews.aim(version(), 1)
        await until(lambda: supply(world).pause)
        world.start = None
        assert (await world.ask(1)).view.error is None
        assert supply(world).pause == 0

    play(scenario)


def test_waits_grow_and_are_spread() -> None:
    async def scenario(__: World) -> None:
        drawn = iter([1.0, 1.0, 1.0, 0.0])
        backoff = Backoff(Pace(first=1.0, longest=3.0, random=lambda: next(drawn)))
        loop = asyncio.get_running_loop()
        waits = []
        for _ in range(4):
            assert backoff.failed(loop.time(), ValueError())
            waits.append(round(backoff.until - backoff._last, 3))
        assert waits == [1.0, 2.0, 3.0, 1.5]
        assert not backoff.failed(backoff._last - 1, ValueError())  # one of the same volley
        assert backoff.failures == 4 and backoff.wait > 0
        backoff.succeeded()
        assert backoff.wait == 0 and backoff.failures == 0

    play(scenario)
