"""`bench policy`: starts with a network policy against starts without, and first connections."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from templated.bench.functions import HANDLER, Functions, archive
from templated.bench.paths import build_variant
from templated.bench.session import POOLED, Pools, Row, Session
from templated.bench.stats import medians, summarize
from templated.errors import HostError, TemplatedError
from templated.model.function import InvokeView
from templated.model.spec import NetworkSpec, PoolSpec

PATHS = ("warm", "standby", "direct")
_LIMITS = {"bandwidth": "100MiB", "packets": 100_000, "connections": 1000}
# The clone is handed out when its module is loaded: nothing of the guest comes before.
_CALLER = b"""
import socket, time

began = time.perf_counter()
caller = socket.socket()
caller.settimeout(10)
try:
    caller.connect(%r)
    said = ""
except OSError as error:
    said = str(error) or type(error).__name__
took = (time.perf_counter() - began) * 1000


def handler(event, context):
    return {"failed": said, "ms": took}
"""


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    egress: str
    """What the policy names as its way out."""
    count: int
    """Starts by each path, with and without."""
    connect: tuple[str, int] | None = None
    """A server behind that egress, which functions call; None: they do not."""
    connections: int = 100


def measure_policy(session: Session, plan: Plan) -> dict[str, Any]:
    """All figures of one run, in milliseconds.

    By path: clones of a template with a policy in turn with those of the same one without, and
    instances of two functions likewise, of which one has the policy over its template's.
    """
    report: dict[str, Any] = {"kind": "policy", "egress": plan.egress, "unit": "ms"}
    with _twin(session, plan) as twin:
        report["clones"] = {path: _clones(session, twin, path, plan.count) for path in PATHS}
    with Functions(session) as bench:
        report["functions"] = _instances(bench, plan)
        if plan.connect is not None:
            report["first_connection"] = _connections(bench, plan)
    return report


@contextlib.contextmanager
def _twin(session: Session, plan: Plan) -> Iterator[str]:
    """The same template with a policy, which is gone at the end."""
    spec = session.client.show_template(session.template).spec
    assert spec is not None  # it is built
    name = f"{session.tag}-policy"
    network = msgspec.convert({**msgspec.to_builtins(spec.network), **_keys(plan)}, NetworkSpec)
    session.progress("building the same template with a policy")
    try:
        build_variant(
            session.client, name, replace(spec, name=name, network=network, pool=PoolSpec())
        )
        yield name
    finally:
        with contextlib.suppress(TemplatedError):
            session.client.remove_template(name)


def _keys(plan: Plan) -> dict[str, Any]:
    return {"egress": plan.egress, "peers": "isolated", "limits": _LIMITS}


def _clones(session: Session, twin: str, path: str, count: int) -> dict[str, Any]:
    rows: dict[str, list[Row]] = {session.template: [], twin: []}
    with contextlib.ExitStack() as stack:
        pools = {name: Pools(session.client, name, session.progress) for name in rows}
        if path in POOLED:
            for pool in pools.values():
                stack.callback(pool.restore)
                pool.fill(path, 1)
        for number in range(count + 1):
            session.progress(f"{path}: clone {number} of {count}")
            for name, some in rows.items():
                for pool in pools.values():
                    pool.settled()
                some.append(session.start(path, name))
    plain, held = (some[1:] for some in rows.values())  # the first of each leaves something warm
    links = {"without": plain, "with": held}
    return {
        **_compared(plain, held),
        "link_p50": {way: medians(some).get("link", 0.0) for way, some in links.items()},
    }


def _compared(plain: list[Row], held: list[Row]) -> dict[str, Any]:
    without, with_one = (summarize([row["total"] for row in some]) for some in (plain, held))
    return {
        "without": without.as_dict(),
        "with": with_one.as_dict(),
        "ratio": round(with_one.p50 / without.p50, 3),
    }


def _instances(bench: Functions, plan: Plan) -> dict[str, Any]:
    """First requests, whose time is that of a start and of what attaches the code."""
    names = {"without": bench.deploy(), "with": bench.deploy()}
    bench.client.set_function_network(names["with"], _keys(plan))
    rows: dict[str, Any] = {}
    for path in PATHS:
        samples: dict[str, list[Row]] = {way: [] for way in names}
        with _only(bench.session, path):
            for number in range(plan.count + 1):
                bench.session.progress(f"{path}: instance {number} of {plan.count}")
                for way, name in names.items():
                    samples[way].append(_started(new_instance(bench, name)))
        plain, held = (some[1:] for some in samples.values())
        rows[path] = _compared(plain, held)
        rows[path]["attach_p50"] = {way: medians(s[1:])["attach"] for way, s in samples.items()}
    return rows


def _started(view: InvokeView) -> Row:
    phases = view.phases_ms
    return {**phases, "total": phases["start"] + phases["attach"]}


@contextlib.contextmanager
def _only(session: Session, path: str) -> Iterator[None]:
    """Instances start by this path."""
    session.pools.empty()
    if path in POOLED:
        session.pools.fill(path, 1)
    yield


def _connections(bench: Functions, plan: Plan) -> dict[str, Any]:
    """By path: how many functions reach the server at the first try, as they are loaded."""
    assert plan.connect is not None
    code = archive(app=_CALLER % (plan.connect,))
    name = bench.deploy()
    bench.client.deploy_function(name, code, handler=HANDLER, network=_keys(plan))
    found: dict[str, Any] = {}
    for path in PATHS:
        answers: list[dict[str, Any]] = []
        with _only(bench.session, path):
            for number in range(plan.connections):
                bench.session.progress(f"{path}: connection {number + 1} of {plan.connections}")
                view = new_instance(bench, name, lambda name, version: _ask(bench, name, version))
                answers.append(json.loads(bytes(view.payload)))
        failures = [answer["failed"] for answer in answers if answer["failed"]]
        found[path] = {
            "tried": len(answers),
            "succeeded": len(answers) - len(failures),
            **summarize([answer["ms"] for answer in answers]).as_dict(),
            "failures": sorted(set(failures)),
        }
    return found


def _ask(bench: Functions, name: str, version: str) -> InvokeView:
    view = bench.client.invoke_function(name, b"{}", qualifier=version)
    if view.error is not None:
        raise HostError(f"{name} failed: {bytes(view.payload)[:200]!r}")
    return view


def new_instance(
    bench: Functions, name: str, ask: Callable[[str, str], InvokeView] | None = None
) -> InvokeView:
    """A request that needs a new instance, by the path that pools leave; it is ended then."""
    bench.session.pools.settled()
    version = bench.fresh(name)
    view = ask(name, version) if ask else bench.invoke(name, qualifier=version)
    if view.start == "warm":
        raise HostError(f"a request of {name} was served by an instance that was there")
    bench.client.remove_function(name, version)
    bench.gone(name)
    return view


def goals(report: Mapping[str, Any]) -> list[str]:
    """What of the report is not as it must be: a line each."""
    missed = []
    for kind in ("clones", "functions"):
        for path, row in report[kind].items():
            if row["ratio"] > 1.03:
                missed.append(f"{kind} by {path}: {row['ratio']} times as long with a policy")
            link = row.get("link_p50", {"with": 0.0, "without": 0.0})
            if link["with"] > 1.0:
                without = f"{link['without']} ms without a policy"
                missed.append(f"{kind} by {path}: link takes {link['with']} ms, {without}")
    for path, row in report.get("first_connection", {}).items():
        if row["succeeded"] < row["tried"]:
            missed.append(f"first connection by {path}: {row['succeeded']} of {row['tried']}")
    return missed
