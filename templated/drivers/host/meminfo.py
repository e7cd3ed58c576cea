"""Memory of the host (proc_meminfo(5))."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FILE = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes that the host has, and that could be used without swapping."""

    total: int
    available: int


def read_memory(file: Path = _FILE) -> Memory:
    """The present state."""
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    total, available = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    return Memory(total, available)
