"""What /metrics says, read for `templated top`: growth of counters, quantiles of histograms."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """One answer of /metrics: values by name and labels."""

    def __init__(self, text: str) -> None:
        self._values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                self._values.setdefault(sample.name, {})[labels] = sample.value

    def all(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples of a metric, with their labels."""
        for labels, value in self._values.get(name, {}).items():
            yield dict(labels), value

    def one(self, name: str) -> float | None:
        """The value of a metric without labels."""
        return self._values.get(name, {}).get(())

    def since(self, before: Scrape | None, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """How much each counter of a name has grown; one that was set back grew from 0."""
        earlier = before._values.get(name, {}) if before else {}
        for labels, value in self._values.get(name, {}).items():
            grown = value - earlier.get(labels, 0.0)
            yield dict(labels), grown if grown >= 0 else value


def quantile(q: float, buckets: dict[float, float]) -> float | None:
    """The q-quantile of a histogram's cumulative buckets, by upper bound; None without samples.

    Linear within a bucket, as PromQL's histogram_quantile. What lies above the last finite bound
    is given as that bound.
    """
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = q * buckets[bounds[-1]]
    below, low = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (rank - below) / (buckets[bound] - below)
        below, low = buckets[bound], bound
    return low


def quantiles(buckets: dict[float, float]) -> tuple[float | None, float | None]:
    """p50 and p99 in milliseconds, of buckets in seconds."""
    p50, p99 = (quantile(q, buckets) for q in (0.5, 0.99))
    return _ms(p50), _ms(p99)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def buckets_of(
    scrape: Scrape, before: Scrape | None, name: str
) -> dict[Labels, dict[float, float]]:
    """Buckets of a histogram since `before`, by the labels other than le."""
    found: dict[Labels, dict[float, float]] = {}
    for labels, value in scrape.since(before, f"{name}_bucket"):
        bound = float(labels.pop("le"))
        found.setdefault(tuple(sorted(labels.items())), {})[bound] = value
    return found
