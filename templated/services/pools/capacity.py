"""How many pool members the host can hold: the arithmetic behind a refused pool size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from templated.drivers.host.pressure import RESOURCES, read_pressure
from templated.drivers.host.procfs import Memory, read_memory
from templated.errors import Busy
from templated.model.config import PressureConfig

_KEPT_FREE = 20
"""Part of the host's memory that pools leave alone: a twentieth."""
_LEAST_FREE = 256 << 20


@dataclass(frozen=True)
class Demand:
    """Members of one pool: how many it must have, how many it has, and the bytes that one costs."""

    what: str
    count: int
    have: int
    cost: int


def kept_free(memory: Memory) -> int:
    """Bytes that stay free whatever the pools want."""
    return max(memory.total // _KEPT_FREE, _LEAST_FREE)


def shortages(limits: PressureConfig) -> dict[str, str]:
    """What the host is short of, so that nothing is begun ahead of requests: why, by resource."""
    found = {}
    for resource in RESOURCES:
        pressure, limit = read_pressure(resource), getattr(limits, resource)
        if pressure is not None and pressure.some > limit:
            found[resource] = f"{resource} pressure is {pressure.some:.0f} % (limit {limit:g})"
    memory = read_memory()
    if memory.available < kept_free(memory):
        found["memory"] = f"only {memory.available >> 20} MiB of memory are available"
    return found


def require_room(demands: Sequence[Demand], addresses: int, memory: Memory | None = None) -> None:
    """Raises Busy, with the arithmetic, when the host lacks the memory or the addresses.

    This is the least that members take: guests that write more than the canary did need more.
    """
    total = sum(demand.count for demand in demands)
    if total > addresses:
        raise Busy(
            f"{total} pool members are more than the subnet's {addresses} addresses",
            hint="ask for less, or configure a larger network.subnet",
        )
    memory = memory or read_memory()
    missing = [(d, max(0, d.count - d.have)) for d in demands]
    needed = sum(count * demand.cost for demand, count in missing)
    free = memory.available - kept_free(memory)
    if needed > free:
        sums = " + ".join(f"{n} {d.what} x {_mib(d.cost)}" for d, n in missing if n)
        raise Busy(
            f"{sums} = {_mib(needed)}, but of the {_mib(memory.available)} that are available "
            f"{_mib(kept_free(memory))} are kept free",
            hint=f"at most {_mib(max(free, 0))} can be given to pools now; ask for less, "
            "or remove clones",
        )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
