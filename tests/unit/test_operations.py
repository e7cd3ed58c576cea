"""Long work: it is followed, it ends in one way, and its failure takes nothing with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from templated.errors import BuildError, NotFound
from templated.model.api import OperationEvent, OperationState
from templated.services.reports.operations import _KEPT, Operations, Progress
from templated.services.tasks import Tasks
from tests.unit.fake_daemon import run, until


@asynccontextmanager
async def background() -> AsyncIterator[tuple[Operations, Tasks]]:
    """Operations whose tasks end with the block."""
    tasks = Tasks()
    yield Operations(tasks), tasks
    await tasks.end()


async def followed(progress: Progress) -> list[OperationEvent]:
    """All events, to the last."""
    return [event async for event in progress.follow()]


def test_events() -> None:
    """Whoever follows sees all of them, also who comes late, and the result at the end."""

    async def main() -> None:
        go = asyncio.Event()

        async def work(progress: Progress) -> dict[str, Any]:
            progress.phase("boot", "start")
            await go.wait()
            progress.phase("boot", "done", 1.5)
            progress.probe("up", "passed", 0.5, "pong")
            progress.log("a line")
            return {"generation": "g"}

        async with background() as (operations, _):
            operation = operations.start("build", "t", work)
            assert operation.state is OperationState.RUNNING
            _, progress = operations.get(operation.id)
            early = asyncio.ensure_future(followed(progress))
            await until(lambda: progress.events)
            go.set()
            events = await early
            assert [e.type for e in events] == ["phase", "phase", "probe", "log", "end"]
            assert events[1].seconds == 1.5 and events[2].saw == "pong"
            assert events[-1].state == "done" and events[-1].result == {"generation": "g"}
            assert await followed(progress) == events
            operation, _ = operations.get(operation.id)
            assert operation.state is OperationState.DONE
            assert operation.result == {"generation": "g"}

    run(main())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BuildError("it failed", hint="do this"), "build_failed", "it failed"),
        (KeyError("x"), "internal", "KeyError: 'x'"),
    ],
)
def test_failure(error: Exception, code: str, message: str) -> None:
    """The operation has failed, with code, message and hint; the daemon goes on."""

    async def work(progress: Progress) -> dict[str, Any]:
        raise error

    async def main() -> None:
        async with background() as (operations, _):
            started = operations.start("build", "t", work)
            (end,) = await followed(operations.get(started.id)[1])
            operation, _ = operations.get(started.id)
            assert operation.state is OperationState.FAILED and operation.error == end.error
            assert end.error is not None and end.error.hint
            assert (end.error.code, end.error.message) == (code, message)

    run(main())


def test_the_daemon_stops() -> None:
    """Followers are told, and the work is given the time to clean up."""

    async def main() -> None:
        cleaned = []

        async def work(progress: Progress) -> dict[str, Any]:
            progress.log("on it")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                cleaned.append(True)
            return {}

        async with background() as (operations, tasks):
            started = operations.start("build", "t", work)
            _, progress = operations.get(started.id)
            await until(lambda: progress.events)
            await tasks.end()
            events = await followed(progress)
            assert events[-1].error is not None and events[-1].error.code == "cancelled"
            assert cleaned == [True]

    run(main())


def test_only_so_many_are_remembered() -> None:
    """The oldest that have ended are forgotten; one that runs never is."""

    async def main() -> None:
        async def waits(progress: Progress) -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        async def ends(progress: Progress) -> dict[str, Any]:
            return {}

        async with background() as (operations, _):
            running = operations.start("build", "t", waits)
            started = []
            for _ in range(_KEPT + 5):
                started.append(operations.start("build", "t", ends))
                await followed(operations.get(started[-1].id)[1])
            operations.get(running.id)
            operations.get(started[-1].id)
            with pytest.raises(NotFound, match=started[0].id):
                operations.get(started[0].id)
            assert len(operations._known) == _KEPT

    run(main())
