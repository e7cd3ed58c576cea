"""Instances that users have asked for: what may be asked, and that they are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from templated.drivers.guest_functions import InitFailed, LoadOrder
from templated.errors import InvalidRequest, NotFound
from templated.model.function import Readiness
from templated.services.functions.allotment import Capacity
from templated.services.functions.kept import Kept
from tests.unit.fake_daemon import until
from tests.unit.fake_instances import FakeGuest, World, loaded
from tests.unit.test_registry import Rig, play, refused

pytestmark = pytest.mark.usefixtures("no_blocking_calls")


def house(rig: Rig, **settings: object) -> tuple[World, Kept]:
    """Instances over the functions of a registry."""
    world = World(rig.registry, **settings)  # type: ignore[arg-type]
    kept = Kept(rig.registry, world.crews)
    rig.registry.on_changed.append(world.router.changed)
    rig.registry.on_removed.append(world.router.removed)
    rig.registry.on_kept.append(kept.changed)
    kept.open()
    return world, kept


def served(world: World) -> list[str]:
    """The versions of the instances that there are."""
    return sorted(clone.function for clone in world.clones.values())


async def close(world: World) -> None:
    await world.router.close()
    await world.tasks.end()
    assert world.clones == {}


# --- what may be asked ------------------------------------------------------------------------


def test_what_cannot_be_is_refused_with_the_sum(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        registry = rig.registry
        registry._capacity = Capacity(concurrency=10, clones=12)
        await rig.published(2)
        await registry.set_alias("f", "live", {"1": 1.0})
        await rig.deploy("g")
        scale, provision = registry.scale, registry.provision
        await scale("g", least=3)
        error = await refused(InvalidRequest, scale("f", least=3, most=2), "its max is 2")
        assert error.message == "function f is to keep 3 instances, and its max is 2"
        await scale("f", least=1, most=6)
        await provision("f", "live", 3)
        error = await refused(InvalidRequest, provision("f", "2", 3), "its max is 6")
        assert "1 by its min + 3 for live + 3 for 2 = 7 instances" in error.message
        error = await refused(InvalidRequest, scale("f", most=3), "its max is 3")
        assert "--max 4" in error.hint
        error = await refused(InvalidRequest, registry.reserve("f", 3), "3 of its requests may run")
        assert "reserve f 4" in error.hint
        await scale("f", most=0)
        error = await refused(InvalidRequest, provision("f", "2", 4), "concurrency is 10")
        assert "8 kept for f + 3 for other functions = 11 instances" in error.message
        assert error.hint.startswith("at most 7 can be kept for it")
        registry._capacity = Capacity(clones=7)
        await refused(InvalidRequest, scale("g", least=4), "limits.clones is 7")
        registry._capacity = Capacity(concurrency=2)  # the configuration is another one
        await refused(InvalidRequest, scale("g", least=4), "concurrency is 2")
        await scale("g", least=2)  # less is still too much, and better
        await refused(NotFound, scale("h", least=1), "no function h")
        await refused(InvalidRequest, scale("f", least=-1), "least")
        assert (registry.least("f"), registry.maximum("f")) == (1, None)

    play(tmp_path, work)


def test_for_what_instances_are_provisioned(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        registry = rig.registry
        await rig.published(2)
        error = await refused(
            InvalidRequest, registry.provision("f", "$LATEST", 1), "which changes"
        )
        assert "--min" in error.hint
        await refused(NotFound, registry.provision("f", "3", 1), "no version or alias 3")
        await refused(NotFound, registry.provision("f", "1", None), "nothing is provisioned")
        await registry.set_alias("f", "live", {"1": 0.9, "2": 0.1})
        await registry.provision("f", "live", 10)
        await registry.provision("f", "2", 3)
        await registry.provision("f", "1", 4)
        await registry.provision("f", "1", None)
        await registry.scale("f", least=2)
        kinds = [event.type for event in rig.bus.recent()]
        assert kinds[-5:] == [*["function.provisioned"] * 4, "function.scaled"]

    async def later(rig: Rig) -> None:
        """By weight, and beside what is for the version itself."""
        registry = rig.registry
        numbers = {v.label: registry.kept(v) for v in registry.versions("f")}
        assert numbers == {"1": 9, "2": 4} and registry.kept(registry.latest("f")) == 2
        await registry.set_alias("f", "live", {"2": 1.0})
        numbers = {v.label: registry.kept(v) for v in registry.versions("f")}
        assert numbers == {"1": 0, "2": 13}
        await registry.remove_alias("f", "live")
        assert [p.qualifier for p in registry.provisioned("f")] == ["2"]
        await registry.remove("f", "2")
        assert registry.provisioned("f") == []

    async def at_last(rig: Rig) -> None:
        assert rig.registry.provisioned("f") == [] and rig.registry.least("f") == 2
        gone = rig.registry.latest("f")
        await rig.registry.remove("f")
        assert rig.registry.kept(gone) == 0

    play(tmp_path, work, later, at_last)


# --- that they are there ----------------------------------------------------------------------


def test_they_are_there_after_a_start_a_deploy_and_a_death(tmp_path: Path) -> None:
    async def first(rig: Rig) -> None:
        await rig.deploy()
        await rig.registry.scale("f", least=2)

    async def second(rig: Rig) -> None:
        world, _ = house(rig, pace=0.01)
        await until(lambda: world.states() == {"paused": 2})
        assert (await world.ask(1)).view.start == "warm"
        await rig.deploy(content=b"2")
        await until(lambda: len(world.made) == 4 and len(world.clones) == 2)
        next(iter(world.clones.values())).vm.machine.end()
        await until(lambda: len(world.made) == 5 and len(world.clones) == 2)
        await rig.registry.scale("f", least=0)
        assert world.crews.trim(rig.registry.latest("f"), 9) == 2
        await until(lambda: not world.clones)
        await close(world)

    play(tmp_path, first, second)


def test_those_of_versions_and_aliases(tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        await rig.published(2)
        world, kept = house(rig)
        await rig.registry.set_alias("f", "live", {"1": 1.0})
        await rig.registry.provision("f", "live", 2)
        (view,) = kept.views("f")
        assert (view.requested, view.available, view.status) == (2, 0, Readiness.IN_PROGRESS)
        await until(lambda: served(world) == ["f:1"] * 2)
        await until(lambda: kept.views("f")[0].status is Readiness.READY)
        (view,) = kept.views("f")
        assert (view.allocated, view.available) == (2, 2)
        await rig.registry.set_alias("f", "live", {"1": 0.5, "2": 0.5})
        await until(lambda: served(world) == ["f:1", "f:1", "f:2"])
        await rig.registry.remove("f")
        await until(lambda: not world.clones)
        await close(world)

    play(tmp_path, work)


def test_those_that_cannot_be_had(tmp_path: Path) -> None:
    """The status says why, until they are there after all."""

    async def work(rig: Rig) -> None:
        async def broken(_: FakeGuest, __: LoadOrder) -> None:
            raise InitFailed("no module named app", payload=b"")

        await rig.published(1)
        world, kept = house(rig, pace=0.01)
        world.load = broken
        await rig.registry.provision("f", "1", 1)
        await until(lambda: kept.views("f")[0].status is Readiness.FAILED)
        assert kept.views("f")[0].reason == "its init fails: no module named app"
        world.load = loaded
        await until(lambda: kept.views("f")[0].status is Readiness.READY)
        assert kept.views("f")[0].reason == ""
        await close(world)

    play(tmp_path, work)
