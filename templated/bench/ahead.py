"""What scaling has ready: when requests move to another version, and when many come at once."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter
from typing import Any

from templated.bench.functions import SLEEPER, Functions, archive
from templated.bench.stats import summarize
from templated.bench.threads import together
from templated.client import Client
from templated.errors import GuestError, TemplatedError
from templated.model.function import InvokeView

# Requests at once while an alias moves, and seconds at each weight.
_CALLERS, _AT_EACH = 4, 4.0
# How long each request of a step takes, and until when the daemon must want as many instances.
_SLEEP = 1.0
_WATCHED, _POLL = 10.0, 0.02


def measure_shift(bench: Functions, count: int) -> dict[str, Any]:
    """Requests by an alias of two versions, 0.9 and 0.1; then under load it moves from the first
    to a third one that has no instance: by 0.1, then wholly."""
    session, name = bench.session, bench.deploy()
    bench.client.publish_function(name)
    for size in (1, 2):
        bench.client.deploy_function(name, archive(size))
        bench.client.publish_function(name)
    bench.client.set_alias(name, "prod", {"1": 0.9, "2": 0.1})
    seen: Counter[str] = Counter()
    for number in range(count):
        session.progress(f"request {number + 1} of {count} by weight")
        seen[bench.invoke(name, qualifier="prod").version] += 1
    sigma = math.sqrt(count * 0.9 * 0.1)
    bench.client.set_alias(name, "prod", {"1": 1.0})
    moved, failed = _moved(bench, name)
    new = [view for view in moved if view.version == "3"]
    warm = sum(view.start == "warm" for view in new)
    return {
        "n": count,
        "second": seen["2"],
        "deviation_sigma": round((seen["2"] - count * 0.1) / sigma, 2),
        "while_moving": len(moved),
        "errors_while_moving": len(failed),
        "last_error": failed[-1] if failed else "",
        "new": len(new),
        "new_warm_percent": round(100 * warm / len(new), 3) if new else None,
        "last": moved[-1].version if moved else "",
    }


def _moved(bench: Functions, name: str) -> tuple[list[InvokeView], list[str]]:
    """Requests that ended while the alias moved, and what others failed with."""
    moved: list[InvokeView] = []
    failed: list[str] = []
    over = threading.Event()
    path = bench.session.client.path

    def call() -> None:
        while not over.is_set():
            try:
                moved.append(bench.invoke(name, Client(path), qualifier="prod"))
            except TemplatedError as error:
                failed.append(error.message)

    def shift() -> None:
        try:
            for weights in ({"1": 1.0}, {"1": 0.9, "3": 0.1}, {"3": 1.0}):
                bench.session.progress(f"requests while the alias moves to {weights}")
                bench.client.set_alias(name, "prod", weights)
                over.wait(_AT_EACH)
        finally:
            over.set()

    together([shift, *[call] * _CALLERS], over.set)
    return moved, failed


def measure_step(bench: Functions, count: int, rounds: int) -> dict[str, Any]:
    """So many requests at once to a version without an instance, in turn: with empty pools, with
    pools as they follow functions by themselves, and with a warm pool of as many members."""
    session, name = bench.session, bench.deploy(app=SLEEPER)
    wall: dict[str, list[float]] = {"empty": [], "followed": [], "pool": []}
    wanted: list[float] = []
    for number in range(rounds):
        for way, walls in wall.items():
            session.progress(f"step {number + 1} of {rounds}, {way}")
            if way == "pool":
                session.pools.fill("warm", count)
            elif way == "followed":
                session.pools.follow()
            else:
                session.pools.empty()
            version = bench.fresh(name)
            took, desired = _step(bench, name, version, count)
            walls.append(took * 1000)
            if desired is not None:
                wanted.append(desired * 1000)
            bench.client.remove_function(name, version)
            bench.gone(name)
    session.pools.empty()
    p50 = {way: statistics.median(walls) for way, walls in wall.items()}
    return {
        "requests": count,
        "seconds_each": _SLEEP,
        **{way: summarize(walls).as_dict() for way, walls in wall.items()},
        "empty_to_pool": round(p50["empty"] / p50["pool"], 3),
        "followed_to_pool": round(p50["followed"] / p50["pool"], 3),
        "desired": summarize(wanted).as_dict() if wanted else None,
        "never_desired": len(wall) * rounds - len(wanted),
    }


def _step(bench: Functions, name: str, version: str, count: int) -> tuple[float, float | None]:
    """Seconds until all were served, and until the daemon wanted as many instances; None when it
    never did."""
    gate, ends = threading.Event(), []
    payload = str(_SLEEP).encode()
    path = bench.session.client.path

    def call() -> None:
        gate.wait()
        view = Client(path).invoke_function(name, payload, qualifier=version)
        if view.error is not None:
            raise GuestError(f"{name} answered {bytes(view.payload)[:200]!r}")
        ends.append(time.monotonic())

    found: list[float] = []

    def watch() -> None:
        begin = time.monotonic()
        gate.set()
        while time.monotonic() - begin < _WATCHED and not found:
            if bench.client.show_scaling(name, qualifier=version).now.desired >= count:
                found.append(time.monotonic() - begin)
            elif len(ends) == count:
                return
            time.sleep(_POLL)

    begin = time.monotonic()
    together([*[call] * count, watch], gate.set)
    return max(ends) - begin, found[0] if found else None
