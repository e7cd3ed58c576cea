"""`bench invoke`: what a function's request costs, each way in turn with what it is measured by."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templated.bench.agents import agent
from templated.bench.ahead import measure_shift, measure_step
from templated.bench.functions import PAYLOAD, Functions
from templated.bench.gateway import lambdas
from templated.bench.paths import in_threads, used_cpu
from templated.bench.session import Session
from templated.bench.stats import medians, summarize
from templated.client import Client
from templated.errors import GuestError, HostError
from templated.model.function import InvokeView

_SMALL, _LARGE = 100 << 10, 200 << 20
# Functions of which one is invoked while the others come to rest.
_RESTING = 12
_WARM_UP, _WARM_UP_SECONDS = 3, 3.0


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    paused: int = 200
    claims: int = 50
    first: int = 30
    """First requests of a function, from a warm pool and without one."""
    attach: int = 20
    """First requests of each of two sizes of code."""
    sustained: float = 10.0
    """Seconds of each way."""
    shifted: int = 1000
    """Requests by weight."""
    step: int = 20
    """Requests that come at once to a function that has no instance."""
    steps: int = 5
    """How often, each way."""
    gateway: str | None = None
    """The URL of Lambda's API, for boto3 with the keys that it finds by itself."""


def measure_invoke(session: Session, plan: Plan) -> dict[str, Any]:
    """All figures of one run, in milliseconds. Functions that it makes are removed again."""
    report: dict[str, Any] = {"kind": "invoke", "template": session.template, "unit": "ms"}
    with Functions(session) as bench:
        report["rows"], report["skipped"] = {}, {}
        if plan.paused:
            report |= _paused(bench, plan)
        if plan.first:
            report["first"] = _first(bench, plan.first)
        if plan.attach:
            report["attach"] = _attach(bench, plan.attach)
        if plan.sustained:
            report["sustained"] = _sustained(bench, plan.sustained)
        if plan.shifted:
            report["shifted"] = measure_shift(bench, plan.shifted)
        if plan.step:
            report["step"] = measure_step(bench, plan.step, plan.steps)
        if plan.gateway:
            report["gateway"] = _gateway(bench, plan.gateway, plan.paused or 100)
    return report


def _paused(bench: Functions, plan: Plan) -> dict[str, Any]:
    """Requests on paused instances, in turn with bare claims of warm clones."""
    session = bench.session
    names = [bench.deploy() for _ in range(_RESTING)]
    for name in names:
        for _ in range(_WARM_UP):
            bench.invoke(name)
            bench.paused(name)
    requests: list[InvokeView] = []
    claims: list[float] = []
    session.pools.fill("warm", 1)
    for number in range(plan.paused):
        session.progress(f"paused instance {number + 1} of {plan.paused}")
        if number * plan.claims // plan.paused >= len(claims):
            session.pools.settled()
            claims.append(session.start("warm")["total"])
            session.pools.settled()
        name = names[number % len(names)]
        bench.paused(name)
        view = bench.invoke(name)
        if view.start != "warm":
            raise HostError(f"{name} was served by a new instance ({view.start})")
        requests.append(view)
    totals = summarize([view.total_ms for view in requests])
    bare = summarize(claims)
    return {
        "paused": {**totals.as_dict(), "phases_p50": medians([v.phases_ms for v in requests])},
        "claim": bare.as_dict(),
        "paused_to_claim": round(totals.p50 / bare.p50, 3),
    }


def _first(bench: Functions, count: int) -> dict[str, Any]:
    """First requests of a function: from a warm pool; and without one, in turn with clones."""
    session, name = bench.session, bench.deploy()
    views: dict[str, list[InvokeView]] = {"pool": [], "direct": []}
    clones: list[float] = []
    session.pools.fill("warm", 1)
    for number in range(count):
        session.progress(f"first request {number + 1} of {count}, warm pool")
        session.pools.settled()
        views["pool"].append(_new(bench, name, "pool"))
    session.pools.empty()
    for number in range(count):
        session.progress(f"first request {number + 1} of {count}, no pool")
        views["direct"].append(_new(bench, name, "direct"))
        clones.append(session.start("direct")["total"])
    rows = {
        way: {
            **summarize([view.total_ms for view in served]).as_dict(),
            "phases_p50": medians([view.phases_ms for view in served]),
        }
        for way, served in views.items()
    }
    clone = summarize(clones)
    ratio = round(rows["direct"]["p50"] / clone.p50, 3)
    return {**rows, "clone": clone.as_dict(), "direct_to_clone": ratio}


def _new(bench: Functions, name: str, start: str) -> InvokeView:
    """A request that needs a new instance, which is then ended.

    It is the first one of a version, and that goes with it: of one that was asked for before the
    daemon would keep an instance ready.
    """
    version = bench.fresh(name)
    view = bench.invoke(name, qualifier=version)
    if view.start != start:
        raise HostError(f"a request of {name} was served by {view.start}, not by {start}")
    bench.client.remove_function(name, version)
    bench.gone(name)
    return view


def _attach(bench: Functions, count: int) -> dict[str, Any]:
    """The phase `attach` on members of a warm pool, small and large code in turn."""
    session = bench.session
    session.progress("deploying 200 MB of code")
    names = {"100 KB": bench.deploy(_SMALL), "200 MB": bench.deploy(_LARGE)}
    samples: dict[str, list[float]] = {size: [] for size in names}
    session.pools.fill("warm", 1)
    for number in range(count):
        session.progress(f"attach {number + 1} of {count}")
        for size, name in names.items():
            session.pools.settled()
            samples[size].append(_new(bench, name, "pool").phases_ms["attach"])
    rows = {size: summarize(values).as_dict() for size, values in samples.items()}
    return {**rows, "large_to_small": round(rows["200 MB"]["p50"] / rows["100 KB"]["p50"], 3)}


def _sustained(bench: Functions, seconds: float, instances: int = 4) -> dict[str, Any]:
    """Requests per second of one function, and of as many agents that are asked in a loop.

    As many callers as instances, each on a connection that is kept. In slices, since a host drifts.
    """
    session, name = bench.session, bench.deploy()
    session.pools.empty()
    view = bench.client.show_function(name)
    info, generation = session.info(), session.generation()
    code = Path(info.state_dir, "code", f"{view.code.digest}.img")
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(Client(session.client.path, keep_alive=True)))
            for _ in range(instances)
        ]
        session.progress(f"sustained: bringing up {instances} agents")
        asked = [
            stack.enter_context(agent(generation, info, code, view.handler, PAYLOAD))
            for _ in range(instances)
        ]
        workers: dict[str, list[Callable[[], object]]] = {
            "agents": list(asked),
            "functions": [_caller(bench, name, client) for client in clients],
        }
        for work in workers.values():  # all instances are there after that
            in_threads(work, _WARM_UP_SECONDS)
        done, took = dict.fromkeys(workers, 0), dict.fromkeys(workers, 0.0)
        used = {way: Counter[str]() for way in workers}
        for way in ("agents", "functions", "functions", "agents"):
            session.progress(f"sustained: {way}, {instances} at once")
            before = _used_cpu(info.pid)
            count, wall = in_threads(workers[way], seconds / 2)
            used[way].update(_used_cpu(info.pid))
            used[way].subtract(before)
            done[way] += count
            took[way] += wall
    rates = {way: done[way] / took[way] for way in workers}
    return {
        "instances": sum(bench.client.show_function(name).instances.values()),
        "requests": done,
        "per_second": {way: round(rate, 1) for way, rate in rates.items()},
        "functions_to_agents": round(rates["functions"] / rates["agents"], 3),
        "cpu_ms_per_request": {
            way: {part: round(spent / done[way] * 1000, 3) for part, spent in used[way].items()}
            for way in workers
        },
    }


def _used_cpu(daemon: int) -> dict[str, float]:
    return {**used_cpu(daemon), "bench": time.process_time()}


def _caller(bench: Functions, name: str, client: Client) -> Callable[[], object]:
    return lambda: bench.invoke(name, client)


def _gateway(bench: Functions, url: str, count: int) -> dict[str, Any]:
    """The same request by boto3 and by the unix socket in turn, each on one connection."""
    client = lambdas(url)
    session, name = bench.session, bench.deploy()
    samples: dict[str, list[float]] = {"boto3": [], "socket": []}
    for number in range(-_WARM_UP, count):
        session.progress(f"boto3 {number + 1} of {count}")
        for way in samples:
            begin = time.perf_counter()
            if way == "socket":
                bench.invoke(name)
            else:
                answer = client.invoke(FunctionName=name, Payload=PAYLOAD)
                if answer["Payload"].read() != PAYLOAD:
                    raise GuestError(f"{name} answered something else by boto3")
            if number >= 0:
                samples[way].append((time.perf_counter() - begin) * 1000)
    rows = {way: summarize(values).as_dict() for way, values in samples.items()}
    return {**rows, "adds_p50": round(rows["boto3"]["p50"] - rows["socket"]["p50"], 2)}
