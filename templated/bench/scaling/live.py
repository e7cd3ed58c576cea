"""`bench scaling --live`: a part of a trace on real VMs through the gateway, and what the
simulation says of the same requests."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from templated.bench.functions import SLEEPER, Functions
from templated.bench.gateway import lambdas
from templated.bench.scaling.requests import Request, part, requests
from templated.bench.scaling.simulate import World
from templated.bench.scaling.trace import Row, Trace
from templated.bench.session import Session, require_memory
from templated.bench.stats import summarize
from templated.cli.scrape import Scrape
from templated.errors import GuestError, InvalidRequest
from templated.services.functions.starts import host_starts
from templated.services.upkeep.scaling import policy

_REHEARSALS = 5
# Beyond the requests that the simulation saw at once: those that are late.
_MORE_THREADS = 8
_TIMEOUT = 60.0
_STARTED = ("start", "attach", "init")


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    speed: float
    """How many minutes of the trace go by in one."""
    begin: int
    """The first minute."""
    minutes: int
    gateway: str
    """The URL of Lambda's API, for boto3 with the keys that it finds by itself."""


@dataclass
class _Seen:
    """What happened to the requests."""

    late: list[float] = field(default_factory=list)
    """Milliseconds after its time that each was sent."""
    took: list[float] = field(default_factory=list)
    """Milliseconds that each took beyond what its handler slept."""
    errors: list[str] = field(default_factory=list)


def replay_live(session: Session, trace: Trace, plan: Plan) -> dict[str, Any]:
    """The report. Functions that it makes are removed again."""
    config = session.client.info().scaling
    if config is None or not config.enabled:
        raise InvalidRequest(
            "the daemon does not scale", hint="set scaling.enabled, and restart it"
        )
    rows = part(trace, plan.begin, plan.minutes)
    wanted = requests(rows, plan.speed)
    with Functions(session) as functions:
        session.progress(f"deploying {len(rows)} functions")
        names = [functions.deploy(app=SLEEPER) for _ in rows]
        start, mib = _rehearse(functions)
        world = World(len(rows), policy(config), mib, start, host_starts())
        world.run(wanted)
        require_memory(world.most, "instances")
        session.progress(f"{len(wanted)} requests; {sum(c.cold for c in world.crews)} cold ones?")
        seen = _Seen()
        before = _cold_starts(session)
        _send(session, names, wanted, plan.gateway, world.most, seen)
        cold = _cold_starts(session)
    live = [cold.get(name, 0) - before.get(name, 0) for name in names]
    return {
        "trace": trace.name,
        "speed": plan.speed,
        "begin": plan.begin,
        "minutes": plan.minutes,
        "start_ms": round(start * 1000, 1),
        "instance_mib": mib,
        **_counts(rows, wanted, world, live),
        "errors": len(seen.errors),
        "last_error": seen.errors[-1] if seen.errors else "",
        "late_ms": summarize(seen.late).as_dict(),
        "beyond_handler_ms": summarize(seen.took).as_dict() if seen.took else None,
    }


def _counts(
    rows: tuple[Row, ...], wanted: list[Request], world: World, live: list[int]
) -> dict[str, Any]:
    simulated = [crew.cold for crew in world.crews]
    counted = [sum(request.function == number for request in wanted) for number in range(len(rows))]
    return {
        "requests": len(wanted),
        "at_once": world.most,
        "cold_simulated": sum(simulated),
        "cold_live": sum(live),
        "off_percent": round(100 * (sum(live) / max(1, sum(simulated)) - 1), 1),
        "rows": [
            {"function": row.name, "requests": count, "cold_simulated": one, "cold_live": other}
            for row, count, one, other in zip(rows, counted, simulated, live, strict=True)
        ],
    }


def _rehearse(functions: Functions) -> tuple[float, float]:
    """Seconds that a start takes, usually, and what an instance has of memory, in MiB: of versions
    that had no request yet, of a function that no request of the trace is for."""
    client, name, found = functions.client, functions.deploy(app=SLEEPER), []
    for number in range(_REHEARSALS):
        functions.session.progress(f"start {number + 1} of {_REHEARSALS}")
        version = functions.fresh(name)
        view = client.invoke_function(name, b"0", qualifier=version)
        if view.error is not None:
            raise GuestError(f"{name} answered {bytes(view.payload)[:200]!r}")
        found.append(sum(view.phases_ms.get(phase, 0.0) for phase in _STARTED))
        client.remove_function(name, version)
    return statistics.median(found) / 1000, client.show_scaling(name).instance_mib


def _cold_starts(session: Session) -> dict[str, int]:
    """By function, the instances that were begun for requests."""
    scrape = Scrape(session.client.metrics())
    found: dict[str, int] = {}
    for labels, value in scrape.all("templated_function_cold_starts_total"):
        found[labels["function"]] = found.get(labels["function"], 0) + int(value)
    return found


def _send(
    session: Session,
    names: list[str],
    wanted: list[Request],
    url: str,
    most: int,
    seen: _Seen,
) -> None:
    """Send each request at its time, and wait for the last."""
    threads = most + _MORE_THREADS
    client = lambdas(url, threads, 2 * _TIMEOUT)
    stop = threading.Event()
    begin = time.monotonic() + 0.5

    def send(request: Request) -> None:
        if stop.is_set():
            return
        sent = time.monotonic()
        seen.late.append((sent - begin - request.at) * 1000)
        try:
            answer = client.invoke(
                FunctionName=names[request.function], Payload=json.dumps(request.seconds).encode()
            )
            said = answer["Payload"].read()
            if answer.get("FunctionError"):
                seen.errors.append(said[:200].decode(errors="replace"))
        except Exception as error:  # noqa: BLE001  # whatever boto3 raises is counted
            seen.errors.append(str(error))
        else:
            seen.took.append((time.monotonic() - sent - request.seconds) * 1000)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for number, request in enumerate(wanted):
                wait = begin + request.at - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                pool.submit(partial(send, request))
                session.progress(
                    f"request {number + 1} of {len(wanted)}, "
                    f"{math.ceil(wanted[-1].at - request.at)} s left, {len(seen.errors)} errors"
                )
        except BaseException:
            stop.set()
            raise
