"""Warm pools that follow what functions are about to need."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.model.api import PoolRequest
from templated.services.daemon import Services
from templated.services.upkeep.following import MOST, Following, most_within
from tests.unit.fake_daemon import play
from tests.unit.fake_instances import Held, settle, version
from tests.unit.test_scaling_loop import Watched, watch


class FakePools:
    """Sizes, and how long a member takes."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.times: defaultdict[str, float] = defaultdict(lambda: 5.0)

    def follow(self, template: str, warm: int) -> None:
        """Note it."""
        self.sizes[template] = warm

    def refill_time(self, template: str) -> float:
        """As a test has set it."""
        return self.times[template]


def following(watched: Watched, pools: Any) -> Following:
    """One by the clock of a test."""
    world = watched.world
    made = Following(watched.scaling, world.crews, pools, lambda: watched.now)
    world.crews.on_started.append(made.started)
    return made


def test_one_and_what_starts_in_the_time_of_a_refill(tmp_path: Path) -> None:
    held, pools = Held(), FakePools()

    async def scenario(watched: Watched) -> None:
        follows = following(watched, pools)
        follows.look()
        assert pools.sizes == {"t": 1}
        asking = [watched.world.asking(n) for n in range(4)]
        await settle(100)
        follows.look()
        assert pools.sizes == {"t": 5}  # as many as have just begun at once may do so again
        for number in range(4):
            held.answer(number)
        await asyncio.gather(*asking)
        # It shrinks one by one when nothing starts for long.
        seen = []
        for _ in range(20):
            watched.now += 60
            follows.look()
            seen.append(pools.sizes["t"])
        assert seen == sorted(seen, reverse=True) and {5, 4, 3, 2, 1} == set(seen)
        del watched.world.versions.found["f", "$LATEST"]
        watched.scaling.refresh("f")
        follows.look()
        assert pools.sizes == {"t": 0}

    watch(tmp_path / "l", scenario, handler=held)


def test_what_is_forecast_counts_by_the_time_of_a_refill(tmp_path: Path) -> None:
    """Twenty functions that each come about now, and have no instance."""
    pools = FakePools()

    async def scenario(watched: Watched) -> None:
        follows = following(watched, pools)
        for _ in range(5):
            await asyncio.gather(*(watched.world.ask(1, f"f{n}") for n in range(20)))
            await watched.second(120)
        watched.now += 1000  # of what started nothing is remembered
        pools.times["t"] = 60.0
        follows.look()
        needed = pools.sizes["t"]
        assert 1 < needed <= MOST
        pools.times["t"] = 6.0
        watched.now += 0
        follows._sizes.clear()
        follows.look()
        assert 1 < pools.sizes["t"] < needed

    versions = [version(f"f{n}") for n in range(20)]
    watch(tmp_path / "l", scenario, *versions, config={"price": 1000.0})


def test_most_within() -> None:
    assert most_within([], 5) == 0
    assert most_within([1, 2, 3, 10, 14, 15, 15.5], 5) == 3
    assert most_within([1.0] * 9, 0) == 9


def test_numbers_that_somebody_said_win(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        pools = running.pools
        assert pools.view("t").source == "template"
        pools.follow("t", 3)
        view = pools.view("t")
        assert (view.warm.target, view.standby.target, view.source) == (3, 0, "scaling")
        view = await pools.set("t", PoolRequest(warm=0, standby=0))
        assert (view.warm.target, view.source) == (0, "set")
        pools.follow("t", 4)
        assert pools.view("t").warm.target == 0
        view = await pools.set("t", PoolRequest(reset=True))
        assert (view.warm.target, view.source) == (4, "scaling")
        pools.follow("t", 0)
        assert pools.view("t").source == "template"

    play(tmp_path, scenario)


@pytest.mark.usefixtures("no_blocking_calls")
def test_a_look_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("templated.services.upkeep.following.INTERVAL", 0.001)
    pools = FakePools()

    async def scenario(watched: Watched) -> None:
        follows = following(watched, pools)
        task = asyncio.create_task(follows.run())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task})

    monkeypatch.setattr(FakePools, "follow", None)
    watch(tmp_path / "l", scenario)
    assert caplog.text.count("cannot have the pools follow") > 1
