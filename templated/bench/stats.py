"""Quantiles of a few dozen samples, by linear interpolation between the two nearest ones."""

from __future__ import annotations

import statistics
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


def summarize(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample; ValueError for none.

    With fewer than 100, p99 is close to the maximum.
    """
    if not samples:
        raise ValueError("no samples")
    # Python before 3.13 wants two samples.
    several = samples if len(samples) > 1 else [*samples, *samples]
    cuts = statistics.quantiles(several, n=100, method="inclusive")
    return Summary(
        n=len(samples),
        min=round(min(samples), 2),
        p50=round(cuts[49], 2),
        p90=round(cuts[89], 2),
        p99=round(cuts[98], 2),
        max=round(max(samples), 2),
    )


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key over all rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: round(statistics.median(row[key] for row in rows if key in row), 2) for key in keys
    }


def summarize_rows(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Totals, the median of each phase, and the totals as they were measured, in that order."""
    phases = [{k: v for k, v in row.items() if k not in ("total", "wall")} for row in rows]
    return {
        **summarize([row["total"] for row in rows]).as_dict(),
        "phases_p50": medians(phases),
        "samples_ms": [round(row["total"], 3) for row in rows],
    }
