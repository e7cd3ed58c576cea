"""Prometheus metrics of functions and of their code. Names and buckets are fixed, as in `metrics`.

What is counted for one version goes away with it: nobody watches what can no longer be invoked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from templated.model.function import Version
from templated.services.reports.metrics import START_BUCKETS

OUTCOMES = ("ok", "error", "timeout", "failed")
"""How an invocation ended: the function answered; it failed; it took too long; it was us."""
STARTS = ("warm", "pool", "direct")
PHASES = ("route", "start", "attach", "init", "run")
REASONS = ("queue", "concurrency", "reserved", "max")
"""The bounds by which requests are refused."""
_CODE_OUTCOMES = {"l1": ("hit", "miss", "damaged"), "l2": ("hit", "miss", "error")}
# Seconds. An invocation of an initialised instance takes milliseconds, and may take minutes.
_BUCKETS = (*START_BUCKETS, 60, 300, 900)

Counts = Mapping[tuple[str, ...], int]


class VersionMetrics:
    """What is observed for one version, without a look-up for each request."""

    def __init__(self, metrics: FunctionMetrics, function: str, version: str) -> None:
        labels = function, version
        self._outcomes = {name: metrics.invocations.labels(*labels, name) for name in OUTCOMES}
        self._seconds = {name: metrics.seconds.labels(function, name) for name in STARTS}
        self._phases = {name: metrics.phase_seconds.labels(function, name) for name in PHASES}
        self.cold_starts = metrics.cold_starts.labels(*labels)
        self._ahead = {name: metrics.ahead.labels(*labels, name) for name in ("ok", "failed")}

    def ahead(self, came_up: bool) -> None:
        """Count an instance that was begun before a request came."""
        self._ahead["ok" if came_up else "failed"].inc()

    def answered(
        self, outcome: str, start: str, phases_ms: Mapping[str, float], total_ms: float
    ) -> None:
        """Count a request that the function answered, by whatever; times in milliseconds."""
        self._outcomes[outcome].inc()
        self._seconds[start].observe(total_ms / 1000)
        for phase, ms in phases_ms.items():
            self._phases[phase].observe(ms / 1000)

    def failed(self) -> None:
        """Count a request that ended without the function's answer."""
        self._outcomes["failed"].inc()


class FunctionMetrics:
    """The metrics of all functions of one daemon, on its registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._invocations()
        self._instances()
        self._code()

    def _invocations(self) -> None:
        self.invocations = Counter(
            "templated_invocations",
            "Invocations that were not refused, by how they ended.",
            ("function", "version", "outcome"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "templated_invocation_seconds",
            "From a request's arrival to its answer, by what served it.",
            ("function", "start"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.phase_seconds = Histogram(
            "templated_invocation_phase_seconds",
            "Time of one phase of an invocation.",
            ("function", "phase"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.throttles = Counter(
            "templated_function_throttles",
            "Requests that were refused because a bound was reached.",
            ("function", "reason"),
            registry=self._registry,
        )

    def _instances(self) -> None:
        self.cold_starts = Counter(
            "templated_function_cold_starts",
            "Instances that were begun because a request waited.",
            ("function", "version"),
            registry=self._registry,
        )
        self.ahead = Counter(
            "templated_function_starts_ahead",
            "Instances that were begun before a request came for them, by how that ended.",
            ("function", "version", "outcome"),
            registry=self._registry,
        )
        self.aim = Counted(
            "templated_function_aim",
            "Instances that there should be: those that are kept, or wanted ahead of requests.",
            ("function", "version"),
            registry=self._registry,
        )
        self.failing = Counted(
            "templated_function_start_failures",
            "How often in a row instances could not be started, or died before they served.",
            ("function", "version"),
            registry=self._registry,
        )
        self.instances = Counted(
            "templated_instances",
            "Instances by state.",
            ("function", "version", "state"),
            registry=self._registry,
        )
        self.concurrency = Counted(
            "templated_function_concurrency",
            "Requests that are under way: those that run, and those that an instance starts for.",
            ("function", "version"),
            registry=self._registry,
        )

    def _code(self) -> None:
        self.code_requests = Counter(
            "templated_code_cache_requests",
            "Requests for code, by where it was looked for: on this node (l1), in the zone (l2).",
            ("layer", "outcome"),
            registry=self._registry,
        )
        for layer, outcomes in _CODE_OUTCOMES.items():
            for outcome in outcomes:
                self.code_requests.labels(layer, outcome)
        self.code_size = Gauge(
            "templated_code_cache_bytes",
            "What the code on this node takes of the disk.",
            registry=self._registry,
        )
        self.code_attach_seconds = Histogram(
            "templated_code_attach_seconds",
            "Time to give a clone its code, with the mount in the guest and its proof.",
            buckets=START_BUCKETS,
            registry=self._registry,
        )

    def code_request(self, layer: str, outcome: str) -> None:
        """Count a request for code: layer l1 or l2; hit, miss, damaged or error."""
        self.code_requests.labels(layer, outcome).inc()

    def code_bytes(self, size: int) -> None:
        """Show what all code on this node takes now."""
        self.code_size.set(size)

    def count(self, instances: Callable[[], Counts], concurrency: Callable[[], Counts]) -> None:
        """Count by these whenever the metrics are read: by function, version and state, and by
        function and version."""
        self.instances.counts = instances
        self.concurrency.counts = concurrency

    def count_crews(self, aims: Callable[[], Counts], failures: Callable[[], Counts]) -> None:
        """The same for what there should be, and for failures in a row: by function and version."""
        self.aim.counts = aims
        self.failing.counts = failures

    def expect(self, version: Version) -> VersionMetrics:
        """Show zeros for a version: a series that begins with 1 has no rate."""
        for reason in REASONS:
            self.throttles.labels(version.function, reason)
        return VersionMetrics(self, version.function, version.label)

    def forget(self, function: str, version: str | None = None) -> None:
        """Drop the series of a version that was removed, or with None those of a function.

        What a request that still runs observes later shows nowhere.
        """
        labels = {"function": function}
        if version is None:
            for metric in (self.seconds, self.phase_seconds, self.throttles):
                metric.remove_by_labels(labels)
        else:
            labels["version"] = version
        for of_versions in (self.invocations, self.cold_starts, self.ahead):
            of_versions.remove_by_labels(labels)


class Counted(Gauge):
    """A gauge that is computed whenever it is read."""

    counts: Callable[[], Counts] = dict

    def collect(self) -> Iterable[Metric]:
        self.clear()
        for labels, number in self.counts().items():
            self.labels(*labels).set(number)
        return super().collect()
