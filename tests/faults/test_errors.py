"""Each call that leaves the daemon fails once: one line for the caller, and nothing stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from templated.failpoints import Kind
from tests.faults.cases import PATHS, REFILL, REMOVAL, can
from tests.faults.rig import VICTIM, Rig, error_line

pytestmark = pytest.mark.real
# A guest that boots is asked again until it answers: an error there is none for the caller.
STARTS = [
    (path, place)
    for path, places in PATHS.items()
    for place in can(places, Kind.ERROR)
    if place != "agent.ping"
]
REFILLS = [(tier, place) for tier, places in REFILL.items() for place in can(places, Kind.ERROR)]


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize(("path", "place"), STARTS)
def test_start(rig: Rig, path: str, place: str, count: Callable[[], None]) -> None:
    """The error names the clone; the next request works."""
    rig.ready_for(path)
    with rig.failing(place, kind="error"):
        assert VICTIM in error_line(lambda: rig.clone(path))
    rig.pools()
    rig.nothing_left()
    rig.clone()
    rig.remove()
    count()
    rig.clean = True


@pytest.mark.parametrize(("path", "place"), [("warm", "agent.identify"), ("standby", "qmp.cont")])
def test_fallback(rig: Rig, path: str, place: str, count: Callable[[], None]) -> None:
    """A caller that demands no path gets a clone all the same."""
    rig.ready_for(path)
    with rig.failing(place, kind="error"):
        rig.clone(None)
    rig.remove()
    rig.pools()
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize(("tier", "place"), REFILLS)
def test_refill(rig: Rig, tier: str, place: str, count: Callable[[], None]) -> None:
    """A pool whose member failed is filled all the same, a little later."""
    with rig.failing(place, kind="error"):
        rig.pools(standby=int(tier == "standby"), warm=int(tier == "warm"))
    rig.pools()
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.parametrize("place", can(REMOVAL, Kind.ERROR))
def test_remove(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """The clone stays as one that is being removed, and `rm` can be repeated."""
    rig.clone()
    with rig.failing(place, kind="error"):
        error_line(rig.remove)
    assert [c.state.value for c in rig.client.list_clones() if c.name == VICTIM] == ["removing"]
    rig.remove()
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.parametrize("place", ["agent.exec", "agent.put", "agent.get"])
def test_guest(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """A request to a guest that fails does the clone no harm."""
    client = rig.client
    calls: dict[str, Callable[[], object]] = {
        "agent.exec": lambda: rig.exec("keeper-0"),
        "agent.put": lambda: client.put_file("keeper-0", "/tmp/file", b"content"),
        "agent.get": lambda: client.get_file("keeper-0", "/etc/hostname"),
    }
    with rig.failing(place, kind="error"):
        error_line(calls[place])
    calls[place]()
    rig.nothing_left()
    count()
    rig.clean = True
