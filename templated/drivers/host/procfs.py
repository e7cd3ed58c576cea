"""Processes, and the host's memory and CPUs, as /proc shows them (proc(5)).

A process that has ended is no error: each function says what it returns then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Bytes that the host has, and that could be used without swapping."""

    total: int
    available: int


@dataclass(frozen=True)
class Mapped:
    """Bytes that a process maps: its share of them (PSS), and those that no other process maps."""

    proportional: int
    private: int


def read_memory(file: Path = _PROC / "meminfo") -> Memory:
    """The host's memory now. Raises OSError where there is no /proc."""
    sizes = _sizes(file)
    return Memory(sizes["MemTotal"], sizes["MemAvailable"])


def host_cpu_seconds() -> dict[str, float]:
    """CPU time of the whole host since its boot, in seconds: `busy`, and `idle` with waits for I/O.

    Time that a hypervisor below took away (steal) is neither.
    """
    ticks = [int(field) for field in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, idle, wait, irq, softirq = ticks[:7]
    busy = user + nice + system + irq + softirq
    return {"busy": busy / _TICKS, "idle": (idle + wait) / _TICKS}


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (stat, field 22); None when it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone."""
    try:
        content = (_PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return content.decode(errors="replace").split("\0")


def user(pid: int) -> int | None:
    """The real uid of a process; None when it is gone."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    return int(status.split("\nUid:\t")[1].split()[0])


def with_argument(words: set[str]) -> list[tuple[str, int]]:
    """The processes that have one of these as an argument: word and pid. Reads all of /proc."""
    if not words:
        return []
    pids = [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    return [(word, pid) for pid in pids for word in words.intersection(command_line(pid))]


def has_option(pid: int, option: str, value: str, uid: int) -> bool:
    """Whether a process is a user's, and has an option with this value among its arguments."""
    return (option, value) in pairwise(command_line(pid)) and user(pid) == uid


def newest_with_option(option: str, value: str, uid: int) -> int | None:
    """The process with the highest pid of which `has_option` holds; None when there is none.

    One that has just started is found without a look at most of /proc.
    """
    pids = sorted((int(name) for name in os.listdir(_PROC) if name.isdigit()), reverse=True)
    return next((pid for pid in pids if has_option(pid, option, value, uid)), None)


def mapped_bytes(pid: int, proc: Path = _PROC) -> Mapped | None:
    """The memory of a process; None when it is gone, or belongs to somebody else.

    The kernel walks all its page tables for this: about a millisecond.
    """
    try:
        sizes = _sizes(proc / str(pid) / "smaps_rollup")
    except OSError:
        return None
    private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return Mapped(sizes.get("Pss", 0), private)


def anonymous_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """Resident memory of a process without pages of files; None when it is gone.

    Cheap, and allowed for the processes of other users. A clone's memory comes from a file until
    it writes there, so this is nearly all that the clone costs.
    """
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_text().split()
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * _PAGE


def _stat(pid: int) -> list[str] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" and not _has_threads(pid) else fields


def _has_threads(pid: int) -> bool:
    """Whether a process whose first thread has ended goes on with others."""
    try:
        return len(os.listdir(_PROC / str(pid) / "task")) > 1
    except OSError:
        return False


def _sizes(file: Path) -> dict[str, int]:
    """The lines `Name: 12 kB` of a file, in bytes."""
    fields = [line.split() for line in file.read_text().splitlines()]
    return {f[0].rstrip(":"): int(f[1]) << 10 for f in fields if len(f) == 3 and f[2] == "kB"}
