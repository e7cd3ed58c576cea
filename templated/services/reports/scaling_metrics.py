"""Prometheus metrics of scaling. Names are fixed, as in `metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from templated.services.reports.function_metrics import Counted, Counts

FAILURES = ("round", "forecaster", "save", "load")
"""What of scaling can fail: a round, one forecast, and the file of what was learned."""
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class ScalingMetrics:
    """What is decided, what that costs, and what fails of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._desired = Counted(
            "templated_scaling_desired",
            "Instances that demand wants now; reason: what decides how many are kept.",
            ("function", "version", "reason"),
            registry=registry,
        )
        self._kept = Counted(
            "templated_scaling_kept",
            "Initialised instances that there should be, those included that serve.",
            ("function", "version"),
            registry=registry,
        )
        self._ready = Counted(
            "templated_scaling_ready",
            "Initialised instances that there are, those included that serve.",
            ("function", "version"),
            registry=registry,
        )
        self.round_seconds = Histogram(
            "templated_scaling_round_seconds",
            "Time of one round of scaling, of which there is one each second.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.failures = Counter(
            "templated_scaling_failures",
            "Rounds that failed, forecasters left out, and files of what was learned that could "
            "not be written or read.",
            ("what",),
            registry=registry,
        )
        for what in FAILURES:
            self.failures.labels(what)

    def count(
        self,
        desired: Callable[[], Counts],
        kept: Callable[[], Counts],
        ready: Callable[[], Counts],
    ) -> None:
        """Count by these whenever the metrics are read: by function, version and reason; and by
        function and version."""
        self._desired.counts = desired
        self._kept.counts = kept
        self._ready.counts = ready
