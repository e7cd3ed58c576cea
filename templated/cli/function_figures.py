"""The functions in `templated top`: a line for each, all its versions together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from templated.cli.scrape import Scrape, buckets_of, quantiles


@dataclass(frozen=True)
class FunctionFigures:
    """One function; counts are of the time that the frame covers, instances are those of now.

    `count` is of all requests that ended and were not refused, by whatever; `failed` of those
    among them that the function did not answer well, or that never reached it.
    """

    function: str
    count: int
    failed: int
    per_second: float
    p50_ms: float | None
    p99_ms: float | None
    cold_starts: int
    throttles: int
    running: int
    instances: dict[str, int]
    aim: int
    """How many instances there should be, where somebody has said so."""
    failing: int
    """How often in a row instances could not be started."""


def functions(scrape: Scrape, before: Scrape | None, window: float) -> list[FunctionFigures]:
    """Those that are deployed, the busiest first."""
    found = [_figures(name, scrape, before, window) for name in _names(scrape)]
    return sorted(found, key=lambda f: (-f.count, f.function))


def _names(scrape: Scrape) -> set[str]:
    return {labels["function"] for labels, _ in scrape.all("templated_invocations_total")}


def _figures(name: str, scrape: Scrape, before: Scrape | None, window: float) -> FunctionFigures:
    outcomes = _grown(scrape, before, "templated_invocations_total", name, "outcome")
    count = sum(outcomes.values())
    p50, p99 = quantiles(_buckets(name, scrape, before))
    cold = _grown(scrape, before, "templated_function_cold_starts_total", name, "function")
    throttles = _grown(scrape, before, "templated_function_throttles_total", name, "function")
    return FunctionFigures(
        function=name,
        count=count,
        failed=count - outcomes["ok"],
        per_second=round(count / window, 3),
        p50_ms=p50,
        p99_ms=p99,
        cold_starts=cold[name],
        throttles=throttles[name],
        running=_now(scrape, "templated_function_concurrency", name, "function")[name],
        instances=dict(_now(scrape, "templated_instances", name, "state")),
        aim=_now(scrape, "templated_function_aim", name, "function")[name],
        failing=_now(scrape, "templated_function_start_failures", name, "function")[name],
    )


def _grown(
    scrape: Scrape, before: Scrape | None, metric: str, name: str, label: str
) -> Counter[str]:
    """How much a counter of a function has grown, by one of its labels."""
    found: Counter[str] = Counter()
    for labels, grown in scrape.since(before, metric):
        if labels["function"] == name:
            found[labels[label]] += int(grown)
    return found


def _now(scrape: Scrape, metric: str, name: str, label: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for labels, value in scrape.all(metric):
        if labels["function"] == name:
            found[labels[label]] += int(value)
    return found


def _buckets(name: str, scrape: Scrape, before: Scrape | None) -> dict[float, float]:
    """Of all its requests, whatever served them."""
    found: dict[float, float] = {}
    for labels, buckets in buckets_of(scrape, before, "templated_invocation_seconds").items():
        if dict(labels)["function"] == name:
            for bound, value in buckets.items():
                found[bound] = found.get(bound, 0.0) + value
    return found
