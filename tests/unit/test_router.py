"""Requests and the instances that serve them, over fakes in memory."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from templated.drivers.guest_functions import Answer, InvokeOrder
from templated.errors import (
    Busy,
    GuestError,
    InvalidRequest,
    NotFound,
    Throttled,
)
from templated.model.clone import StartPath
from templated.model.config import LimitConfig
from templated.model.function import MAX_PAYLOAD
from templated.services.functions.starts import Room
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, Held, World, echo, play, settle, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def test_first_a_new_instance_then_the_same() -> None:
    async def scenario(world: World) -> None:
        first = await world.ask({"a": 1})
        view = first.view
        assert (view.status, view.error, bytes(view.payload)) == (200, None, b'{"a": 1}')
        assert (view.start, view.version) == ("pool", "$LATEST")
        assert list(view.phases_ms) == ["route", "start", "attach", "init", "run"]
        assert all(ms >= 0 for ms in view.phases_ms.values())
        assert sum(view.phases_ms.values()) <= view.total_ms + 5
        again = (await world.ask(2)).view
        assert (again.instance, again.start) == (view.instance, "warm")
        assert list(again.phases_ms) == ["route", "run"]
        assert world.states() == {"idle": 1} and world.router.counts("f") == {"idle": 1}
        assert len(world.made) == 1 and world.made[0].function == "f:$LATEST"
        assert world.ensured == ["a" * 64]
        log = first.log.decode().splitlines()
        assert log[0].startswith("START RequestId: ") and log[0].endswith(" Version: $LATEST")
        assert log[1] == 'printed by {"a": 1}' and log[2].startswith("END RequestId: ")
        assert re.fullmatch(
            r"REPORT RequestId: \S+\tDuration: [\d.]+ ms\tInit Duration: [\d.]+ ms", log[3]
        )
        assert world.logged["f"].startswith(b"loading\nSTART")
        labels = {"function": "f", "version": "$LATEST"}
        counted = world.counted
        assert counted("templated_invocations_total", **labels, outcome="ok") == 2
        assert counted("templated_invocations_total", **labels, outcome="failed") == 0
        assert counted("templated_function_cold_starts_total", **labels) == 1
        assert counted("templated_instances", **labels, state="idle") == 1
        assert counted("templated_function_concurrency", **labels) == 0
        assert counted("templated_invocation_seconds_count", function="f", start="warm") == 1
        assert counted("templated_code_attach_seconds_count") == 1

    play(scenario)


def test_the_order_that_a_guest_gets() -> None:
    async def scenario(world: World) -> None:
        root = "Root=1-5759e988-bd862e3fe1be46a994272793"
        outcome = await world.ask(1, qualifier="3", trace=root, request="the-id")
        guest = world.made[0].vm.agent
        (order,), (load,) = guest.orders, guest.loads
        assert (order.request, order.time) == ("the-id", None)
        assert re.fullmatch(f"{root};Parent=[0-9a-f]{{16}};Sampled=0", order.trace)
        assert outcome.view.trace == root.removeprefix("Root=")
        assert order.arn == "arn:aws:lambda:us-east-1:000000000000:function:f:3"
        assert order.deadline_ms > 1_700_000_000_000
        assert (load.runtime, load.handler, load.uuid) == ("python", "app.handler", "u" * 32)
        assert load.env["AWS_LAMBDA_FUNCTION_NAME"] == "f"
        assert load.env["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "512"
        assert load.env["AWS_LAMBDA_FUNCTION_VERSION"] == "3" == outcome.view.version
        assert load.env["_HANDLER"] == "app.handler"
        assert load.env["AWS_LAMBDA_LOG_STREAM_NAME"] == outcome.view.instance

    play(scenario, version(number=3))


@pytest.mark.parametrize("name", ["f", "My_Function", "___", "-" * 64, "A" * 64, "a-" * 32])
def test_instances_have_names_of_clones(name: str) -> None:
    async def scenario(world: World) -> None:
        made = (await world.ask(1, name)).view.instance
        short = re.sub("[^a-z0-9-]", "", name.lower())[:40].strip("-") or "fn"
        assert re.fullmatch(rf"{short}-[0-9a-f]{{8}}", made) and len(made) <= 49

    play(scenario, version(name))


def test_a_direct_start() -> None:
    async def scenario(world: World) -> None:
        assert (await world.ask()).view.start == "direct"

    play(scenario, path=StartPath.DIRECT)


def test_the_instance_that_was_used_last_serves() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        three = [world.asking(n) for n in range(3)]
        await until(lambda: len(held.waiting) == 3)
        for n in (1, 0, 2):
            held.answer(n)
            await three[n]
        world.handler = echo
        names = [task.result().view.instance for task in three]
        assert len(set(names)) == 3 and world.states() == {"idle": 3}
        assert [(await world.ask()).view.instance for _ in range(2)] == [names[2]] * 2
        world.made[2].vm.machine.end()
        await settle()
        assert (await world.ask()).view.instance in names[:2]

    play(scenario)


def test_what_comes_free_before_serves_and_the_new_one_rests() -> None:
    async def scenario(world: World) -> None:
        held, gate = Held(), asyncio.Event()
        world.handler = held
        first = world.asking(1)
        await until(lambda: held.waiting)

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        second = world.asking(2)
        await settle()
        assert world.states() == {"busy": 1, "starting": 1}
        held.answer(1)
        await until(lambda: held.waiting)
        third = world.asking(3)  # the start for the second is its own now
        await settle()
        assert world.states() == {"busy": 1, "starting": 1}
        gate.set()
        await until(lambda: len(held.waiting) == 2)
        held.answer(2)
        held.answer(3)
        views = [(await task).view for task in (first, second, third)]
        assert views[0].instance == views[1].instance != views[2].instance
        assert [view.start for view in views] == ["pool", "warm", "pool"]
        assert len(world.made) == 2 and world.states() == {"idle": 2}

    play(scenario)


def test_a_new_instance_that_nobody_waits_for_rests() -> None:
    async def scenario(world: World) -> None:
        held, gate = Held(), asyncio.Event()
        world.handler = held
        first = world.asking(1)
        await until(lambda: held.waiting)

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        second = world.asking(2)
        await settle()
        held.answer(1)
        await until(lambda: held.waiting)
        held.answer(2)
        await asyncio.gather(first, second)
        gate.set()
        await until(lambda: world.states() == {"idle": 2})
        world.handler = echo
        assert (await world.ask()).view.start == "warm"

    play(scenario)


def test_no_more_starts_than_are_needed() -> None:
    """Who waits for a start that has not begun may be served before."""

    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        tasks = [world.asking(n) for n in range(50)]
        await settle()
        assert world.states() == {"starting": 8}
        gate.set()
        await asyncio.gather(*tasks)
        assert 8 <= len(world.made) < 30 and set(world.served.values()) == {1}

    play(scenario)


def test_all_who_wait_get_an_instance_when_none_comes_free() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        tasks = [world.asking(n) for n in range(30)]
        await until(lambda: len(held.waiting) == 30)
        for n in range(30):
            held.answer(n)
        await asyncio.gather(*tasks)
        assert len(world.made) == 30

    play(scenario)


def test_two_hundred_requests_for_five_instances() -> None:
    async def scenario(world: World) -> None:
        outcomes = await asyncio.gather(*(world.ask(n) for n in range(200)))
        assert [json.loads(bytes(o.view.payload)) for o in outcomes] == list(range(200))
        assert len(world.served) == 200 and set(world.served.values()) == {1}
        assert len(world.made) == 5 and world.states() == {"idle": 5}
        assert all(f"printed by {n}\n".encode() in o.log for n, o in enumerate(outcomes))

    play(scenario, concurrency=5)


def test_requests_of_many_functions_take_turns() -> None:
    """Instances that rest make room for those of others."""

    async def scenario(world: World) -> None:
        names = [f"f{n % 7}" for n in range(70)]
        outcomes = await asyncio.gather(*(world.ask(n, name) for n, name in enumerate(names)))
        assert [json.loads(bytes(o.view.payload)) for o in outcomes] == list(range(70))
        assert set(world.served.values()) == {1}
        await until(lambda: sum(world.states().values()) <= 3)

    play(scenario, *(version(f"f{n}") for n in range(7)), concurrency=3)


# --- bounds -----------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        tasks = [world.asking(n) for n in range(5)]
        await until(lambda: len(held.waiting) == 2)
        with pytest.raises(Throttled) as caught:
            await world.ask(9)
        assert caught.value.reason == "queue" and caught.value.retry_after > 0
        throttles = {"function": "f", "reason": "queue"}
        assert world.counted("templated_function_throttles_total", **throttles) == 1
        for n in range(5):
            await until(lambda n=n: json.dumps(n) in held.waiting)  # type: ignore[misc]
            held.answer(n, n)
        assert len(await asyncio.gather(*tasks)) == 5
        assert len(world.made) == 2

    play(scenario, concurrency=2, queue=3)


def test_without_a_queue() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        task = world.asking(0)
        await until(lambda: held.waiting)
        with pytest.raises(Throttled) as caught:
            await world.ask(1)
        assert caught.value.reason == "concurrency"
        held.answer(0)
        await task

    play(scenario, concurrency=1, queue=0)


def test_reserved_numbers() -> None:
    """They bound their function, and are taken from what the others share."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        mine = [world.asking(f"a{n}", "a") for n in range(3)]
        await until(lambda: len(held.waiting) == 3)
        with pytest.raises(Throttled) as caught:
            await world.ask("a3", "a")
        assert caught.value.reason == "reserved"
        with pytest.raises(Throttled) as none:
            await world.ask("z", "zero")
        assert none.value.reason == "reserved"
        others = [world.asking(f"b{n}", "b") for n in range(2)]
        others += [world.asking(f"c{n}", "c") for n in range(2)]
        await until(lambda: len(held.waiting) == 5)
        await settle()
        assert len(held.waiting) == 5 and world.bounds.waiting("c") == 2
        held.answer("a0")
        await settle()
        assert world.bounds.running("b") + world.bounds.running("c") == 2
        held.answer("b0")
        await until(lambda: '"c0"' in held.waiting)
        world.versions.numbers["a"] = None  # what was reserved is shared from now on
        held.answer("a1")
        held.answer("a2")
        held.answer("b1")
        await until(lambda: '"c1"' in held.waiting)
        held.answer("c0")
        held.answer("c1")
        await asyncio.gather(*mine, *others)

    numbers = {"a": 3, "zero": 0}
    found = [version(name) for name in ("a", "b", "c", "zero")]
    play(scenario, *found, concurrency=5, reserved=numbers)


def test_when_all_is_reserved_the_others_cannot_run() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(Throttled) as caught:
            await world.ask(1, "b")
        assert caught.value.reason == "concurrency"
        assert (await world.ask(1, "a")).view.error is None

    play(scenario, version("a"), version("b"), concurrency=2, reserved={"a": 2})


def test_a_turn_that_does_not_come() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        world.bounds._longest_wait = 0.01
        task = world.asking(0)
        await until(lambda: held.waiting)
        with pytest.raises(Throttled) as caught:
            await world.ask(1)
        assert caught.value.reason == "queue" and world.bounds.waiting("f") == 0
        held.answer(0)
        await task

    play(scenario, concurrency=1)


@pytest.mark.parametrize(
    "payload", [b"{", b"nope", b"NaN", b"1 2", b'"\xff"', b"[" * 100_000, b"'a'"]
)
def test_what_is_not_json(payload: bytes) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(InvalidRequest, match="is not JSON"):
            await world.router.invoke("f", None, payload)
        assert world.made == []

    play(scenario)


def test_sizes_of_payloads() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(InvalidRequest, match="at most 6291456"):
            await world.router.invoke("f", None, b'"' + b"a" * MAX_PAYLOAD)
        largest = b'"' + b"a" * (MAX_PAYLOAD - 2) + b'"'
        assert bytes((await world.router.invoke("f", None, largest)).view.payload) == largest
        assert bytes((await world.router.invoke("f", None, b"")).view.payload) == b"{}"

        async def too_much(_: FakeGuest, __: InvokeOrder) -> Answer:
            return Answer(payload=largest + b" ", error=None, ended="")

        world.handler = too_much
        view = (await world.ask()).view
        assert view.error == "Unhandled"
        assert json.loads(bytes(view.payload))["errorType"] == "Function.ResponseSizeTooLarge"

    play(scenario)


def test_unknown_functions_and_versions() -> None:
    async def scenario(world: World) -> None:
        for name, qualifier in (("g", None), ("f", "7")):
            with pytest.raises(NotFound):
                await world.router.invoke(name, qualifier, b"{}")

    play(scenario)


# --- callers that go, versions that change, daemons that end -------------------------------------


def test_a_caller_that_goes_away() -> None:
    """Its request goes on to its end, and the instance serves the next one."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        task = world.asking(1)
        await until(lambda: held.waiting)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and world.states() == {"busy": 1}
        held.answer(1)
        await until(lambda: world.states() == {"idle": 1})
        world.handler = echo
        assert (await world.ask()).view.start == "warm"

    play(scenario)


def test_a_caller_that_goes_away_before_its_turn() -> None:
    """Its request is never run."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        first, second, third = (world.asking(n) for n in range(3))
        await until(lambda: held.waiting and world.bounds.waiting("f") == 2)
        second.cancel()
        await asyncio.wait({second})
        held.answer(0)
        await until(lambda: "2" in held.waiting)
        held.answer(2)
        await asyncio.gather(first, third)
        assert len(world.served) == 2

    play(scenario, concurrency=1)


def test_a_deploy_while_requests_run() -> None:
    """They end on their code; what rests of it ends; those that come get the new code."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        tasks = [world.asking(n) for n in range(2)]
        await until(lambda: len(held.waiting) == 2)
        held.answer(0)
        await tasks[0]
        new = version(code="b")
        world.versions.found["f", "$LATEST"] = new
        world.router.changed(new)
        await until(lambda: world.states() == {"busy": 1})
        fresh = world.asking("new")
        await until(lambda: '"new"' in held.waiting)
        assert world.ensured == ["a" * 64, "a" * 64, "b" * 64]
        held.answer(1)
        assert (await tasks[1]).view.error is None
        held.answer("new")
        await fresh
        await until(lambda: len(world.clones) == 1)
        assert world.router._crews._retired == set()

    play(scenario)


def test_a_deploy_while_an_instance_starts() -> None:
    async def scenario(world: World) -> None:
        gate = asyncio.Event()

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        before = world.asking(1)
        await settle()
        new = version(code="b")
        world.versions.found["f", "$LATEST"] = new
        after = world.asking(2)
        await settle()
        gate.set()
        await asyncio.gather(before, after)
        assert world.ensured == ["a" * 64, "b" * 64]
        await until(lambda: len(world.clones) == 1)

    play(scenario)


def test_a_removal() -> None:
    async def scenario(world: World) -> None:
        held, gate = Held(), asyncio.Event()
        world.handler = held
        tasks = [world.asking(n) for n in range(2)]
        await until(lambda: len(held.waiting) == 2)
        held.answer(0)
        await tasks[0]
        rests = world.asking(9)
        await until(lambda: "9" in held.waiting)

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        waits = world.asking(3)
        await settle()
        world.versions.found.clear()
        await world.router.removed("f", None)
        with pytest.raises(NotFound, match="was removed while the request waited"):
            await waits
        with pytest.raises(NotFound):
            await world.ask()
        gate.set()
        held.answer(1)
        held.answer(9)
        assert (await tasks[1]).view.error is None and (await rests).view.error is None
        await until(lambda: not world.clones)
        labels = {"function": "f", "version": "$LATEST", "outcome": "ok"}
        assert world.counted("templated_invocations_total", **labels) is None
        assert world.counted("templated_function_concurrency", **labels) is None
        assert world.counted("templated_function_throttles_total", function="f") is None
        assert world.router._crews._retired == set()

    play(scenario)


def test_the_removal_of_one_version() -> None:
    async def scenario(world: World) -> None:
        for qualifier in ("1", "2", None):
            await world.ask(1, qualifier=qualifier)
        del world.versions.found["f", "1"]
        await world.router.removed("f", 1)
        assert sorted(clone.function for clone in world.clones.values()) == ["f:$LATEST", "f:2"]
        counted = world.counted
        for label, expected in (("1", None), ("2", 1), ("$LATEST", 1)):
            labels = {"function": "f", "version": label, "outcome": "ok"}
            assert counted("templated_invocations_total", **labels) == expected

    play(scenario, version(), version(number=1), version(number=2))


def test_the_daemon_ends_in_the_middle() -> None:
    async def scenario(world: World) -> None:
        held, gate = Held(), asyncio.Event()
        world.handler = held
        runs = [world.asking(n) for n in range(2)]
        await until(lambda: len(held.waiting) == 2)

        async def slow(_: str) -> None:
            await gate.wait()

        world.start = slow
        starts = world.asking(2)
        waits = world.asking(3)
        await settle()
        await world.router.close()
        results = await asyncio.gather(*runs, starts, waits, return_exceptions=True)
        assert [type(result) for result in results] == [GuestError, GuestError, Busy, Busy]
        assert "the daemon ends" in str(results[0])
        assert world.clones == {}
        with pytest.raises(Busy):
            await world.ask()

    play(scenario, concurrency=3)


def test_starts_of_a_version_at_once_are_as_many_as_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps one busy. Half of the turns are left to requests in any case."""
    for cpus, turns, expected in ((1, 8, (2, 2)), (4, 8, (4, 4)), (64, 8, (8, 4)), (4, 1, (1, 1))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cpus: set(range(n)))
        room = Room.of(LimitConfig(concurrent_starts=turns), 100, lambda _: None)
        assert (room.at_once, room.ahead) == expected
