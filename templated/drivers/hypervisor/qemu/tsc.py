"""The host's time stamp counter.

Under TCG a guest reads the host's own TSC (QEMU, `cpu_get_host_ticks`). A guest kernel finds out
its frequency by the emulated PIT, which fails when the host is busy at that moment; on `microvm`
no other timer works then, and the boot hangs. So the host measures it, in peace, and tells the
guest: `tsc_early_khz=` (Linux, Documentation/admin-guide/kernel-parameters.txt).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from pathlib import Path

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_INTERVAL = 0.1


@functools.cache
def tsc_khz() -> int | None:
    """Frequency in kHz, to a few parts per million; None where it is not constant.

    Blocks for 0.1 s the first time.
    """
    if platform.machine() != "x86_64" or "constant_tsc" not in _cpu_flags():
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None  # a host that forbids such pages cannot run TCG either
    page.write(_RDTSC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    ticks, nanoseconds = _sample(read)
    time.sleep(_INTERVAL)
    ticks_after, nanoseconds_after = _sample(read)
    return round((ticks_after - ticks) * 1_000_000 / (nanoseconds_after - nanoseconds))


def _sample(read: ctypes._CFunctionType) -> tuple[int, int]:
    """The counter and the time at the same moment: of several tries, the least interrupted."""
    tries = []
    for _ in range(20):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        ticks = int(read())
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        tries.append((after - before, ticks, (before + after) // 2))
    _, ticks, moment = min(tries)
    return ticks, moment


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()
