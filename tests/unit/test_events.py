"""Events: what is kept, and followers that read slowly or not at all."""

from __future__ import annotations

import asyncio

from templated.services.reports.events import _KEPT, EventBus
from tests.unit.fake_daemon import run, until


def test_the_last_ones_are_kept() -> None:
    """A bounded number, oldest first."""
    bus = EventBus()
    for number in range(_KEPT + 5):
        bus.emit("clone.running", str(number), path="direct")
    kept = bus.recent()
    assert [kept[0].subject, kept[-1].subject, len(kept)] == ["5", str(_KEPT + 4), _KEPT]
    assert kept[0].details == {"path": "direct"} and kept[0].time.endswith("Z")


def test_follow() -> None:
    """First what is kept, then what comes, none of it twice; the end of the bus ends it."""

    async def main() -> None:
        bus = EventBus()
        bus.emit("a", "1")
        seen: list[str] = []

        async def follower() -> None:
            async for event in bus.follow():
                seen.append(event.subject)

        async with asyncio.TaskGroup() as group:
            group.create_task(follower())
            await until(lambda: seen == ["1"])
            bus.emit("a", "2")
            await until(lambda: seen == ["1", "2"])
            bus.emit("a", "3")
            bus.close()
        assert seen == ["1", "2", "3"]

    run(main())


def test_a_follower_that_does_not_read() -> None:
    """It loses the oldest, holds nobody up, and still learns of the end."""

    async def main() -> None:
        bus = EventBus()
        bus.emit("a", "first")
        events = bus.follow()
        assert (await anext(events)).subject == "first"
        for number in range(_KEPT + 10):
            bus.emit("a", str(number))
        bus.close()
        subjects = [event.subject async for event in events]
        assert subjects == [str(number) for number in range(10, _KEPT + 10)]

    run(main())


def test_following_after_the_end() -> None:
    """Who comes after the bus was closed gets what is kept, and then the end."""

    async def main() -> None:
        bus = EventBus()
        bus.emit("a", "1")
        bus.close()
        bus.close()
        assert [event.subject async for event in bus.follow()] == ["1"]

    run(main())
