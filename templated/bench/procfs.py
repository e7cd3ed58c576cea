"""What the kernel says of memory and CPU time. See proc(5), smaps_rollup and /proc/stat."""

from __future__ import annotations

import os
import re
from pathlib import Path

from templated.errors import HostError


def pss_kib(pid: int) -> dict[str, int]:
    """KiB of a process: `pss` (its share of all it maps) and `private` (what is its alone).

    HostError when the process is gone or another user's.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError as error:
        raise HostError(
            f"cannot read /proc/{pid}/smaps_rollup: {error.strerror}",
            hint="run the bench as the daemon's user, in its PID namespace",
        ) from error
    lines = re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
    found = {name: int(size) for name, size in lines}
    private = found.get("Private_Clean", 0) + found.get("Private_Dirty", 0)
    return {"pss": found.get("Pss", 0), "private": private}


def host_cpu_seconds() -> dict[str, float]:
    """CPU time of the whole host since its boot, in seconds: `busy`, and `idle` with waits for I/O.

    Time that a hypervisor below took away (steal) is neither.
    """
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, idle, wait, irq, softirq = ticks[:7]
    per_second = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq
    return {"busy": busy / per_second, "idle": (idle + wait) / per_second}
