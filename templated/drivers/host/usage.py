"""Memory of processes (proc(5)) and space of file systems. Reading never raises."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Space:
    """Bytes of a file system: what can still be had, and all."""

    free: int
    size: int


def proportional_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Memory of a process, each shared page divided by its users (PSS).

    The kernel walks all its page tables for this: about a millisecond. None when the process is
    gone, or belongs to somebody else.
    """
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def anonymous_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Resident memory of a process without pages of files; None when it is gone.

    Cheap, and allowed for processes of others. A clone's memory is a file's until it writes there,
    so this is nearly all that the clone costs.
    """
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_text().split()
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * _PAGE


def file_system(path: Path) -> Space | None:
    """The file system that `path` is on; free is what users without privileges can get."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)
