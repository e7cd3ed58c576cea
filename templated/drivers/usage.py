"""What processes and the host use, from /proc and statvfs. Reading never raises.

Sources: proc(5); the kernel's Documentation/filesystems/proc.rst for smaps_rollup and MemAvailable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Space:
    """Bytes of a file system, or of the host's memory: what can still be had, and all."""

    free: int
    size: int


def proportional_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Memory of a process, each shared page divided by its users (PSS).

    The kernel walks all its page tables for this: about a millisecond. None when the process is
    gone, or belongs to somebody else.
    """
    return _field(proc / str(pid) / "smaps_rollup", "Pss")


def private_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Memory that only this process has: resident, without pages of files. None when it is gone.

    Cheap, and allowed for processes of others. A clone's unwritten memory is a file's.
    """
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_text().split()
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * _PAGE


def host_memory(proc: Path = _PROC) -> Space | None:
    """The host's memory; free is what programs can get without swapping (MemAvailable)."""
    free, size = _field(proc / "meminfo", "MemAvailable"), _field(proc / "meminfo", "MemTotal")
    return None if free is None or size is None else Space(free, size)


def file_system(path: Path) -> Space | None:
    """The file system that `path` is on; free is what users without privileges can get."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)


def _field(path: Path, name: str) -> int | None:
    """The bytes of a line `NAME:  123 kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)
