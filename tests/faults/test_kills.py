"""SIGKILL at every place: what was reported is there after a restart, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from templated.model.clone import CloneState
from tests.faults.cases import PATHS, RECORDED, RECOVERY, REFILL, REMOVAL
from tests.faults.rig import VICTIM, Rig

pytestmark = [pytest.mark.real, pytest.mark.sampled]


def pairs(places: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """A case for each of the places of each path."""
    return [(path, place) for path, of_path in places.items() for place in of_path]


@pytest.mark.parametrize(("path", "place"), pairs(PATHS))
def test_start(rig: Rig, path: str, place: str, count: Callable[[], None]) -> None:
    """A clone is whole or not there."""
    rig.ready_for(path)
    rig.killed(place, lambda: rig.clone(path))
    if path in ("standby", "warm"):
        rig.restart()
        rig.pools()
    others = rig.recovered()
    assert [clone.name for clone in others] == ([VICTIM] if place in RECORDED else [])
    rig.remove()
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.parametrize(("tier", "place"), pairs(REFILL))
def test_refill(rig: Rig, tier: str, place: str, count: Callable[[], None]) -> None:
    """Members of a pool end with their daemon, however far they were."""
    standby, warm = int(tier == "standby"), int(tier == "warm")
    rig.killed(place, lambda: rig.pools(standby=standby, warm=warm, wait=False))
    rig.restart()
    rig.pools(standby=standby, warm=warm)
    rig.pools()
    assert rig.recovered() == []
    count()
    rig.clean = True


@pytest.mark.parametrize("place", REMOVAL)
def test_remove(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """A clone that was being removed is gone, dead, or still whole: then `rm` can be repeated."""
    rig.clone()
    rig.killed(place, rig.remove)
    states = [clone.state for clone in rig.recovered()]
    if place == "rm.moved":  # nothing was done yet
        assert states == [CloneState.RUNNING]
    elif place in ("rm.killed", "journal.clone_state", "journal.clone_state.commit"):
        assert states == [CloneState.DEAD]
    else:
        assert states == []
    rig.remove()
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.parametrize("place", RECOVERY)
def test_recovery(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """A daemon that dies while it recovers leaves no less to recover than it found."""
    rig.killed("start.confirmed", rig.clone)  # an orphan: a VM that no clone has
    with rig.failing(place, kind="kill"):
        rig.daemon.start(wait=False)
        assert rig.ended() < 0
    assert rig.recovered() == []
    count()
    rig.clean = True
