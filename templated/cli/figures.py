"""The numbers of `templated top`: what /metrics and the API say, as rates, quantiles and sizes.

Units are in the names: `_ms` milliseconds, `_s` seconds, `_bytes`; a ratio is between 0 and 1, but
that of CPU time, where 1 is one core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from templated.cli.function_figures import FunctionFigures, functions
from templated.cli.scrape import Scrape, buckets_of, quantiles
from templated.client import Client, requests
from templated.drivers.host.procfs import anonymous_bytes, cpu_seconds, start_time

_SHOWN = 8
"""Clones and events that a frame has at most."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Start:
    """Starts of a template by one path, in the time that the frame covers."""

    template: str
    path: str
    count: int
    per_second: float
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Phase:
    """One phase of those starts."""

    template: str
    path: str
    phase: str
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class CloneFigures:
    """One clone. `memory_bytes` counts its own memory, without the template's."""

    name: str
    template: str
    pid: int
    memory_bytes: int
    cpu_ratio: float


@dataclass(frozen=True)
class Frame:
    """All that one frame shows; counts and rates are of the last `window_s` seconds."""

    time: str
    window_s: float
    version: str
    uptime_s: float
    starts_in_progress: int
    starts_limit: int
    starts: list[Start]
    phases: list[Phase]
    failures: list[dict[str, Any]]
    functions: list[FunctionFigures]
    pools: list[dict[str, Any]]
    refill_blocked: list[str]
    clones: list[dict[str, Any]]
    biggest: list[CloneFigures]
    pressure: list[dict[str, Any]]
    memory: dict[str, float]
    filesystems: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)


class Watcher:
    """Looks at a daemon again and again.

    The first frame covers the daemon's life so far, each further one the time since the one
    before; a daemon that was restarted in between begins anew. Raises TemplatedError.
    """

    def __init__(self, client: Client, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._clock = clock
        self._before: Scrape | None = None
        self._looked = 0.0
        self._cpu: dict[int, float] = {}

    def look(self) -> Frame:
        """One frame."""
        now, scrape = self._clock(), Scrape(self._client.metrics())
        began = scrape.one("process_start_time_seconds") or now
        if began > self._looked:
            self._before = None
        window = max(now - (self._looked if self._before else began), 0.001)
        clones = self._client.json(requests.list_clones())
        frame = Frame(
            time=datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
            window_s=round(window, 3),
            version=next((x["version"] for x, _ in scrape.all("templated_build_info")), ""),
            uptime_s=round(max(now - began, 0.0), 1),
            starts_in_progress=int(scrape.one("templated_clone_starts_in_progress") or 0),
            starts_limit=int(scrape.one("templated_clone_starts_limit") or 0),
            starts=_starts(scrape, self._before, window),
            phases=_phases(scrape, self._before),
            failures=_failures(scrape, self._before),
            functions=functions(scrape, self._before, window),
            pools=self._client.json(requests.list_pools()),
            refill_blocked=[
                x["resource"] for x, on in scrape.all("templated_pool_refill_blocked") if on
            ],
            clones=_gauges(scrape, "templated_clones", "count", int),
            biggest=self._biggest(clones, window),
            pressure=_gauges(scrape, "templated_host_pressure_ratio", "ratio"),
            memory=_memory(scrape),
            filesystems=_filesystems(scrape),
            events=self._events(),
        )
        self._before, self._looked = scrape, now
        return frame

    def _events(self) -> list[dict[str, Any]]:
        return list(self._client.json_lines(requests.events()))[-_SHOWN:]

    def _biggest(self, clones: list[dict[str, Any]], window: float) -> list[CloneFigures]:
        """The clones with most memory of their own; those that are gone by now are left out."""
        found, cpu = [], {}
        for clone in clones:
            pid = clone["pid"]
            memory = anonymous_bytes(pid) if pid else None
            if memory is None:
                continue
            cpu[pid] = cpu_seconds(pid)
            ratio = self._cpu_ratio(pid, cpu[pid], window)
            found.append(CloneFigures(clone["name"], clone["template"], pid, memory, ratio))
        self._cpu = cpu
        return sorted(found, key=lambda c: c.memory_bytes, reverse=True)[:_SHOWN]

    def _cpu_ratio(self, pid: int, spent: float, window: float) -> float:
        """Cores used since the last look, or in the life of a process not seen before."""
        if pid in self._cpu:
            return round(max(spent - self._cpu[pid], 0.0) / window, 4)
        began = (start_time(pid) or 0) / _TICKS
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
        return round(spent / max(age, 0.01), 4)


def _starts(scrape: Scrape, before: Scrape | None, window: float) -> list[Start]:
    found = []
    for labels, buckets in buckets_of(scrape, before, "templated_clone_seconds").items():
        count = int(buckets[max(buckets)])
        rate, (p50, p99) = round(count / window, 3), quantiles(buckets)
        found.append(Start(**dict(labels), count=count, per_second=rate, p50_ms=p50, p99_ms=p99))
    return sorted(found, key=lambda s: (s.template, s.path))


def _phases(scrape: Scrape, before: Scrape | None) -> list[Phase]:
    # In the order in which the daemon first saw them, which is that of a start.
    found = []
    for labels, buckets in buckets_of(scrape, before, "templated_clone_phase_seconds").items():
        p50, p99 = quantiles(buckets)
        found.append(Phase(**dict(labels), p50_ms=p50, p99_ms=p99))
    return found


def _failures(scrape: Scrape, before: Scrape | None) -> list[dict[str, Any]]:
    return [
        {**labels, "count": int(grown)}
        for labels, grown in scrape.since(before, "templated_clone_failures_total")
        if grown
    ]


def _gauges(
    scrape: Scrape, name: str, key: str, number: Callable[[float], float] = float
) -> list[dict[str, Any]]:
    return [{**labels, key: number(value)} for labels, value in scrape.all(name)]


def _memory(scrape: Scrape) -> dict[str, float]:
    names = {"size_bytes": "bytes", "available_bytes": "available_bytes"}
    found = {key: scrape.one(f"templated_host_memory_{name}") for key, name in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _filesystems(scrape: Scrape) -> list[dict[str, Any]]:
    sizes = {x["place"]: size for x, size in scrape.all("templated_filesystem_size_bytes")}
    return [
        {"place": x["place"], "free_bytes": free, "size_bytes": sizes.get(x["place"], free)}
        for x, free in scrape.all("templated_filesystem_free_bytes")
    ]
