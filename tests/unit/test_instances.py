"""One instance: its rest, its pauses, its clock, its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from templated.errors import GuestError, HostError, HypervisorError, Timeout
from templated.services.functions import instances
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import (
    FakeMachine,
    Held,
    World,
    echo,
    play,
    settle,
)

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
SOON = 0.005


def machine(world: World, number: int = 0) -> FakeMachine:
    return world.made[number].vm.machine


def test_an_idle_instance_is_paused_and_wakes_with_the_time() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: world.states() == {"paused": 1} and not machine(world).running)
        view = (await world.ask(2)).view
        assert view.start == "warm" and machine(world).steps == ["pause", "resume"]
        first, second = world.made[0].vm.agent.orders
        assert first.time is None and second.time is not None
        assert 0 < time.time() - second.time < 10
        instance = next(iter(world.instances))
        assert SOON <= instance.lag < 10 and not instance.stopped
        await until(lambda: not machine(world).running)
        assert (await world.ask(3)).view.start == "warm"
        assert world.made[0].vm.agent.shifts == []

    play(scenario, freeze_after=SOON)


def test_a_burst_is_never_interrupted() -> None:
    async def scenario(world: World) -> None:
        for number in range(300):
            await world.ask(number)
        assert machine(world).steps == [] and len(world.made) == 1

    play(scenario, freeze_after=5.0)


def test_requests_one_after_the_other_on_one_instance() -> None:
    """The next one is there when the answer comes: it does not rest in between."""

    async def scenario(world: World) -> None:
        await asyncio.gather(*(world.ask(number) for number in range(100)))
        assert machine(world).steps == [] and len(world.made) == 1
        assert [o.time for o in world.made[0].vm.agent.orders] == [None] * 100

    play(scenario, freeze_after=5.0, concurrency=1)


def test_a_request_during_the_pause_waits_for_it() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        gate = machine(world).gates["pause"] = asyncio.Event()
        await until(lambda: machine(world).steps == ["pause"])
        task = world.asking(2)
        await settle()
        assert world.states() == {"busy": 1} and machine(world).steps == ["pause"]
        gate.set()
        assert (await task).view.start == "warm"
        assert machine(world).steps == ["pause", "resume"] and len(world.made) == 1
        assert world.made[0].vm.agent.orders[1].time is not None

    play(scenario, freeze_after=SOON)


def test_it_ends_when_nobody_asks() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: not world.clones)
        assert machine(world).steps == ["pause"]
        assert (await world.ask(2)).view.start == "pool"

    play(scenario, freeze_after=0.001, keep_alive=0.02)


def test_it_need_not_be_paused_before() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: not world.clones)
        assert machine(world).steps == []

    play(scenario, freeze_after=1.0, keep_alive=SOON)


def test_a_vm_that_cannot_be_woken() -> None:
    """What is told is that, and not that the guest did not answer."""

    async def scenario(world: World) -> None:
        for error in (HypervisorError("QEMU refuses"), Timeout("QEMU did not answer")):
            await world.ask(1)
            await until(lambda: world.states() == {"paused": 1})
            machine(world, -1).fail["resume"] = error
            with pytest.raises(type(error), match="QEMU"):
                await world.ask(2)
            await until(lambda: not world.clones)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(instances, "_EXIT_TIMEOUT", 0.005)
        play(scenario, freeze_after=0.001)


def test_a_vm_that_dies_while_it_is_paused_or_being_paused() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: world.states() == {"paused": 1})
        machine(world).end()
        await until(lambda: not world.clones)
        await world.ask(2)
        gate = machine(world, 1).gates["pause"] = asyncio.Event()
        machine(world, 1).fail["pause"] = HypervisorError("QEMU ended")
        await until(lambda: machine(world, 1).steps)
        task = world.asking(3)
        await settle()
        machine(world, 1).end()
        gate.set()
        assert (await task).view.start == "pool" and len(world.made) == 3

    play(scenario, freeze_after=SOON)


def test_a_vm_that_dies_while_it_wakes() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: world.states() == {"paused": 1} and not machine(world).running)
        gate = machine(world).gates["resume"] = asyncio.Event()
        task = world.asking(2)
        await until(lambda: "resume" in machine(world).steps)
        machine(world).end()
        with pytest.raises(GuestError, match="ended in the middle: its VM was killed"):
            await task
        gate.set()

    play(scenario, freeze_after=0.001)


def test_a_vm_that_wakes_late_gets_the_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "_LATE", -1.0)

    async def scenario(world: World) -> None:
        await world.ask(1)
        await until(lambda: world.states() == {"paused": 1} and not machine(world).running)
        await world.ask(2)
        shifts = world.made[0].vm.agent.shifts
        assert shifts[0] == 0.0 and abs(shifts[1] - time.time()) < 10

    play(scenario, freeze_after=0.001)


def test_a_removal_that_fails_is_tried_again() -> None:
    async def scenario(world: World) -> None:
        world.remove_fails = [HostError("busy"), Timeout("not yet")]
        await world.ask(1)
        await until(lambda: not list(world.instances))
        assert world.remove_fails == [] and world.clones == {}

    play(scenario, freeze_after=1.0, keep_alive=SOON)


def test_a_removal_that_never_works_is_given_up() -> None:
    """The next daemon ends what is left."""

    async def scenario(world: World) -> None:
        world.remove_fails = [HostError("busy")] * 3
        await world.ask(1)
        await until(lambda: not list(world.instances))
        assert len(world.clones) == 1
        world.clones.clear()

    play(scenario, freeze_after=1.0, keep_alive=SOON)


def test_a_daemon_that_ends_does_not_wait_to_try_again() -> None:
    async def scenario(world: World) -> None:
        world.instances._timing = replace(world.instances._timing, removal_pauses=(1000.0,))
        world.remove_fails = [HostError("busy")]
        await world.ask(1)
        machine(world).end()
        await until(lambda: not world.remove_fails)
        await settle()
        assert world.states() == {"ending": 1}
        await world.router.close()
        assert world.clones == {}

    play(scenario)


def test_a_daemon_that_ends_while_all_rest() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        tasks = [world.asking(n) for n in range(3)]
        await until(lambda: len(held.waiting) == 3)
        for n in range(3):
            held.answer(n)
        await asyncio.gather(*tasks)
        world.handler = echo
        await until(lambda: world.states() == {"paused": 3})

    play(scenario, freeze_after=0.001)
