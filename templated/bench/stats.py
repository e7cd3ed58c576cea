"""Quantiles of a few dozen samples, without a library for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Milliseconds."""

    n: int
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between the two nearest samples.

    The same definition as numpy's default; with n samples p99 is close to the maximum below 100.
    """
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample; ValueError for none."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    return Summary(
        n=len(ordered),
        min=round(ordered[0], 2),
        p50=round(quantile(ordered, 0.50), 2),
        p90=round(quantile(ordered, 0.90), 2),
        p99=round(quantile(ordered, 0.99), 2),
        max=round(ordered[-1], 2),
    )


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key over all rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: round(quantile(sorted(row[key] for row in rows if key in row), 0.5), 2) for key in keys
    }


def summarize_rows(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Totals, the median of each phase, and the totals as they were measured, in that order."""
    phases = [{k: v for k, v in row.items() if k not in ("total", "wall")} for row in rows]
    return {
        **summarize([row["total"] for row in rows]).as_dict(),
        "phases_p50": medians(phases),
        "samples_ms": [round(row["total"], 3) for row in rows],
    }
