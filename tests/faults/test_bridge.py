"""Kills, errors and hangs at each call of the kernel's network: no tap and no rule stays."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from templated.errors import TemplatedError
from tests.faults.rig import Rig, error_line, no_defect

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]
CLONE = (
    *("network.tap", "network.find", "network.label", "network.elements", "network.enslave"),
    *("network.up", "network.persist"),
)
REMOVE = ("network.find", "network.delete", "network.elements")
OPEN = ("network.tap", "network.open", "network.find", "program.here", "network.list")


def failing(call: str) -> tuple[str, ...]:
    """What has to fail with a call: tables that take no element are made anew by nft."""
    return (call, "program.here") if call == "network.elements" else (call,)


@pytest.mark.sampled
@pytest.mark.parametrize("call", CLONE)
def test_kill_in_a_start(bridged: Rig, call: str, count: Callable[[], None]) -> None:
    """The tap of a start that was cut short is found by its alias, or went with the daemon."""
    bridged.killed(call, bridged.clone)
    assert bridged.recovered() == []
    count()
    bridged.clean = True


@pytest.mark.sampled
@pytest.mark.parametrize("call", REMOVE)
def test_kill_in_a_removal(bridged: Rig, call: str, count: Callable[[], None]) -> None:
    """The next daemon removes the rest."""
    bridged.clone()
    bridged.killed(call, bridged.remove)
    assert bridged.recovered() == []
    count()
    bridged.clean = True


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("call", OPEN)
def test_recovery(bridged: Rig, call: str, kind: str, count: Callable[[], None]) -> None:
    """A daemon that cannot set up the network ends; the next one finds all there was."""
    bridged.killed("start.confirmed", bridged.clone)
    with bridged.failing(call, kind=kind):
        bridged.daemon.start(wait=False)
        assert bridged.ended() != 0
    assert bridged.recovered() == []
    count()
    bridged.clean = True


@pytest.mark.parametrize("call", CLONE)
def test_error_in_a_start(bridged: Rig, call: str, count: Callable[[], None]) -> None:
    """One line, and nothing of the tap."""
    with bridged.failing(*failing(call), kind="error", again=call == "network.elements"):
        error_line(bridged.clone)
    bridged.nothing_left()
    count()
    bridged.clean = True


@pytest.mark.parametrize("call", REMOVE)
def test_error_in_a_removal(bridged: Rig, call: str, count: Callable[[], None]) -> None:
    """`rm` can be repeated."""
    bridged.clone()
    with bridged.failing(*failing(call), kind="error", again=call == "network.elements"):
        error_line(bridged.remove)
    bridged.remove()
    bridged.nothing_left()
    count()
    bridged.clean = True


@pytest.mark.sampled
@pytest.mark.parametrize("call", ["network.label", "network.delete"])
def test_hang(bridged: Rig, call: str, count: Callable[[], None]) -> None:
    """Nobody knows what came of the call, and no other can follow it: the daemon ends."""
    if call == "network.delete":
        bridged.clone()
    with bridged.failing(call, kind="hang"):
        assert no_defect(bridged.clone if call == "network.label" else bridged.remove)
        assert bridged.ended() == 1
    bridged.recovered_from("the kernel's network")
    count()
    bridged.clean = True


def test_pool(bridged: Rig, count: Callable[[], None]) -> None:
    """Members of a pool have taps, too; with a failure at one, the pool is filled all the same."""
    with bridged.failing("network.enslave", kind="error"):
        bridged.pools(standby=2)
    bridged.pools()
    bridged.nothing_left()
    with pytest.raises(TemplatedError):
        bridged.clone("standby")
    count()
    bridged.clean = True
