"""Pressure stall information of the host: how much work waits for CPU, memory or I/O.

Source: Documentation/accounting/psi.rst of the kernel. `some` is the share of time in which at
least one task waited, `full` the share in which all tasks that had work did.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESOURCES = ("cpu", "memory", "io")
_ROOT = Path("/proc/pressure")


@dataclass(frozen=True)
class Pressure:
    """One resource's pressure, in percent of the last ten seconds."""

    some: float
    full: float


def read_pressure(resource: str, root: Path = _ROOT) -> Pressure | None:
    """The present pressure; None where the kernel reports none (`psi=0`, or before 4.20)."""
    try:
        lines = (root / resource).read_text().splitlines()
    except OSError:
        return None
    shares = {kind: _average(fields) for kind, *fields in map(str.split, lines)}
    return Pressure(shares.get("some", 0.0), shares.get("full", 0.0))


def _average(fields: list[str]) -> float:
    return next((float(f.removeprefix("avg10=")) for f in fields if f.startswith("avg10=")), 0.0)
