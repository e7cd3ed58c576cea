"""What the kernel says of memory and CPU time. See proc(5)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from templated.errors import HostError

_TICKS = os.sysconf("SC_CLK_TCK")


def pss_kib(pid: int) -> dict[str, int]:
    """KiB of a process: `pss` (its share of all it maps) and `private` (what is its alone).

    HostError when the process is gone or another user's.
    """
    text = _read(pid, "smaps_rollup")
    lines = re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
    found = {name: int(size) for name, size in lines}
    private = found.get("Private_Clean", 0) + found.get("Private_Dirty", 0)
    return {"pss": found.get("Pss", 0), "private": private}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system. HostError as `pss_kib`."""
    # The name, in parentheses, may hold spaces.
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError as error:
        raise HostError(
            f"cannot read /proc/{pid}/{name}: {error.strerror}",
            hint="run the bench as the daemon's user, in its PID namespace",
        ) from error
