"""The guard of background tasks: errors travel one way, and nothing ends the daemon."""

from __future__ import annotations

import asyncio

import pytest

from templated.errors import Conflict, Defect
from templated.services.tasks import Tasks
from tests.unit.fake_daemon import run, until


async def fails(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize(
    ("error", "level", "traceback"),
    [
        (Conflict("the name is taken"), "WARNING", False),
        (ValueError("not expected"), "ERROR", True),
        (Defect("a move that is forbidden"), "ERROR", True),
    ],
    ids=["known", "unknown", "defect"],
)
def test_what_a_task_raises_is_logged_and_others_go_on(
    caplog: pytest.LogCaptureFixture, error: Exception, level: str, traceback: bool
) -> None:
    """A line for what is expected, a traceback for what is not, each with the task's name."""

    async def main() -> None:
        tasks, other = Tasks(), asyncio.Event()

        async def goes_on() -> None:
            await asyncio.sleep(0.01)
            other.set()

        tasks.spawn(goes_on(), "the other")
        tasks.spawn(fails(error), "the work")
        await other.wait()
        await tasks.end()

    run(main())
    (record,) = caplog.records
    assert record.levelname == level and "the work failed" in record.message
    assert bool(record.exc_info) == traceback


def test_run_raises_to_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    """As it was raised, and without a line in the log."""

    async def main() -> None:
        with pytest.raises(Conflict, match="taken"):
            await Tasks().run(fails(Conflict("taken")))

    run(main())
    assert caplog.records == []


def test_run_goes_on_without_its_caller() -> None:
    """Who asked may go away: the work ends as it would have."""

    async def main() -> None:
        tasks, go, done = Tasks(), asyncio.Event(), asyncio.Event()

        async def work() -> None:
            await go.wait()
            done.set()

        asking = asyncio.ensure_future(tasks.run(work()))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        go.set()
        await until(done.is_set)

    run(main())


def test_the_end_waits_for_what_is_given_back() -> None:
    """Also for a task that had not begun, whose work is then never started."""

    async def main() -> None:
        tasks, given_back = Tasks(), []

        async def holds() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                given_back.append("all of it")

        tasks.spawn(holds(), "holds something")
        await asyncio.sleep(0)
        tasks.spawn(fails(ValueError("never begun")), "never begun")
        await tasks.end()
        assert given_back == ["all of it"]

    run(main())
