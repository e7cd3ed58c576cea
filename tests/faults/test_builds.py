"""Kills, errors and hangs in a build: the generation before serves, and nothing of the new one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from templated.failpoints import Kind
from tests.faults.cases import can
from tests.faults.rig import START, TEMPLATE, Rig, error_line

pytestmark = pytest.mark.real
BEFORE_BOOT = (
    *("journal.new_generation", "journal.new_generation.commit", "build.mkdir"),
    *("journal.new_slot", "slot.overlay", "process.spawn", "qmp.greeting"),
)
# Each takes a boot; from build.frozen on the base VM has ended.
AFTER_BOOT = (
    *(
        "build.booted",
        "agent.rehearse",
        "agent.quiesce",
        "qmp.stop",
        "qmp.netdev_del",
        "qmp.migrate",
        "qmp.save",
    ),
    *("qmp.quit", "build.disk", "build.frozen", "files.fsync", "build.freeze"),
    *("generation.digest", "process.spawn#2", "qmp.restore", "agent.identify#2", "build.proven"),
    *("build.manifest", "build.manifest-fsync", "build.manifest-rename", "journal.activate"),
    *("generation.seal", "generation.copy", "generation.copy#2", "journal.activate.commit"),
)


def quick(rig: Rig) -> None:
    """A build without the probes of the template: they take most of its time."""
    rig.daemon.variant(TEMPLATE, f"start_timeout: {START}", without_probes=True)


@pytest.mark.parametrize("place", BEFORE_BOOT)
def test_error(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """One line, at once."""
    fails(rig, place, "error")
    count()


@pytest.mark.sampled
@pytest.mark.parametrize(
    "place", [p for p in AFTER_BOOT if can((p.partition("#")[0],), Kind.ERROR)]
)
def test_late_error(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """The same after the guest has booted."""
    fails(rig, place, "error")
    count()


@pytest.mark.sampled
@pytest.mark.parametrize("place", ["qmp.greeting", "qmp.netdev_del", "qmp.greeting#2"])
def test_hang(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """A bound ends the build."""
    fails(rig, place, "hang")
    count()


def fails(rig: Rig, place: str, kind: str) -> None:
    """A build that fails leaves nothing, and what was there serves."""
    quick(rig)
    with rig.failing(place, kind=kind):
        error_line(rig.build)
    rig.nothing_left()
    rig.clone()
    rig.remove()
    rig.clean = True


@pytest.mark.sampled
@pytest.mark.parametrize("place", [*BEFORE_BOOT, *AFTER_BOOT])
def test_kill(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """The next daemon removes all of the build."""
    quick(rig)
    rig.killed(place, rig.build)
    assert rig.recovered() == []
    rig.clone()
    rig.remove()
    count()
    rig.clean = True


def test_kill_after_the_activation(rig: Rig, count: Callable[[], None]) -> None:
    """From that transaction on the new generation is the one that serves."""
    quick(rig)
    before = rig.client.show_template(TEMPLATE).active
    rig.killed("build.activated", rig.build)
    rig.restart()
    view = rig.client.show_template(TEMPLATE)
    assert view.active != before and not view.problem
    assert {generation.id for generation in view.generations} == {before, view.active}
    assert rig.clone().generation == view.active
    assert rig.client.list_clones()[:2] == list(rig.keepers.values())
    count()  # and the rig is replaced: it has two generations now
