"""Each call that leaves the daemon hangs: a bound ends the wait, and nothing stays.

Calls of the same path hang side by side, each for another request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from templated.errors import TemplatedError
from templated.failpoints import Kind
from tests.faults.cases import PATHS, REFILL, REMOVAL, can, ends_daemon
from tests.faults.rig import VICTIM, Rig, error_line

pytestmark = pytest.mark.real


def bounded(places: tuple[str, ...]) -> list[str]:
    """The places whose hang has a bound that the daemon outlives."""
    return [place for place in can(places, Kind.HANG) if not ends_daemon(place)]


# Sent beside the call before: a request whose first call hangs comes to the second one, too.
BESIDE = ("cgroup.join", "qmp.migrate-incoming", "qmp.cont")


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("beside", [False, True])
def test_direct(rig: Rig, beside: bool, count: Callable[[int], None]) -> None:
    """Each request ends with one line that names its clone and the bound."""
    places = [place for place in bounded(PATHS["direct"]) if (place in BESIDE) == beside]
    names = [f"{VICTIM}-{number}" for number in range(len(places))]
    with rig.failing(*places, kind="hang"), ThreadPoolExecutor(len(names)) as pool:
        lines = list(pool.map(lambda n: error_line(lambda: rig.clone("direct", n)), names))
    assert all(name in line for name, line in zip(names, lines, strict=True))
    # Without the capability, QEMU itself refuses the state that follows.
    told = ("within", "longer than", "load of migration failed")
    assert [line for line in lines if not any(words in line for words in told)] == []
    rig.nothing_left()
    rig.clone()
    rig.remove()
    count(len(places))
    rig.clean = True


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("path", ["standby", "warm"])
def test_claim(rig: Rig, path: str, count: Callable[[int], None]) -> None:
    """A member that hangs is ended; its request gets another one, or one line."""
    places = bounded(PATHS[path])
    number = len(places)
    rig.pools(standby=number * (path == "standby"), warm=number * (path == "warm"))
    names = [f"{VICTIM}-{n}" for n in range(number)]

    def start(name: str) -> None:
        with contextlib.suppress(TemplatedError):
            rig.clone(path, name)

    with rig.failing(*places, kind="hang"), ThreadPoolExecutor(number) as pool:
        list(pool.map(start, names))
    for name in names:
        rig.remove(name)
    rig.pools()
    rig.nothing_left()
    count(number)
    rig.clean = True


@pytest.mark.long
@pytest.mark.parametrize("place", ["program.start", "qmp.set_link"])
def test_cold(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """The bound of a boot holds for what comes before it."""
    rig.ready_for("cold")
    with rig.failing(place, kind="hang"):
        assert VICTIM in error_line(lambda: rig.clone("cold"))
    rig.nothing_left()
    count()
    rig.clean = True


MEMBERS = {
    "standby": ("slot.overlay", "agent.connect", "qmp.greeting"),
    "warm": ("qmp.restore", "agent.identify", "qmp.stop"),
}


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("tier", ["standby", "warm"])
def test_refill(rig: Rig, tier: str, count: Callable[[int], None]) -> None:
    """Members that hang are ended, and the pool is filled all the same."""
    # Not all of them: each failure makes the next try later.
    places = [place for place in bounded(REFILL[tier]) if place in MEMBERS[tier]]
    number = len(places)
    with rig.failing(*places, kind="hang"):
        rig.pools(standby=number * (tier == "standby"), warm=number * (tier == "warm"))
    rig.pools()
    rig.nothing_left()
    count(number)
    rig.clean = True


def test_remove(rig: Rig, count: Callable[[], None]) -> None:
    """`rm` ends with one line, and can be repeated."""
    rig.clone()
    with rig.failing("files.remove", kind="hang"):
        assert "longer than" in error_line(rig.remove)
    rig.remove()
    rig.nothing_left()
    count()
    rig.clean = True


def test_guest(rig: Rig, count: Callable[[], None]) -> None:
    """A command in a guest that is never answered ends a little after its own bound."""
    with rig.failing("agent.exec", kind="hang"):
        error_line(lambda: rig.exec("keeper-0", timeout=1))
    rig.nothing_left()
    count()
    rig.clean = True


JOURNAL = [
    *((place, "clone") for place in PATHS["direct"] if place.startswith("journal.")),
    *((place, "rm") for place in REMOVAL if place.startswith("journal.")),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("place", "what"), JOURNAL)
def test_journal(rig: Rig, place: str, what: str, count: Callable[[], None]) -> None:
    """A transaction that hangs ends the daemon: the next one finds out what came of it."""
    if what == "rm":
        rig.clone()
    with rig.failing(place, kind="hang"):
        error_line(rig.clone if what == "clone" else rig.remove)
        assert rig.ended() == 1
    rig.recovered_from("the journal")
    count()
    rig.clean = True
