"""Calls that fail or hang while a daemon recovers: it serves, or ends with one line."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from templated.failpoints import Kind
from tests.faults.cases import RECOVERY, can, ends_daemon
from tests.faults.rig import Rig

pytestmark = [pytest.mark.real, pytest.mark.sampled]
CASES = [
    *((place, "error") for place in can(RECOVERY, Kind.ERROR)),
    # The others run into the same bounds, of ten seconds each.
    *((place, "hang") for place in ("journal.clones", "qmp.greeting", "agent.connect")),
    *((place, "hang") for place in ("recover.find", "recover.strays", "files.remove")),
    *((place, "hang") for place in ("generation.digest", "program.start")),
]
# Nothing can be known without these.
FATAL = ("recover.find",)


@pytest.mark.parametrize(("place", "kind"), CASES)
def test_recovery(rig: Rig, place: str, kind: str, count: Callable[[], None]) -> None:
    """What it cannot reach stays for the next one; no clone is given up."""
    rig.killed("start.confirmed", rig.clone)
    since = len(rig.daemon.log)
    with rig.failing(place, kind=kind):
        rig.daemon.start(wait=False)
        # A removal is tried again while the daemon serves.
        fatal = place in FATAL or (ends_daemon(place) and not place.startswith("journal.drop"))
        if fatal or (ends_daemon(place) and kind == "hang"):
            assert rig.ended() > 0
        else:
            rig.daemon.await_socket()
            for name, keeper in rig.keepers.items():
                assert rig.client.show_clone(name) == keeper
    assert "Traceback" not in rig.daemon.log[since:], rig.daemon.log[since:]
    assert rig.recovered() == []
    count()
    rig.clean = True


@pytest.mark.parametrize("place", ["agent.connect", "qmp.greeting", "qmp.query-status"])
def test_reached_again(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """A clone that did not answer at the start is reached by the same daemon, a little later."""
    rig.daemon.stop()
    with rig.failing(place, kind="error"):
        rig.daemon.start()
    assert "runs but does not answer" in rig.daemon.log
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(map(rig.answers, rig.keepers)):
        time.sleep(0.1)
    rig.nothing_left()
    count()
    rig.clean = True


@pytest.mark.parametrize("place", ["files.remove", "journal.drop_slot"])
def test_tried_again(rig: Rig, place: str, count: Callable[[], None]) -> None:
    """What could not be given back at the start is given back by the same daemon."""
    rig.killed("start.confirmed", rig.clone)
    with rig.failing(place, kind="error"):
        rig.daemon.start()
    deadline = time.monotonic() + 30
    while rig.daemon.rows()["slots"] > len(rig.keepers) and time.monotonic() < deadline:
        time.sleep(0.05)
    rig.nothing_left()
    count()
    rig.clean = True
