"""The max of a function: who waits for what, and what a request is told that waits in vain."""

from __future__ import annotations

import asyncio

import pytest

from templated.errors import NotFound, Throttled
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import Held, World, play, settle, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def test_a_max() -> None:
    """Requests beyond it wait for the function's own, and hold up no others."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        mine = [world.asking(f"a{n}", "a") for n in range(4)]
        await until(lambda: len(held.waiting) == 2)
        with pytest.raises(Throttled) as caught:
            await world.ask("a4", "a")
        assert caught.value.reason == "max" and "runs 2 requests at once" in caught.value.message
        others = [world.asking(f"b{n}", "b") for n in range(2)]
        await until(lambda: len(held.waiting) == 4)
        assert world.bounds.waiting("a") == 2 and world.bounds.waiting("b") == 0
        held.answer("b0")
        held.answer("a1")
        await until(lambda: '"a2"' in held.waiting)
        held.answer("a0")
        await until(lambda: '"a3"' in held.waiting)
        for name in ("a2", "a3", "b1"):
            held.answer(name)
        await asyncio.gather(*mine, *others)
        throttles = {"function": "a", "reason": "max"}
        assert world.counted("templated_function_throttles_total", **throttles) == 1
        assert sum(clone.function.startswith("a:") for clone in world.made) == 2

    play(scenario, version("a"), version("b"), concurrency=5, queue=2, most={"a": 2})


def test_a_max_below_what_is_reserved() -> None:
    """Up to it they run, beyond it they wait; what is reserved is not shared meanwhile."""

    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        mine = [world.asking(f"a{n}", "a") for n in range(3)]
        others = [world.asking(f"b{n}", "b") for n in range(2)]
        await until(lambda: len(held.waiting) == 2)
        await settle()
        assert sorted(held.waiting) == ['"a0"', '"b0"']
        held.answer("a0")
        await until(lambda: '"a1"' in held.waiting)
        world.versions.most.clear()  # all that is reserved
        held.answer("a1")
        await until(lambda: '"a2"' in held.waiting)
        held.answer("b0")
        await until(lambda: '"b1"' in held.waiting)
        held.answer("a2")
        held.answer("b1")
        await asyncio.gather(*mine, *others)

    found = version("a"), version("b")
    play(scenario, *found, concurrency=4, reserved={"a": 3}, most={"a": 1})


def test_a_max_that_is_not_reached_in_time() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        world.bounds._longest_wait = 0.01
        task = world.asking(0)
        await until(lambda: held.waiting)
        with pytest.raises(Throttled) as caught:
            await world.ask(1)
        assert caught.value.reason == "max" and world.bounds.waiting("f") == 0
        held.answer(0)
        await task

    play(scenario, most={"f": 1})


def test_a_function_that_goes_while_requests_of_it_wait() -> None:
    async def scenario(world: World) -> None:
        held = Held()
        world.handler = held
        first, second = world.asking(0, "a"), world.asking(1, "a")
        await until(lambda: held.waiting)
        del world.versions.found["a", "$LATEST"]
        held.answer(0)
        with pytest.raises(NotFound):
            await second
        assert (await first).view.error is None

    play(scenario, version("a"), most={"a": 1})
