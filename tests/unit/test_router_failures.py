"""Functions that fail, VMs that die and starts that do not work, as callers see them."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from templated.drivers.guest_functions import Answer, InitFailed, InvokeOrder, LoadOrder
from templated.errors import (
    Busy,
    Conflict,
    GuestError,
    HostError,
    HypervisorError,
    NotFound,
    StartError,
    TemplatedError,
)
from templated.model.clone import CloneState
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, Held, World, echo, play, settle, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def test_a_function_that_fails_keeps_its_instance() -> None:
    async def scenario(world: World) -> None:
        async def fails(_: FakeGuest, __: InvokeOrder) -> Answer:
            return Answer(payload=b'{"errorType": "E"}', error="Unhandled", ended="")

        world.handler = fails
        view = (await world.ask()).view
        assert (view.status, view.error, bytes(view.payload)) == (
            *(200, "Unhandled"),
            b'{"errorType": "E"}',
        )
        assert world.states() == {"idle": 1}
        labels = {"function": "f", "version": "$LATEST", "outcome": "error"}
        assert world.counted("templated_invocations_total", **labels) == 1

    play(scenario)


def test_a_runtime_that_ends_is_told() -> None:
    """What ends by design is not."""

    async def scenario(world: World) -> None:
        async def leaves(_: FakeGuest, __: InvokeOrder) -> Answer:
            return Answer(payload=b"", error=None, ended="exit status 3")

        world.handler = leaves
        assert (await world.ask()).view.error == "Unhandled"
        await until(lambda: not world.clones)
        (died,) = [e for e in world.events.recent() if e.type == "instance.died"]
        assert died.subject == "f" and died.details["reason"] == "its runtime ended: exit status 3"
        world.handler = echo
        await world.ask()
        await world.router.removed("f", 0)
        await until(lambda: not world.clones)
        assert len([e for e in world.events.recent() if e.type == "instance.died"]) == 1

    play(scenario)


def test_a_user_who_removes_its_clone() -> None:
    """It has not died; who waits for its answer is told why there is none."""

    async def scenario(world: World) -> None:
        world.handler = Held()
        asking = world.asking()
        await until(lambda: world.states() == {"busy": 1})
        (clone,) = world.clones.values()
        clone.state = CloneState.REMOVING
        clone.vm.machine.end()
        with pytest.raises(GuestError, match="its clone was removed"):
            await asking
        await until(lambda: not world.clones)
        assert "instance.died" not in {e.type for e in world.events.recent()}

    play(scenario)


def test_a_handler_that_takes_too_long() -> None:
    async def scenario(world: World) -> None:
        world.handler = Held()
        outcome = await world.ask()
        failed = json.loads(bytes(outcome.view.payload))
        assert (outcome.view.status, outcome.view.error) == (200, "Unhandled")
        assert failed["errorType"] == "Sandbox.Timedout"
        assert re.fullmatch(
            r"20\S+Z [0-9a-f-]{36} Task timed out after 0.01 seconds", failed["errorMessage"]
        )
        assert failed["errorMessage"].split()[1] in outcome.log.decode()
        await until(lambda: not world.clones)
        world.handler = echo
        assert (await world.ask()).view.start == "pool" and len(world.made) == 2
        labels = {"function": "f", "version": "$LATEST", "outcome": "timeout"}
        assert world.counted("templated_invocations_total", **labels) == 1
        (died,) = [e for e in world.events.recent() if e.type == "instance.died"]
        assert died.details["reason"] == "a request took longer than 0.01 s"

    play(scenario, version(timeout="10ms"))


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("exit status 1", "Runtime exited with error: exit status 1"),
        ("signal: killed", "Runtime exited with error: signal: killed"),
        ("exit status 0", "Runtime exited without providing a reason"),
    ],
)
def test_a_runtime_that_exits(ended: str, said: str) -> None:
    async def scenario(world: World) -> None:
        async def exits(_: FakeGuest, __: InvokeOrder) -> Answer:
            return Answer(payload=b"", error="Unhandled", ended=ended)

        world.handler = exits
        view = (await world.ask(request="id")).view
        failed = json.loads(bytes(view.payload))
        assert failed == {
            "errorType": "Runtime.ExitError",
            "errorMessage": f"RequestId: id Error: {said}",
        }
        assert view.error == "Unhandled"
        await until(lambda: not world.clones)

    play(scenario)


@pytest.mark.parametrize("first", ["exit", "connection"])
def test_a_vm_that_dies_in_the_middle(first: str) -> None:
    """Whichever is noticed first: the caller is told why."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        task = world.asking(1)
        await until(lambda: held.waiting)
        machine = world.made[0].vm.machine
        if first == "exit":
            machine.end()
        else:
            held.fail(1, GuestError("the agent's connection ended"))
            await settle()
            machine.end()
        with pytest.raises(GuestError, match="ended in the middle: its VM was killed by SIGKILL"):
            await task
        died = [e for e in world.events.recent() if e.type == "instance.died"]
        assert len(died) == 1 and died[0].subject == "f" and "SIGKILL" in str(died[0].details)
        await until(lambda: not world.clones)
        labels = {"function": "f", "version": "$LATEST", "outcome": "failed"}
        assert world.counted("templated_invocations_total", **labels) == 1
        assert b"SIGKILL" in world.logged["f"]

    play(scenario)


def test_a_vm_that_dies_while_it_rests() -> None:
    async def scenario(world: World) -> None:
        await world.ask()
        world.made[0].vm.machine.end()
        assert (await world.ask()).view.start == "pool"  # before anything else ran
        await until(lambda: len(world.clones) == 1)
        world.made[1].vm.machine.end()
        await until(lambda: not world.clones)
        assert len([e for e in world.events.recent() if e.type == "instance.died"]) == 2

    play(scenario)


def test_a_start_that_fails() -> None:
    async def scenario(world: World) -> None:
        async def fails(_: str) -> None:
            raise StartError("no", phase="spawn", reason="hypervisor")

        world.start = fails
        results = await asyncio.gather(*(world.ask(n) for n in range(10)), return_exceptions=True)
        assert all(isinstance(result, StartError) for result in results)
        assert list(world.instances) == [] and len(world.ensured) == 10
        world.start = None
        assert (await world.ask()).view.error is None

    play(scenario)


def test_a_start_that_fails_while_others_serve() -> None:
    """Who was served meanwhile is not told; there is one start for each that waits, no more."""

    async def scenario(world: World) -> None:
        held, gate = Held(), asyncio.Event()
        world.handler = held
        first = world.asking(1)
        await until(lambda: held.waiting)

        async def fails(_: str) -> None:
            await gate.wait()
            raise HostError("no space")

        world.start = fails
        second = world.asking(2)
        await settle()
        held.answer(1)
        await until(lambda: held.waiting)
        gate.set()
        await settle()
        held.answer(2)
        await asyncio.gather(first, second)
        assert len(world.ensured) == 2

    play(scenario)


def test_room_is_made_when_the_host_has_none() -> None:
    async def scenario(world: World) -> None:
        await world.ask(1, "a")

        async def crowded(_: str) -> None:
            if len(world.clones) >= 1:
                raise Busy("the limit of 1 clones is reached")

        world.start = crowded
        assert (await world.ask(1, "b")).view.error is None
        assert [clone.function for clone in world.clones.values()] == ["b:$LATEST"]

    play(scenario, version("a"), version("b"))


@pytest.mark.parametrize("payload", [b'{"errorType": "ImportError"}', b""])
def test_an_init_that_fails(payload: bytes) -> None:
    async def scenario(world: World) -> None:
        async def fails(_: FakeGuest, __: LoadOrder) -> None:
            raise InitFailed("no module named app", payload=payload)

        world.load = fails
        outcomes = await asyncio.gather(*(world.ask() for _ in range(5)))
        for outcome in outcomes:
            failed = json.loads(bytes(outcome.view.payload))
            assert outcome.view.error == "Unhandled" and outcome.view.start == "pool"
            assert failed["errorType"] == ("ImportError" if payload else "Runtime.InitError")
        assert len(world.made) == 5
        await until(lambda: not world.clones)
        events = [e for e in world.events.recent() if e.type == "instance.init_failed"]
        assert len(events) == 5 and "no module named app" in str(events[0].details)

    play(scenario)


def test_an_init_that_never_ends() -> None:
    async def scenario(world: World) -> None:
        async def never(_: FakeGuest, __: LoadOrder) -> None:
            await asyncio.Event().wait()

        world.load = never
        failed = json.loads(bytes((await world.ask()).view.payload))
        assert failed["errorType"] == "Sandbox.Timedout"
        assert "timed out after 0.01 seconds" in failed["errorMessage"]
        await until(lambda: not world.clones)

    play(scenario, init=0.01)


@pytest.mark.parametrize("error", [NotFound("there is no template t"), Conflict("no disk")])
def test_a_template_that_is_not_there(error: TemplatedError) -> None:
    """It is no function that is not found."""

    async def scenario(world: World) -> None:
        async def fails(_: str) -> None:
            raise error

        world.start = fails
        with pytest.raises(StartError) as caught:
            await world.ask()
        assert (caught.value.phase, caught.value.reason) == ("start", error.code)
        assert error.message in caught.value.message

    play(scenario)


@pytest.mark.parametrize("how", ["mount", "dies"])
def test_a_load_that_fails(how: str) -> None:
    async def scenario(world: World) -> None:
        async def fails(guest: FakeGuest, _: LoadOrder) -> None:
            if how == "mount":
                guest.machine.end("was ended")
                raise GuestError("cannot mount the code")
            guest.machine.end()
            await asyncio.Event().wait()

        world.load = fails
        with pytest.raises(StartError) as caught:
            await world.ask()
        assert caught.value.phase == "attach" and caught.value.reason == "guest"
        await until(lambda: not world.clones)

    play(scenario)


def test_an_answer_that_is_not_json() -> None:
    async def scenario(world: World) -> None:
        async def nonsense(_: FakeGuest, __: InvokeOrder) -> Answer:
            return Answer(payload=b"<html>", error=None, ended="")

        world.handler = nonsense
        view = (await world.ask()).view
        assert view.error == "Unhandled"
        assert json.loads(bytes(view.payload))["errorType"] == "Runtime.MarshalError"

    play(scenario)


def test_a_pause_that_fails_costs_no_request() -> None:
    async def scenario(world: World) -> None:
        await world.ask()
        machine = world.made[0].vm.machine
        machine.gates["pause"] = asyncio.Event()
        machine.fail["pause"] = HypervisorError("QEMU refuses")
        await until(lambda: machine.steps == ["pause"])
        task = world.asking(2)
        await settle()
        machine.gates["pause"].set()
        assert (await task).view.start == "pool" and len(world.made) == 2

    play(scenario, freeze_after=0.005)


def test_instances_that_never_stay_up() -> None:
    async def scenario(world: World) -> None:
        async def dies(guest: FakeGuest, _: LoadOrder) -> None:
            asyncio.get_running_loop().call_soon(guest.machine.end)

        world.load = dies
        with pytest.raises(GuestError):
            await world.ask()
        assert len(world.made) <= 3

    play(scenario)
