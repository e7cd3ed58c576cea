"""The privileges of this process (capabilities(7))."""

from __future__ import annotations

import functools
import resource
from pathlib import Path

# linux/capability.h
CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7
CAP_SYS_CHROOT, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE = 18, 21, 23, 24


def has_capabilities(*numbers: int) -> bool:
    """Whether all of these are in effect."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return all(effective >> number & 1 for number in numbers)


@functools.cache
def may_raise_priority() -> bool:
    """Whether nice can go down again: CAP_SYS_NICE, or an RLIMIT_NICE of 20 (getrlimit(2))."""
    if has_capabilities(CAP_SYS_NICE):
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_NICE)
    return soft == resource.RLIM_INFINITY or soft >= 20
