"""Scaling on real virtual machines: ahead of requests, and behind them in steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.scaling.chains import Chains, Edge
from templated.scaling.chains.edges import Outcome
from templated.services.upkeep import learned
from tests.real.harness import Daemon
from tests.real.test_functions import deploy, invoke, source, until

pytestmark = pytest.mark.real
__all__ = ["source"]
CALLERS = 4


@pytest.fixture
def scaled(copied: Daemon) -> Iterator[Daemon]:
    """A daemon that lets go of what demand does not want, and soon."""
    copied.config |= {"scaling": {"window": "6s", "price": 1000.0, "pools": False}}
    yield copied
    copied.stop()


def shown(daemon: Daemon, name: str) -> dict[str, Any]:
    """What scaling says of a function now."""
    found: dict[str, Any] = daemon.json("scale", "show", name)["now"]
    return found


def test_up_ahead_of_requests_and_down_in_steps(scaled: Daemon, source: Path) -> None:
    """And what was learned by then is there after a restart."""
    scaled.start()
    deploy(scaled, source, "step", "sleep")
    payload, ends = b"0.2", time.monotonic() + 12

    def ask() -> None:
        while time.monotonic() < ends:
            scaled.client.invoke_function("step", payload)

    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    # One in reserve, which no request has asked for.
    until(lambda: shown(scaled, "step")["ready"] > CALLERS, "one in reserve", 12)
    for thread in threads:
        thread.join(30)
    seen = [shown(scaled, "step")["ready"]]
    deadline = time.monotonic() + 45
    while seen[-1] and time.monotonic() < deadline:
        ready = shown(scaled, "step")["ready"]
        if ready != seen[-1]:
            seen.append(ready)
        time.sleep(0.2)
    assert seen == sorted(seen, reverse=True) and len(seen) >= 3 and seen[-1] == 0, seen
    scaled.stop()
    scaled.start()
    detail = scaled.json("scale", "show", "step")
    assert sum(detail["history"]["arrivals"]) > CALLERS and detail["start_s"] > 0


def test_what_a_function_calls_is_ready(copied: Daemon, source: Path) -> None:
    """It is known of runs before that `first` calls `second` two to twenty seconds later."""
    copied.config |= {"scaling": {"pools": True}}
    copied.start()
    for name in ("first", "second"):
        deploy(copied, source, name, "sleep")
    copied.stop()
    edge, now = Edge("first", "second", True, 0.0), 0.0
    # So long that a slow host sees it within its time.
    edge.ran(*[Outcome(2.0, 20.0, 1)] * 4)
    chains = Chains()
    chains._add(edge)
    learned.write(copied.state / "scaling.learned", [msgspec.json.encode(chains.save(now))])
    copied.start()
    (call,) = copied.json("scale", "show", "first")["calls"]
    assert (call["callee"], call["fan_out"], call["traced"]) == ("second", 1, True)
    assert invoke(copied, "first", 0)["start"] != "warm"
    until(lambda: shown(copied, "second")["ready"] == 1, "what it calls is ready", 10)
    # It may be begun before the round that says so.
    until(lambda: "first calls it" in shown(copied, "second")["reason"], "why it is there", 10)
    assert invoke(copied, "second", 0)["start"] == "warm"
    (pool,) = copied.json("pool", "ls")
    assert pool["source"] == "scaling" and 1 <= pool["warm"]["target"] <= 4
    copied.stop()
