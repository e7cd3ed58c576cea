"""Prometheus metrics. Names and buckets are fixed: dashboards and alerts depend on them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import Metric

from templated import __version__

# Seconds. 100 ms is what a user of functions waits for, so the buckets are dense around it.
START_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
# Codes of the usual failures of a start; others appear when they happen.
_START_REASONS = ("guest", "host", "hypervisor", "identity", "internal", "timeout")
_LIMITS = ("memory", "pids", "cpus", "disk")
_TIERS = ("standby", "warm")
BUILD_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All metrics of one daemon, on a registry of its own. No label ever holds a clone's name."""

    def __init__(self) -> None:
        # A second series per histogram that nothing here reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._starts()
        self._pools()
        self._templates()

    def _starts(self) -> None:
        self.clone_seconds = Histogram(
            "templated_clone_seconds",
            "From the request's arrival to the guest's confirmed identity with its link up.",
            ("template", "path"),
            buckets=START_BUCKETS,
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "templated_clone_phase_seconds",
            "Time of one phase of a start.",
            ("template", "path", "phase"),
            buckets=START_BUCKETS,
            registry=self.registry,
        )
        self.failures = Counter(
            "templated_clone_failures",
            "Starts that failed, by the reason.",
            ("template", "reason"),
            registry=self.registry,
        )
        self.limit_hits = Counter(
            "templated_clone_limit_hits",
            "How often VMs of clones wanted more than a limit of their template: memory that ended "
            "them, a thread that was refused, a period in which the CPU time was used up, a disk "
            "layer that became full.",
            ("template", "limit"),
            registry=self.registry,
        )
        self.starts_in_progress = Gauge(
            "templated_clone_starts_in_progress",
            "Requested clones that are not up yet, including those that wait for their turn.",
            registry=self.registry,
        )
        self.events = Counter(
            "templated_events",
            "Events of clones and templates; `templated events` says of which.",
            ("type",),
            registry=self.registry,
        )
        self.clones = _CloneStates(
            "templated_clones",
            "Clones by state.",
            ("template", "state"),
            registry=self.registry,
        )

    def _pools(self) -> None:
        tier = ("template", "tier")
        self.pool_size = Gauge(
            "templated_pool_size",
            "Members of a pool that are ready to be taken.",
            tier,
            registry=self.registry,
        )
        self.pool_target = Gauge(
            "templated_pool_target",
            "Members that a pool must have.",
            tier,
            registry=self.registry,
        )
        self.pool_misses = Counter(
            "templated_pool_misses",
            "Requests that found a pool empty that must have members.",
            tier,
            registry=self.registry,
        )
        self.refill_seconds = Histogram(
            "templated_pool_refill_seconds",
            "Time to make one member of a pool.",
            tier,
            buckets=START_BUCKETS,
            registry=self.registry,
        )
        self.refill_failures = Counter(
            "templated_pool_refill_failures",
            "Members that could not be made, or that were lost while they waited, by the reason.",
            (*tier, "reason"),
            registry=self.registry,
        )
        self.refill_blocked = Gauge(
            "templated_pool_refill_blocked",
            "1 while no members are made because the host lacks the resource.",
            ("resource",),
            registry=self.registry,
        )

    def _templates(self) -> None:
        self.build_seconds = Histogram(
            "templated_template_build_seconds",
            "Time of one phase of a template build.",
            ("template", "phase"),
            buckets=BUILD_BUCKETS,
            registry=self.registry,
        )
        self.build_failures = Counter(
            "templated_template_build_failures",
            "Template builds that failed, by the reason.",
            ("template", "reason"),
            registry=self.registry,
        )
        self.generation_info = Gauge(
            "templated_template_generation_info",
            "1 for the active generation of a template.",
            ("template", "generation", "accel", "qemu_version"),
            registry=self.registry,
        )
        self.probe_seconds = Histogram(
            "templated_probe_seconds",
            "Time until a QA probe passed.",
            ("template", "probe"),
            buckets=BUILD_BUCKETS,
            registry=self.registry,
        )
        self.build_info = Gauge(
            "templated_build_info",
            "1; the labels say what runs.",
            ("version", "python_version"),
            registry=self.registry,
        )
        self.build_info.labels(__version__, platform.python_version()).set(1)

    def expect(self, template: str) -> None:
        """Show zeros for a template's failures: a series that begins with 1 has no rate."""
        for reason in _START_REASONS:
            self.failures.labels(template, reason)
        for limit in _LIMITS:
            self.limit_hits.labels(template, limit)
        for tier in _TIERS:
            self.pool_misses.labels(template, tier)
            for reason in _START_REASONS:
                self.refill_failures.labels(template, tier, reason)

    def serves(self, template: str, generation: str, accel: str, qemu_version: str) -> None:
        """A generation is the active one of its template from now on."""
        self.expect(template)
        self.serves_no_more(template)
        self.generation_info.labels(template, generation, accel, qemu_version).set(1)

    def serves_no_more(self, template: str) -> None:
        """A template has no active generation, or another one."""
        self.generation_info.remove_by_labels({"template": template})

    @contextmanager
    def starting(self, clones: int) -> Iterator[None]:
        """Count clones as being started for as long as the block runs."""
        self.starts_in_progress.inc(clones)
        try:
            yield
        finally:
            self.starts_in_progress.dec(clones)

    def count_clones(self, states: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Count clones, by template and state, by this function whenever the metrics are read."""
        self.clones.states = states

    def observe_start(
        self, template: str, path: str, phases_ms: dict[str, float], total_ms: float
    ) -> None:
        """Count one successful start; times in milliseconds."""
        self.clone_seconds.labels(template, path).observe(total_ms / 1000)
        for phase, ms in phases_ms.items():
            self.phase_seconds.labels(template, path, phase).observe(ms / 1000)


class _CloneStates(Gauge):
    """A gauge that is computed whenever it is read."""

    states: Callable[[], Mapping[tuple[str, str], int]] = dict

    def collect(self) -> Iterable[Metric]:
        self.clear()
        for labels, number in self.states().items():
            self.labels(*labels).set(number)
        return super().collect()
