"""`bench density`: the cost of an idle clone, as their number grows."""

from __future__ import annotations

import time
from typing import Any

from templated.bench.session import POOLED, Session, require_memory
from templated.bench.stats import summarize
from templated.drivers.host.procfs import Mapped, cpu_seconds, mapped_bytes, read_memory
from templated.errors import HostError, InvalidRequest

_STEPS = 8


def measure_density(session: Session, n: int, path: str, window: float) -> dict[str, Any]:
    """n clones one after the other, then `window` seconds in which nothing is asked of them.

    The clones are left to the session.
    """
    require_memory(n)
    checkpoints = steps(n)
    pids: list[int] = []
    starts: list[float] = []
    growth: list[dict[str, Any]] = []
    before = read_memory().available
    for k in range(1, n + 1):
        if path in POOLED:
            session.pools.fill(path, 1)
        session.progress(f"clone {k} of {n}")
        clone = session.make(f"density-{k}", path)
        assert clone.pid is not None and clone.total_ms is not None  # it runs
        pids.append(clone.pid)
        starts.append(clone.total_ms)
        if k in checkpoints:
            pss = sum(memory_of(pid).proportional for pid in pids)
            point = {"k": k, "start_ms": starts[-1], "pss_mib": _mib(pss)}
            growth.append({**point, "available_mib": read_memory().available >> 20})
    session.progress(f"idle for {window:g} s")
    cpu = idle_cpu(pids, window)
    rows = [memory_of(pid) for pid in pids]
    return {
        "kind": "density",
        "template": session.template,
        "path": path,
        "n": n,
        "pss_mib": summarize([row.proportional / (1 << 20) for row in rows]).as_dict(),
        "private_mib": summarize([row.private / (1 << 20) for row in rows]).as_dict(),
        "marginal_mib": _slope(growth),
        "available_mib_each": round((before - read_memory().available) / n / (1 << 20), 1),
        "window_s": window,
        "cpu_percent": summarize(cpu).as_dict(),
        "start_ms": summarize(starts).as_dict(),
        "growth": growth,
        "samples_ms": starts,
    }


def memory_of(pid: int) -> Mapped:
    """The memory of a process. Raises HostError when it is gone or another user's."""
    mapped = mapped_bytes(pid)
    if mapped is None:
        raise HostError(
            f"cannot read /proc/{pid}/smaps_rollup",
            hint="run the bench as the daemon's user, in its PID namespace",
        )
    return mapped


def steps(n: int) -> set[int]:
    """At which numbers of clones the memory is looked at: at most 8, the first and the last."""
    return {1, n, *(round(n * i / _STEPS) for i in range(1, _STEPS))} - {0}


def idle_cpu(pids: list[int], window: float) -> list[float]:
    """Percent of one core that each process used over the next `window` seconds."""
    begin = time.monotonic()
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(window)
    after = [cpu_seconds(pid) for pid in pids]
    passed = time.monotonic() - begin
    return [(end - start) / passed * 100 for start, end in zip(before, after, strict=True)]


def check_paused(session: Session, warm: int) -> None:
    """Raise before any work what would make `measure_paused` fail or mean nothing."""
    require_memory(warm, "paused VMs")
    if session.pools.targets()["warm"]:
        raise InvalidRequest(
            f"the pool of {session.template} has warm VMs already",
            hint=f"set it to none meanwhile: templated pool set {session.template} --warm 0",
        )


def measure_paused(session: Session, warm: int, starts: int) -> dict[str, Any]:
    """`direct` without paused VMs on the host, and with `warm` of them."""
    free = read_memory().available
    without = _direct(session, starts, "without paused VMs")
    session.pools.fill("warm", warm)
    taken = free - read_memory().available
    beside = _direct(session, starts, f"beside {warm} paused VMs")
    return {
        "paused": warm,
        "direct_without": without,
        "direct_with": beside,
        "ratio": round(beside["p50"] / without["p50"], 3),
        "available_mib_each": round(taken / warm / (1 << 20), 1),
    }


def _direct(session: Session, starts: int, where: str) -> dict[str, Any]:
    session.start("direct")
    samples = []
    for i in range(starts):
        session.progress(f"direct {i + 1} of {starts} {where}")
        samples.append(session.start("direct")["total"])
    return summarize(samples).as_dict()


def _slope(growth: list[dict[str, Any]]) -> float | None:
    """MiB by which the sum of PSS grew per clone after the first; None for a single one."""
    first, last = growth[0], growth[-1]
    if first is last:
        return None
    slope: float = (last["pss_mib"] - first["pss_mib"]) / (last["k"] - first["k"])
    return round(slope, 1)


def _mib(size: int) -> float:
    return round(size / (1 << 20), 1)
