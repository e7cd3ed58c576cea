"""The loop that has the crews follow what scaling decides, over instances without VMs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.guest_functions import InitFailed
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.model.config import ScalingConfig
from templated.model.function import Version
from templated.scaling import Policy
from templated.scaling.chains import Edge
from templated.scaling.chains.edges import Outcome
from templated.services.functions.crew import KEPT
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.upkeep import learned
from templated.services.upkeep import scaling as module
from templated.services.upkeep.memory import EVERY
from templated.services.upkeep.scale_views import ScaleViews
from templated.services.upkeep.scaling import Scaling, Surroundings, policy
from tests.unit.fake_daemon import configured, daemon, run
from tests.unit.fake_instances import Held, World, play, settle, version

BEGIN = 1_800_000_000.0


class Watched:
    """A world, its scaling, and the time of the day."""

    def __init__(self, world: World, path: Path, **config: Any) -> None:
        self.world, self.now = world, BEGIN
        self.short: dict[str, str] = {}
        self.bytes = 30 << 20
        around = Surroundings(
            path=path,
            cost=lambda _: self.bytes,
            shortages=lambda: self.short,
            clock=lambda: self.now,
        )
        self.scaling = Scaling(
            ScalingConfig(**config),
            world.versions,
            world.crews,
            ScalingMetrics(world.registry),
            world.events,
            around,
        )
        world.router.tallies.append(self.scaling.tally)
        world.router.watchers.append(self.scaling.foreseen)
        world.crews.on_started.append(self.scaling.started)
        world.crews.on_readied.append(self.scaling.readied)

    async def second(self, count: int = 1) -> None:
        """So many seconds pass, with a round each."""
        for _ in range(count):
            self.now += 1
            self.scaling.round()
            await settle()

    def up(self, name: str = "f", number: int = 0) -> int:
        """The instances of a version."""
        found = self.world.versions.found[name, str(number) if number else "$LATEST"]
        return self.world.crews.supply(found).up


Scenario = Callable[[Watched], Coroutine[Any, Any, None]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where it is kept what was learned."""
    return tmp_path / "learned"


def watch(path: Path, scenario: Scenario, *versions: Version, **settings: Any) -> World:
    """Run a scenario with scaling that knows all versions."""
    config = settings.pop("config", {})

    async def main(world: World) -> None:
        watched = Watched(world, path, **config)
        await watched.scaling.open()
        await scenario(watched)

    return play(main, *versions, **settings)


@pytest.mark.usefixtures("no_blocking_calls")
def test_a_step_makes_instances_ahead_and_calm_ends_them_in_steps(path: Path) -> None:
    held = Held()

    async def scenario(watched: Watched) -> None:
        asking = [watched.world.asking(n) for n in range(10)]
        await settle(100)
        await watched.second()
        decision = watched.scaling.scaler.decision("f:$LATEST")
        assert decision.keep >= 10 and decision.kind == "panic"
        for _ in range(10):
            await watched.second(2)
        assert watched.up() == 12  # a buffer of a fifth
        for number in range(10):
            held.answer(number)
        await asyncio.gather(*asking)
        await watched.second()
        assert watched.up() == 12
        counts = [watched.up()]
        for _ in range(600):
            await watched.second()
            if watched.up() != counts[-1]:
                counts.append(watched.up())
        assert counts == sorted(counts, reverse=True) and len(counts) >= 4
        assert counts[-1] <= 1

    world = watch(path, scenario, handler=held, config={"price": 4.0})
    assert world.counted("templated_function_cold_starts_total", function="f", version="$LATEST")


def test_what_is_beyond_demand_is_paused_at_once(path: Path) -> None:
    """And not after `freeze_after`, which is long here."""
    held = Held()

    async def scenario(watched: Watched) -> None:
        world = watched.world
        asking = [world.asking(n) for n in range(3)]
        await settle(100)
        await watched.second()
        for number in range(3):
            held.answer(number)
        await asyncio.gather(*asking)
        assert world.states().get("idle") == 3
        await watched.second(300)
        decision = watched.scaling.scaler.decision("f:$LATEST")
        assert decision.desired == 0 and world.states().get("idle", 0) == 0

    watch(path, scenario, handler=held)


def test_bounds_hold(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        world, held = watched.world, Held()
        world.handler = held
        world.versions.least["f"], world.versions.most["f"] = 1, 2
        watched.scaling.refresh("f")
        world.crews.aim(version(), 1, KEPT)
        await watched.second()
        assert watched.up() == 1
        asking = [world.asking(n) for n in range(2)]
        await settle(50)
        await watched.second(70)
        decision = watched.scaling.scaler.decision("f:$LATEST")
        assert (decision.keep, decision.kind) == (2, "max") and watched.up() == 2
        for number in range(2):
            held.answer(number)
        await asyncio.gather(*asking)
        await watched.second(1200)
        assert watched.up() == 1

    watch(path, scenario, config={"buffer_floor": 1, "price": 4.0})


def test_without_room_on_the_host_nothing_grows(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        world, held = watched.world, Held()
        world.handler = held
        asking = [world.asking(n) for n in range(5)]
        await settle(50)
        watched.scaling.shortages = {"cpu": "it is short"}
        await watched.second(70)
        assert watched.up() == 5  # and none in reserve
        watched.scaling.shortages = {}
        await watched.second(10)
        assert watched.up() == 6
        for number in range(5):
            held.answer(number)
        await asyncio.gather(*asking)

    watch(path, scenario)


def test_a_budget_ends_what_it_has_no_room_for(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        await asyncio.gather(*(watched.world.ask(n) for n in range(4)))
        await settle(50)
        await watched.second()
        assert watched.up() <= 2

    watch(path, scenario, config={"memory": "64MiB"})


def test_calls_are_begun_ahead_of_the_next_round(path: Path) -> None:
    """`f` has called `g` after 0.2 s for some time: with no round between, `g` has an instance."""

    async def scenario(watched: Watched) -> None:
        scaling, world = watched.scaling, watched.world
        edge = Edge("f", "g", True, time.perf_counter())
        edge.ran(*[Outcome(0.2, 0.2, 1)] * 5)
        scaling.chains._add(edge)
        await world.ask(1)
        await settle()
        assert watched.up("g") == 1
        await watched.second()
        decision = scaling.scaler.decision("g:$LATEST")
        assert (decision.keep, decision.kind, decision.reason) == (
            *(1, "expected"),
            "f calls it in 0.2 s",
        )
        order = world.made[0].vm.agent.orders[-1]
        outcome = await world.router.invoke("g", None, b"1", trace=order.trace)
        assert outcome.view.start == "warm"
        await watched.second()
        assert watched.up("g") == 1  # it has come: none is expected beside it
        # Nothing comes: it does not stay longer than it was expected.
        await world.ask(1)
        await settle()

    watch(path, scenario, version(), version("g"))


def test_what_is_expected_ends_with_its_time(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        edge = Edge("f", "g", True, time.perf_counter())
        edge.ran(*[Outcome(0.0, 0.0, 2)] * 5)
        watched.scaling.chains._add(edge)
        await watched.world.ask(1)
        await settle()
        await watched.second()
        assert watched.up("g") == 2
        await asyncio.sleep(0.1)
        await watched.second(2)
        assert watched.up("g") == 0

    watch(path, scenario, version(), version("g"))


def test_what_is_called_may_go_before_the_round(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        world, scaling = watched.world, watched.scaling
        edge = Edge("f", "g", True, time.perf_counter())
        edge.ran(*[Outcome(0.2, 0.2, 1)] * 5)
        scaling.chains._add(edge)
        await world.ask(1)
        await settle()
        del world.versions.found["g", "$LATEST"]
        scaling.refresh("g")
        await world.router.removed("g", None)
        await watched.second(2)
        assert not scaling.chains.edges() and not scaling._calls.begun
        await world.ask(1)

    watch(path, scenario, version(), version("g"))


def test_a_function_that_goes_in_the_middle_is_no_error(path: Path) -> None:
    held = Held()

    async def scenario(watched: Watched) -> None:
        world, scaling = watched.world, watched.scaling
        asking = world.asking(1)
        await settle(50)
        await watched.second()
        del world.versions.found["f", "$LATEST"]
        scaling.refresh("f")
        await world.router.removed("f", None)
        await watched.second()
        held.answer(1)
        await asking
        await watched.second()
        assert "f:$LATEST" not in scaling.scaler and not scaling.tally._under_way
        # One of the same name is another one.
        world.versions.found["f", "$LATEST"] = version(code="b")
        scaling.changed(version(code="b"))
        await watched.second()
        assert scaling.scaler.decision("f:$LATEST").keep == 0

    watch(path, scenario, handler=held)


def test_what_never_starts_is_not_tried_for_ever(path: Path) -> None:
    """Only as its requests come; and it is as before once it works."""
    tried = []

    async def scenario(watched: Watched) -> None:
        world = watched.world

        async def broken(*_: object) -> None:
            tried.append(watched.now)
            raise InitFailed("no", payload=b"{}")

        works, world.load = world.load, broken
        await world.ask(1)
        for _ in range(60):
            await watched.second()
            await asyncio.sleep(0.002)
        assert len(tried) == 4
        assert watched.scaling.scaler.decision("f:$LATEST").keep == 1
        world.load = works
        await asyncio.sleep(0.05)
        await world.ask(2)
        await watched.second(2)
        assert watched.up() == 1 and world.crews.supply(version()).aim == 1

    watch(path, scenario, pace=0.001)


def test_a_new_latest_takes_over_what_was_decided(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        world = watched.world
        await asyncio.gather(*(world.ask(n) for n in range(3)))
        await watched.second()
        assert watched.up() == 3
        latest = world.versions.found["f", "$LATEST"] = version(code="b")
        world.crews.changed(latest)
        watched.scaling.changed(latest)
        await watched.second(2)
        assert watched.up() == 3
        assert {clone.name for clone in world.clones.values()} == {
            instance.name for instance in world.instances if instance.version == latest
        }

    watch(path, scenario)


def test_what_is_ready_for_a_move_stays_until_requests_come(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        crews, second = watched.world.crews, version(number=2)
        assert await crews.readied(second, 3) == ""
        await watched.second(55)
        assert watched.up(number=2) == 3
        assert watched.scaling.scaler.decision("f:2").reason == "requests move to it"
        await watched.second(10)
        assert watched.up(number=2) == 0
        await watched.world.router.removed("f", 2)
        watched.scaling.readied(version(number=9), 3)  # it is gone

    watch(path, scenario, version(), version(number=2))


def test_a_round_that_fails_is_told_once_and_the_next_one_works(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.001)

    async def scenario(watched: Watched) -> None:
        world, failing = watched.world, [True]
        working = watched.scaling.scaler.round

        def broken(now: float, *, growth: bool = True) -> Any:
            if failing:
                raise RuntimeError("no")
            return working(now, growth=growth)

        monkeypatch.setattr(watched.scaling.scaler, "round", broken)
        task = asyncio.create_task(watched.scaling.run())
        failures = "templated_scaling_failures_total"
        while (world.counted(failures, what="round") or 0) < 3:
            await asyncio.sleep(0.001)
        told = [event for event in world.events.recent() if event.type == "scaling.failed"]
        assert [event.details for event in told] == [{"reason": "RuntimeError: no"}]
        failing.clear()
        await world.ask(1)
        while not world.counted("templated_scaling_kept", function="f", version="$LATEST"):
            await asyncio.sleep(0.001)
        assert (world.counted("templated_scaling_round_seconds_count") or 0) > 3
        assert world.counted("templated_scaling_ready", function="f", version="$LATEST") == 1
        task.cancel()
        await asyncio.wait({task})

    watch(path, scenario)


def test_a_forecaster_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr("templated.scaling.forecast.period.Period.learn", broken)

    async def scenario(watched: Watched) -> None:
        await watched.world.ask(1)
        await watched.second(130)
        (event,) = [e for e in watched.world.events.recent() if e.type.startswith("scaling")]
        assert (event.type, event.subject) == ("scaling.forecaster_failed", "f")
        assert event.details["forecaster"] == "period"

    world = watch(path, scenario)
    assert world.counted("templated_scaling_failures_total", what="forecaster") == 1


# --- what was learned -------------------------------------------------------------------------


async def _timer(watched: Watched) -> None:
    """Every five minutes, for an hour."""
    for _ in range(12):
        await watched.world.ask(1)
        for _ in range(10):
            watched.now += 30
            watched.scaling.round()
        await settle()


def test_a_restart_forgets_nothing_that_matters(path: Path) -> None:
    async def before(watched: Watched) -> None:
        await _timer(watched)
        edge = Edge("f", "g", True, time.perf_counter())
        edge.ran(*[Outcome(0.2, 0.2, 1)] * 5)
        watched.scaling.chains._add(edge)
        await watched.scaling.close()

    async def after(watched: Watched) -> None:
        watched.now = BEGIN + 3600.0
        (edge,) = watched.scaling.chains.edges()
        assert (edge.caller, edge.callee, edge.share) == ("f", "g", 1.0)
        await watched.second()
        assert watched.up() == 1  # it comes again

    watch(path, before)
    assert path.stat().st_size < 64 << 10
    watch(path, after)


def test_it_is_written_now_and_then(path: Path) -> None:
    async def scenario(watched: Watched) -> None:
        await watched.world.ask(1)
        await settle()
        for _ in range(int(EVERY) + 2):
            watched.now += 1
            await watched.scaling._remember()
        chains, functions = learned.read(path)
        assert chains == {"edges": []} and list(functions["functions"]) == ["f:$LATEST"]
        watched.scaling._memory._path = path / "no" / "where"
        for _ in range(int(EVERY) + 2):
            watched.now += 1
            await watched.scaling._remember()

    world = watch(path, scenario)
    assert world.counted("templated_scaling_failures_total", what="save") == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "empty", "no json"])
def test_what_is_damaged_is_refused_and_begun_anew(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def before(watched: Watched) -> None:
        await _timer(watched)
        await watched.scaling.close()

    watch(path, before)
    content = path.read_bytes()
    damaged = {
        "flip": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "cut": content[: len(content) // 2],
        "other": content.replace(b"scaling 1", b"scaling 9"),
        "empty": b"",
        "no json": content,
    }[damage]
    if damage == "no json":
        learned.write(path, [b"[1]"])
    else:
        path.write_bytes(damaged)

    async def after(watched: Watched) -> None:
        watched.now = BEGIN + 3600.0
        await watched.second()
        assert watched.up() == 0
        await watched.scaling.close()

    world = watch(path, after)
    assert "begins anew" in caplog.text
    assert world.counted("templated_scaling_failures_total", what="load") == 1
    assert learned.read(path)[0] == {"edges": []}


def test_its_file_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MOST", 100)
    assert learned.write(path, [b'{"a":1}'] * 20) == 20 - 12
    assert learned.read(path) == [{"a": 1}] * 12
    path.write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="too big"):
        learned.read(path)


def test_nothing_is_there_at_first(path: Path) -> None:
    assert learned.read(path) == []


def test_settings_are_those_of_the_configuration() -> None:
    assert policy(ScalingConfig()) == Policy()
    made = policy(ScalingConfig(window="6s", memory="1GiB", buffer_floor=2, price=0.0))
    assert (made.stable, made.panic, made.memory, made.buffer_floor) == (6, 2, 1024.0, 2)
    for window in ("5s", "61s"):
        with pytest.raises(ValueError, match="window"):
            ScalingConfig(window=window)


def test_what_is_shown(path: Path) -> None:
    """Of a version that has some instances, and is called by another."""
    held = Held()

    async def scenario(watched: Watched) -> None:
        world, scaling = watched.world, watched.scaling

        class Finds:
            def version(self, name: str, qualifier: str | None) -> Version:
                return world.versions.found[name, qualifier or "$LATEST"]

        views = ScaleViews(scaling, Finds(), world.crews)
        edge = Edge("f", "g", True, time.perf_counter())
        edge.ran(*[Outcome(0.2, 0.3, 2)] * 5)
        scaling.chains._add(edge)
        asking = [world.asking(n, qualifier="1") for n in range(3)]
        await settle(50)
        await watched.second(90)
        called, latest, first = views.all()[::-1]
        assert (called.function, latest.version, first.version) == ("g", "1", "$LATEST")
        assert (latest.requests, latest.ready, latest.waiting) == (3, 4, 0)
        assert latest.mean == pytest.approx(3, abs=0.1) and latest.kept == 4
        detail = views.one("f", None)  # the one that was asked for
        assert detail.now == latest and detail.start_s >= 0 and detail.instance_mib == 30
        (call,) = detail.calls
        assert (call.callee, call.fan_out, call.runs, call.share) == ("g", 2, 5, 1.0)
        assert views.one("g", None).calls == detail.calls
        history = detail.history
        assert max(history.peak) == 3 and history.ready[-1] == 4
        assert sum(history.arrivals) == 3 and len(history.mean) == len(history.ready) == 180
        assert called.ready == 6  # two for each of the three
        for number in range(3):
            held.answer(number)
        await asyncio.gather(*asking)

    watch(path, scenario, version(), version(number=1), version("g"), handler=held)


def test_the_scaler_is_told_after_a_request_has_gone_on(path: Path) -> None:
    """What it does with that is none of what a request waits for."""

    async def scenario(watched: Watched) -> None:
        crew = watched.world.crews.of(version())
        scaler, tally = watched.scaling.scaler, watched.scaling.tally
        before = scaler.demand(crew.key).level
        for _ in range(3):
            tally.came(crew)
        assert scaler.demand(crew.key).level == before == 0
        await settle(2)
        assert scaler.demand(crew.key).level == 3
        for _ in range(3):
            tally.went(crew)
        assert scaler.demand(crew.key).level == 3
        await settle(2)
        assert scaler.demand(crew.key).level == 0

    watch(path, scenario)


def test_a_daemon_has_it_unless_it_is_switched_off(tmp_path: Path) -> None:

    async def main(enabled: bool) -> None:
        config = configured(tmp_path, scaling={"enabled": enabled})
        async with daemon(config, FakeHypervisor()) as running:
            assert (running.scaling is not None) == enabled
        assert (tmp_path / "s/scaling.learned").exists() == enabled

    run(main(False))
    run(main(True))
    assert not (tmp_path / "s/scaling.part").exists()
