"""`bench paths`: each path and the floor in turn, so that noise hits all of them alike."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import replace

from templated.bench.floor import floor
from templated.bench.session import POOLED, Row, Session
from templated.bench.stats import summarize, summarize_rows
from templated.bench.threads import together
from templated.client import Client
from templated.drivers.host.procfs import cpu_seconds, host_cpu_seconds
from templated.errors import BuildError, HostError, TemplatedError
from templated.model.spec import PoolSpec, TemplateSpec

PATHS = ("floor", "direct", "standby", "warm", "cold")
# Every path leaves something warm behind; each is taken once before anything counts.
_WARM_UP = 1
# Seconds of each way in a round of the sustained rates: other load on the host drifts faster than
# a run, and slower than this.
_ROUND = 5.0


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    counts: Mapping[str, int]
    """Samples per path, in the order of PATHS; a path that is not in it is not measured."""
    cli: int = 0
    memory: str | None = None
    sustained: float = 0.0
    """Seconds."""
    concurrency: int = 2


def measure_paths(session: Session, plan: Plan) -> dict[str, Any]:
    """All figures of one run, in milliseconds. A path that cannot be taken is in `skipped`."""
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        starts = _starts(session, stack, plan.counts, skipped)
        rows = _rounds(session, starts, plan.counts)
    report: dict[str, Any] = {
        "kind": "paths",
        "template": session.template,
        "unit": "ms",
        "paths": {name: summarize_rows(samples) for name, samples in rows.items() if samples},
        "skipped": skipped,
        "ratios": _ratios(rows),
    }
    if plan.sustained:
        report["sustained"] = _sustained(session, plan.sustained, plan.concurrency)
    if plan.cli:
        report["cli"] = _cli(session, plan.cli)
    if plan.memory:
        report["memory"] = _memory(session, plan.memory, plan.counts.get("direct", 0))
    return report


def schedule(counts: Mapping[str, int]) -> list[str]:
    """The paths in the order in which they are measured, each spread evenly over the run.

    Which of two that fall together goes first alternates, in case one leaves something warm.
    """
    turns = []
    for rank, (name, count) in enumerate(counts.items()):
        for i in range(count):
            turns.append(((i + 0.5) / count, rank if i % 2 else -rank, name))
    return [name for _, _, name in sorted(turns)]


def _starts(
    session: Session,
    stack: contextlib.ExitStack,
    counts: Mapping[str, int],
    skipped: dict[str, str],
) -> dict[str, Callable[[], Row]]:
    """How each path is taken once; one that cannot be is named in `skipped`."""
    starts: dict[str, Callable[[], Row]] = {}
    for name in (name for name, count in counts.items() if count):
        start: Callable[[], Row] = _Start(session, name)
        if name == "floor":
            start = stack.enter_context(floor(session.generation(), session.info())).once
        try:
            if name in POOLED:
                session.pools.fill(name, 1)
            if name != "cold":
                for _ in range(_WARM_UP):
                    start()
        except TemplatedError as error:
            skipped[name] = error.message
        else:
            starts[name] = start
    return starts


@dataclass(frozen=True)
class _Start:
    session: Session
    path: str

    def __call__(self) -> Row:
        return self.session.start(self.path)


def _rounds(
    session: Session, starts: Mapping[str, Callable[[], Row]], counts: Mapping[str, int]
) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {name: [] for name in starts}
    turns = schedule({name: counts[name] for name in starts})
    for i, name in enumerate(turns):
        session.pools.settled()
        session.progress(f"start {i + 1} of {len(turns)}: {name}")
        rows[name].append(starts[name]())
    return rows


def _ratios(rows: Mapping[str, list[Row]]) -> dict[str, float]:
    """p50 of each path to the floor's, and of a cold boot to each path's."""
    totals = {name: [row["total"] for row in samples] for name, samples in rows.items() if samples}
    p50 = {name: summarize(samples).p50 for name, samples in totals.items()}
    ratios = {}
    for path in ("direct", "standby", "warm"):
        if path in p50 and "floor" in p50:
            ratios[f"{path}_to_floor"] = round(p50[path] / p50["floor"], 3)
    if "direct" in totals and len(totals["direct"]) == len(totals.get("floor", ())):
        pairs = zip(totals["direct"], totals["floor"], strict=True)
        paired = statistics.median(direct / bare for direct, bare in pairs)
        ratios["direct_to_floor_paired_p50"] = round(paired, 3)
    for path in ("direct", "standby", "warm"):
        if path in p50 and "cold" in p50:
            ratios[f"cold_to_{path}"] = round(p50["cold"] / p50[path], 1)
    return ratios


def _sustained(session: Session, seconds: float, concurrency: int) -> dict[str, Any]:
    """Starts per second that go on, each ended before the next, in so many threads.

    In slices, floor and direct and back again, so that a drift hits both alike.
    """
    generation = session.generation()
    with contextlib.ExitStack() as stack:
        floors = [
            stack.enter_context(floor(generation, session.info())) for _ in range(concurrency)
        ]
        workers: dict[str, list[Callable[[], object]]] = {
            "floor": [bare.once for bare in floors],
            "direct": [stack.enter_context(_cycle(session, i)) for i in range(concurrency)],
        }
        done = dict.fromkeys(workers, 0)
        took = dict.fromkeys(workers, 0.0)
        used = {name: Counter[str]() for name in workers}
        daemon = session.client.info().pid
        rounds = max(1, round(seconds / _ROUND))
        for name in ("floor", "direct", "direct", "floor") * rounds:
            session.progress(f"sustained: {name}, {concurrency} at once")
            before = used_cpu(daemon)
            count, wall = in_threads(workers[name], seconds / rounds / 2)
            used[name].update(used_cpu(daemon))
            used[name].subtract(before)
            done[name] += count
            took[name] += wall
    rates = {name: done[name] / took[name] for name in workers}
    return {
        "seconds": seconds,
        "concurrency": concurrency,
        "starts": done,
        "per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "direct_to_floor": round(rates["direct"] / rates["floor"], 3),
        "cpu_ms_per_start": {
            name: {part: round(used[name][part] / done[name] * 1000, 1) for part in used[name]}
            for name in workers
        },
    }


def used_cpu(daemon: int) -> dict[str, float]:
    """CPU seconds so far: of the whole host, busy and idle, and of the daemon alone."""
    return {**host_cpu_seconds(), "daemon": cpu_seconds(daemon)}


@contextlib.contextmanager
def _cycle(session: Session, number: int) -> Iterator[Callable[[], None]]:
    """Make a direct clone and remove it, on a connection that is kept, as who does so for long."""
    client = Client(session.client.path, keep_alive=True)

    def once() -> None:
        clone = session.make(f"sustained-{number}", "direct", client=client)
        client.remove_clone(clone.name)

    try:
        yield once
    finally:
        client.close()


def in_threads(workers: list[Callable[[], object]], seconds: float) -> tuple[int, float]:
    """Call each worker again and again in a thread of its own; calls that ended, and seconds.

    A call under way at the end is waited for and counts, and so does its time. The first
    failure ends all and is raised; so does Ctrl-C.
    """
    stop = threading.Event()
    done: list[None] = []
    begin = time.monotonic()

    def loop(work: Callable[[], object]) -> None:
        while not stop.is_set() and time.monotonic() - begin < seconds:
            work()
            done.append(None)

    together([partial(loop, work) for work in workers], stop.set)
    return len(done), time.monotonic() - begin


def _cli(session: Session, n: int) -> dict[str, Any]:
    """The time that `templated clone`, a whole process, adds to the daemon's total_ms."""
    added = []
    for i in range(n):
        session.progress(f"command line {i + 1} of {n}")
        command = [sys.executable, "-m", "templated", "clone", f"{session.tag}-cli", "-o", "json"]
        command += ["--template", session.template, "--socket", session.client.path]
        command += ["--path", "direct"]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        wall = (time.perf_counter() - begin) * 1000
        if done.returncode != 0:
            raise HostError(f"templated clone failed: {done.stderr.decode().strip()}")
        clone = json.loads(done.stdout)
        added.append(wall - clone["total_ms"])
        session.client.remove_clone(clone["name"])
    return summarize(added).as_dict()


def _memory(session: Session, memory: str, n: int) -> dict[str, Any]:
    """`restore` of the same template with more memory, in turn with its own."""
    name = f"{session.tag}-memory"
    spec = session.client.show_template(session.template).spec
    assert spec is not None  # it is built
    own = spec.machine.memory
    # The template's own pool would be filled during the measurement.
    larger = replace(spec, name=name, machine=replace(spec.machine, memory=memory), pool=PoolSpec())
    session.progress(f"building the same template with {memory}")
    samples: dict[str, list[float]] = {own: [], memory: []}
    try:
        build_variant(session.client, name, larger)
        for i in range(n):
            session.progress(f"memory {i + 1} of {n}")
            samples[own].append(session.start("direct")["restore"])
            samples[memory].append(session.start("direct", name)["restore"])
    finally:
        with contextlib.suppress(TemplatedError):
            session.client.remove_template(name)
    summaries = {size: summarize(values).as_dict() for size, values in samples.items()}
    ratio = round(summaries[memory]["p50"] / summaries[own]["p50"], 3)
    return {"restore": summaries, "ratio": ratio}


def build_variant(client: Client, name: str, spec: TemplateSpec) -> None:
    """Build a template of the run's own. Raises BuildError."""
    operation = client.build_template(
        name,
        spec=msgspec.json.encode(spec).decode(),  # JSON is YAML
        source="the benchmark's template",
    )
    for event in client.operation_events(operation.id):
        if event.error is not None:
            raise BuildError(f"{name}: {event.error.message}", hint=event.error.hint)
