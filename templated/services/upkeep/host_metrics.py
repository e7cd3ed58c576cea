"""Metrics of the host and its VMs, read in intervals, apart from the start path.

They are read in a thread and published on the event loop. A scrape runs on the loop too, so it
never sees half of a sample.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from templated.drivers.host.files import Space, file_system
from templated.drivers.host.pressure import RESOURCES, Pressure, read_pressure
from templated.drivers.host.procfs import (
    Memory,
    anonymous_bytes,
    cpu_seconds,
    mapped_bytes,
    read_memory,
    start_time,
)
from templated.model.config import Config, LimitConfig
from templated.services.clones.registry import Clones
from templated.services.context import Context
from templated.services.pools.members import Pools
from templated.services.templates.catalog import Templates

log = logging.getLogger(__name__)
INTERVAL = 5.0
"""Seconds between two looks at the host."""
_VM_EVERY = 3
# VMs that are measured in one round: about a millisecond of the kernel's time each.
_VMS_PER_ROUND = 64


@dataclass(frozen=True)
class Sampled:
    """A VM to measure. `state` is the clone's, or the tier of the pool that it waits in."""

    template: str
    state: str
    pid: int


@dataclass(frozen=True)
class HostReading:
    """One look at the host; a value that the host does not report is None."""

    pressure: Mapping[str, Pressure | None]
    memory: Memory | None
    places: Mapping[str, Space | None]


def read_host(config: Config) -> HostReading:
    """Look at the host. Reads a few files of /proc, so not on the event loop."""
    return HostReading(
        pressure={resource: read_pressure(resource) for resource in RESOURCES},
        memory=_memory(),
        places={p: file_system(Path(getattr(config, p))) for p in ("shm_dir", "state_dir")},
    )


def _memory() -> Memory | None:
    try:
        return read_memory()
    except OSError:
        return None


class HostMetrics:
    """The gauges that the watch sets, on the daemon's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._vms()
        self._host()
        self.serving = self._gauge(
            "templated_template_serving",
            "1 when clones can be started from the template, as far as is known; otherwise 0.",
            "template",
        )
        self.generations = self._gauge(
            "templated_template_generations",
            "Generations by state; each ready or retired one holds memory in shm_dir.",
            *("template", "state"),
        )

    def _vms(self) -> None:
        group = ("template", "state")
        self.memory = self._gauge(
            "templated_clone_memory_bytes",
            "Memory of VMs, shared pages divided by their users (PSS): the sum over those measured."
            " Without shared pages where the kernel does not show them, as under the unit."
            " state: the clone's, or the pool's tier.",
            *group,
        )
        self.memory_max = self._gauge(
            "templated_clone_memory_max_bytes",
            "Memory (PSS) of the biggest VM measured.",
            *group,
        )
        self.measured = self._gauge(
            "templated_clone_memory_measured",
            "VMs that templated_clone_memory_bytes is the sum of.",
            *group,
        )
        self.cpu = Counter(
            "templated_clone_cpu_seconds",
            "CPU time of VMs, user and system, counted while they were measured.",
            ("template",),
            registry=self._registry,
        )
        self.starts_limit = self._gauge(
            "templated_clone_starts_limit", "limits.concurrent_starts: starts that run at once."
        )
        self.clones_limit = self._gauge(
            "templated_clones_limit", "limits.clones: clones that may exist at once."
        )

    def _host(self) -> None:
        self.pressure = self._gauge(
            "templated_host_pressure_ratio",
            "Share of the last ten seconds in which some, or all (full), tasks waited for it.",
            *("resource", "kind"),
        )
        self.host_memory = self._gauge("templated_host_memory_bytes", "Memory of the host.")
        self.host_available = self._gauge(
            "templated_host_memory_available_bytes", "Memory that programs can get, no swapping."
        )
        self.free = self._gauge(
            "templated_filesystem_free_bytes",
            "Free bytes of the file system that shm_dir or state_dir is on.",
            "place",
        )
        self.size = self._gauge(
            "templated_filesystem_size_bytes",
            "Size of the file system that shm_dir or state_dir is on.",
            "place",
        )

    def _gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(name, about, labels, registry=self._registry)

    def show_limits(self, limits: LimitConfig) -> None:
        """Publish what the configuration allows."""
        self.starts_limit.set(limits.concurrent_starts)
        self.clones_limit.set(limits.clones)

    def show_host(self, reading: HostReading) -> None:
        """Publish one look at the host; a value that it did not report stays as it was."""
        for resource, pressure in reading.pressure.items():
            if pressure is not None:
                self.pressure.labels(resource, "some").set(pressure.some / 100)
                self.pressure.labels(resource, "full").set(pressure.full / 100)
        if reading.memory is not None:
            self.host_memory.set(reading.memory.total)
            self.host_available.set(reading.memory.available)
        for place, space in reading.places.items():
            if space is not None:
                self.free.labels(place).set(space.free)
                self.size.labels(place).set(space.size)

    def show_templates(self, templates: Templates) -> None:
        """Publish which templates serve, and their generations."""
        self.serving.clear()
        for name in templates.names():
            self.serving.labels(name).set(templates.can_serve(name))
        self.generations.clear()
        for (template, state), number in templates.count_generations().items():
            self.generations.labels(template, state).set(number)

    def show_vms(self, memory: dict[tuple[str, str], list[int]], cpu: dict[str, float]) -> None:
        """Publish the bytes of each VM measured, by template and state, and CPU seconds to add."""
        for gauge in (self.memory, self.memory_max, self.measured):
            gauge.clear()
        for group, sizes in memory.items():
            self.memory.labels(*group).set(sum(sizes))
            self.memory_max.labels(*group).set(max(sizes))
            self.measured.labels(*group).set(len(sizes))
        for template, seconds in cpu.items():
            self.cpu.labels(template).inc(seconds)


@dataclass(frozen=True)
class _Reading:
    memory: int | None
    cpu: float


class VmMeter:
    """Measures a bounded number of VMs in each round, first those that waited longest.

    A measurement counts until the VM is gone or measured again, so that sums are of all VMs even
    where one round does not reach them all.
    """

    def __init__(self, per_round: int = _VMS_PER_ROUND) -> None:
        self._per_round = per_round
        self._began = start_time(os.getpid()) or 0
        # By pid, in the order in which they were measured.
        self._known: dict[int, _Reading] = {}

    def round(self, vms: Sequence[Sampled]) -> dict[str, float]:
        """Measure; returns the CPU seconds to add, by template. Not on the event loop."""
        templates = {vm.pid: vm.template for vm in vms}
        self._known = {pid: seen for pid, seen in self._known.items() if pid in templates}
        new = [pid for pid in templates if pid not in self._known]
        spent: dict[str, float] = defaultdict(float)
        for pid in [*new, *self._known][: self._per_round]:
            before = self._known.pop(pid, None)
            mapped = mapped_bytes(pid)
            # The kernel shows a VM's mappings only to who may trace its user, and always this.
            memory = mapped.proportional if mapped else anonymous_bytes(pid)
            now = _Reading(memory, cpu_seconds(pid))
            since = before.cpu if before else self._unseen(pid, now)
            spent[templates[pid]] += max(0.0, now.cpu - since)
            self._known[pid] = now
        return dict(spent)

    def _unseen(self, pid: int, now: _Reading) -> float:
        """CPU seconds of a new VM to leave out: all so far, when an earlier daemon counted them."""
        return 0.0 if (start_time(pid) or 0) >= self._began else now.cpu

    def memory(self, vms: Iterable[Sampled]) -> dict[tuple[str, str], list[int]]:
        """Bytes of each VM that was measured, by template and state."""
        sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
        for vm in vms:
            reading = self._known.get(vm.pid)
            if reading is not None and reading.memory is not None:
                sizes[vm.template, vm.state].append(reading.memory)
        return dict(sizes)


def running_vms(pools: Pools, clones: Clones) -> list[Sampled]:
    """The clones that have a process, and the members of pools."""
    found = [Sampled(*process) for process in clones.processes()]
    waiting = ((member.pool, member.vm.machine.pid) for member in pools.members())
    return found + [Sampled(template, tier.value, pid) for (template, tier), pid in waiting]


async def watch(context: Context, templates: Templates, pools: Pools, clones: Clones) -> None:
    """Keep the metrics of host, VMs and templates up to date, until cancelled. Raises nothing."""
    metrics = HostMetrics(context.metrics.registry)
    metrics.show_limits(context.config.limits)
    meter = VmMeter()
    for turn in itertools.count():
        try:
            metrics.show_host(await asyncio.to_thread(read_host, context.config))
            metrics.show_templates(templates)
            if turn % _VM_EVERY == 0:
                vms = running_vms(pools, clones)
                cpu = await asyncio.to_thread(meter.round, vms)
                metrics.show_vms(meter.memory(vms), cpu)
        except Exception:
            log.exception("cannot measure the host")
        await asyncio.sleep(INTERVAL)
