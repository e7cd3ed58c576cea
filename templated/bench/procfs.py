"""What the kernel says of a process's memory. See proc(5), smaps_rollup."""

from __future__ import annotations

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
