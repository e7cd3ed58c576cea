"""Asynchronous events over a real journal: none is lost, none is tried for ever."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from templated.errors import (
    GuestError,
    HostError,
    InvalidRequest,
    NotFound,
    StartError,
    TemplatedError,
    Throttled,
)
from templated.journal import FunctionRows, Journal
from templated.model.function import EventState, InvokeView
from templated.services.functions import queue
from templated.services.functions.queue import MAX_EVENT, EventLimits, EventQueue
from templated.services.reports.events import EventBus
from tests.unit.fake_daemon import run, until
from tests.unit.fake_instances import FakeVersions, version

pytestmark = pytest.mark.usefixtures("no_blocking_calls")
FAST = EventLimits(parallel=4, retries=(0.002, 0.004), pause=0.001, longest_pause=0.004)


class FakeRouter:
    """Runs requests, as a test says."""

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.qualifiers: list[str | None] = []
        self.traces: list[str] = []
        self.results: list[TemplatedError | str | None] = []
        """What the next ones give: an error, a function's failure, or None."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_once = self.most = 0

    async def invoke(
        self,
        name: str,
        qualifier: str | None,
        payload: bytes,
        *,
        trace: str = "",
        request: str | None = None,
    ) -> Any:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        self.runs[payload.decode()] += 1
        self.ids[request or ""] += 1
        self.qualifiers.append(qualifier)
        self.traces.append(trace)
        result = self.results.pop(0) if self.results else None
        if isinstance(result, TemplatedError):
            raise result
        failed = {"errorType": "E", "errorMessage": result}
        view = InvokeView(
            status=200,
            error="Unhandled" if result else None,
            payload=Raw(json.dumps(failed if result else None).encode()),
            version="1",
            instance="f-1",
            start="warm",
            phases_ms={},
            total_ms=1.0,
        )
        return SimpleNamespace(view=view)


class Setting:
    """A queue over a journal, with a router that does what a test says."""

    def __init__(self, rows: FunctionRows, limits: EventLimits) -> None:
        self.rows = rows
        self.router = FakeRouter()
        self.versions = FakeVersions(version("f"), version("g"))
        self.events = EventBus()
        self.now = 1e9
        self.queue = EventQueue(rows, self.versions, self.router, self.events, limits)

    async def add(self, payload: object, name: str = "f", qualifier: str | None = None) -> str:
        return await self.queue.enqueue(name, qualifier, json.dumps(payload).encode())

    async def states(self) -> dict[str, int]:
        return dict(Counter(row.state.value for row in await self.rows.events()))

    async def done(self) -> None:
        """Wait until nothing is queued, and nothing runs."""
        while await self.states() and set(await self.states()) - {"failed"}:
            await asyncio.sleep(0.002)


Scenario = Callable[[Setting], Coroutine[Any, Any, None]]


def play(
    tmp_path: Path, *scenarios: Scenario, limits: EventLimits = FAST, runs: bool = True
) -> None:
    """Scenarios one after the other, each on a restarted daemon with the same journal."""

    async def main() -> None:
        for number, scenario in enumerate(scenarios):
            journal = Journal(tmp_path / "journal")
            await journal.open()
            rows = FunctionRows(journal)
            if number == 0:
                for name in ("f", "g"):
                    await rows.deploy(version(name))
            setting = Setting(rows, limits)
            await setting.queue.open()
            running = asyncio.create_task(setting.queue.run()) if runs else None
            try:
                await scenario(setting)
            finally:
                if running is not None:
                    running.cancel()
                    await asyncio.wait({running})
                await journal.close()

    run(main())


def test_events_run_once_when_all_is_well(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        ids = await asyncio.gather(*(it.add(n) for n in range(30)))
        assert len(set(ids)) == 30
        await it.done()
        assert it.router.runs == {str(n): 1 for n in range(30)} and it.router.most <= 4
        assert set(it.router.ids) == set(ids) and await it.states() == {}
        assert set(it.router.qualifiers) == {None} and it.queue._waiting == {}

    play(tmp_path, scenario)


def test_an_event_is_in_the_journal_before_it_is_answered(tmp_path: Path) -> None:
    async def first(it: Setting) -> None:
        event = await it.add({"a": 1}, "g")
        (row,) = await it.rows.events()
        assert (row.id, row.function, row.payload) == (event, "g", b'{"a": 1}')
        (view,) = await it.queue.views("g")
        assert view.id == event and view.payload == {"a": 1} and view.state is EventState.QUEUED
        assert view.attempts == 0 and view.due.endswith("Z") and await it.queue.views("f") == []

    play(tmp_path, first, runs=False)


def test_a_function_that_fails_is_tried_twice_more(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = ["one", "two"]
        event = await it.add(1)
        await it.done()
        assert it.router.runs == {"1": 3} and it.router.ids == {event: 3}
        it.router.results = ["one", GuestError("its VM died"), "three"]
        event = await it.add(2)
        await it.done()
        assert it.router.runs["2"] == 3
        (view,) = await it.queue.views("f")
        assert (view.id, view.state, view.attempts) == (event, EventState.FAILED, 3)
        assert view.reason == "E: three" and view.payload == 2
        (told,) = it.events.recent()
        assert told.type == "function.event_failed" and told.subject == "f"
        assert it.queue._waiting == {}

    play(tmp_path, scenario)


def test_who_made_an_event_is_known_until_it_is_done(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = ["one"]
        await it.queue.enqueue("f", None, b"1", trace="Root=1-2-3")
        await it.queue.enqueue("g", None, b"2", trace="x" * 1000)
        await it.done()
        assert sorted(it.router.traces) == ["", "Root=1-2-3", "Root=1-2-3"]
        assert it.queue._traces == {}

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    "error",
    [
        Throttled("no", reason="reserved"),
        StartError("no", phase="spawn", reason="host"),
        HostError("no"),
    ],
)
def test_what_is_not_its_fault_is_no_try(tmp_path: Path, error: TemplatedError) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = [*[error] * 6, "failed", error, "failed"]
        await it.add(1)
        await it.done()
        assert it.router.runs == {"1": 10} and await it.states() == {}
        assert it.queue._pauses == {}

    play(tmp_path, scenario)


def test_an_event_becomes_too_old(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = [Throttled("no room", reason="concurrency")] * 1000
        await it.add(1)
        await it.done()
        (view,) = await it.queue.views("f")
        assert (view.state, view.attempts, view.reason) == (EventState.FAILED, 0, "no room")

    limits = EventLimits(pause=0.001, longest_pause=0.004, longest=0.05)
    play(tmp_path, scenario, limits=limits)


def test_a_version_that_is_gone(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = [NotFound("there is no f:9")]
        await it.add(1)
        await it.done()
        (view,) = await it.queue.views("f")
        assert view.state is EventState.FAILED and view.reason == "there is no f:9"

    play(tmp_path, scenario)


def test_bad_events(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        with pytest.raises(NotFound):
            await it.add(1, "none")
        with pytest.raises(NotFound):
            await it.add(1, "f", "7")
        with pytest.raises(InvalidRequest):
            await it.queue.enqueue("f", None, b"{")
        with pytest.raises(InvalidRequest, match="of an event"):
            await it.add("a" * MAX_EVENT)
        assert await it.states() == {} and it.queue._waiting == {}

    play(tmp_path, scenario)


def test_the_number_that_waits_is_bounded(tmp_path: Path) -> None:
    async def first(it: Setting) -> None:
        results = await asyncio.gather(*(it.add(n) for n in range(5)), return_exceptions=True)
        refused = [r for r in results if isinstance(r, Throttled)]
        assert len(refused) == 2 and refused[0].reason == "queue"
        await it.add(1, "g")

    async def second(it: Setting) -> None:
        with pytest.raises(Throttled):
            await it.add(9)
        await it.queue.removed("f", 3)
        with pytest.raises(Throttled):
            await it.add(9)
        await it.rows.drop_function("f")
        await it.queue.removed("f", None)
        await it.rows.deploy(version("f"))
        await it.add(9)
        assert len(await it.rows.events()) == 2

    play(tmp_path, first, second, limits=EventLimits(waiting=3), runs=False)


def test_a_journal_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(it: Setting) -> None:
        async def full(_: object) -> None:
            raise HostError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr(it.rows, "add_event", full)
            with pytest.raises(HostError):
                await it.add(1)
        assert it.queue._waiting == {}
        await it.add(2)
        await it.done()
        assert it.router.runs == {"2": 1}

    play(tmp_path, scenario)


def test_a_result_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs again: that is what at least once means."""
    monkeypatch.setattr(queue, "_PAUSE", 0.01)

    async def scenario(it: Setting) -> None:
        async def full(_: str) -> None:
            raise HostError("disk full")

        with monkeypatch.context() as patched:
            patched.setattr(it.rows, "drop_event", full)
            await it.add(1)
            await until(lambda: it.router.runs["1"] > 1)
        await it.done()
        assert await it.states() == {} and it.queue._waiting == {}

    play(tmp_path, scenario)


def test_dead_letters_are_bounded(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        for n in range(6):
            it.router.results = ["failed"]
            await it.add(n)
            await it.done()
        views = await it.queue.views("f")
        assert [view.payload for view in views] == [3, 4, 5]

    play(tmp_path, scenario, limits=EventLimits(retries=(), kept=3))


def test_retry_and_purge(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = ["failed", "failed"]
        first = await it.add(1)
        await it.add(2)
        await it.done()
        with pytest.raises(NotFound):
            await it.queue.retry("g", first)
        again = await it.queue.retry("f", first)
        assert again != first
        await it.done()
        assert it.router.runs["1"] == 2
        assert [view.payload for view in await it.queue.views("f")] == [2]
        assert await it.queue.purge("f") == 1 and await it.states() == {}

    play(tmp_path, scenario, limits=EventLimits(retries=()))


def test_a_daemon_that_is_killed_loses_none(tmp_path: Path) -> None:
    """What ran and what waited runs in the next one, with the tries that it had."""

    async def first(it: Setting) -> None:
        it.router.gate.clear()
        for n in range(7):
            await it.add(n)
        await until(lambda: it.router.at_once == 4)
        assert await it.states() == {"running": 4, "queued": 3}

    async def second(it: Setting) -> None:
        assert it.queue._waiting == {"f": 7}
        await it.done()
        assert it.router.runs == {str(n): 1 for n in range(7)}
        assert await it.states() == {} and it.queue._waiting == {}

    play(tmp_path, first, second)


def test_a_queue_that_is_closed(tmp_path: Path) -> None:
    """What runs is no failed try, and nothing begins; accepted events are for the next daemon."""

    async def first(it: Setting) -> None:
        it.router.gate.clear()
        it.router.results = [GuestError("the daemon ends")] * 5
        for n in range(5):
            await it.add(n)
        await until(lambda: it.router.at_once == 4)
        await it.queue.close()
        it.router.gate.set()
        await it.add(5)
        await asyncio.sleep(0.01)
        assert it.router.runs == {} and await it.states() == {"running": 4, "queued": 2}

    async def second(it: Setting) -> None:
        await it.done()
        assert it.router.runs == {str(n): 1 for n in range(6)}

    play(tmp_path, first, second)


def test_later_tries_are_later(tmp_path: Path) -> None:
    async def scenario(it: Setting) -> None:
        it.router.results = ["failed"]
        await it.add(1)
        await until(lambda: it.router.runs["1"])
        while await it.states() != {"queued": 1}:
            await asyncio.sleep(0.002)
        (row,) = await it.rows.events()
        assert row.attempts == 1 and row.reason == "E: failed"
        assert 50 < row.due - it.queue._clock() <= 60
        await it.add(2)
        await until(lambda: it.router.runs["2"])  # others are not held up
        assert it.router.runs["1"] == 1

    play(tmp_path, scenario, limits=EventLimits())
