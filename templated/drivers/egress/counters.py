"""What a forwarder has counted: read in its own network namespace."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from templated.drivers.egress.rules import TABLE, guard_table, steering_table
from templated.drivers.host.programs import run_here
from templated.errors import HostError
from templated.model.egress import ForwarderSpec

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_LIST = Path("/proc/thread-self/net/nf_conntrack")
_FEW = 500
_STAT = Path("/proc/thread-self/net/stat/nf_conntrack")


def count(spec: ForwarderSpec) -> tuple[dict[str, tuple[int, int]], int]:
    """The packets and bytes of each counter, and how many flows are tracked. HostError."""
    return _counters("ip", TABLE), _flows(spec.egress.fixed)


def _flows(fixed: str) -> int:
    """The kernel's number has flows that are over, until it finds them, which takes a minute.

    It finds them as they are listed, and what forwarders send each other can be told from flows
    there, whose answers go to the fixed address: so these are counted, as long as there are few.
    """
    number = int(_COUNT.read_text())
    if number <= _FEW:
        with suppress(OSError):  # a kernel may be made without the list
            return _LIST.read_bytes().count(f" dst={fixed} ".encode())
    return number


def guarded(spec: ForwarderSpec) -> dict[str, tuple[int, int]]:
    """What the host's table of a forwarder dropped; in the host's namespace. HostError."""
    return {f"drop_{name}": n for name, n in _counters("netdev", guard_table(spec)).items()}


def steered(spec: ForwarderSpec) -> str:
    """The MAC that the ports of a lane are led to; empty: none. In the host's namespace."""
    table = steering_table(spec.plan)
    try:
        text = run_here("nft", "list", "table", "netdev", table, stdin="", timeout=10)
    except HostError:
        return ""
    found = re.search(r"ether daddr set ([0-9a-f:]{17})", text)
    return found[1] if found else ""


def _counters(family: str, table: str) -> dict[str, tuple[int, int]]:
    text = run_here("nft", "-j", "list", "counters", "table", family, table, stdin="", timeout=10)
    found = [item["counter"] for item in json.loads(text)["nftables"] if "counter" in item]
    return {one["name"]: (int(one["packets"]), int(one["bytes"])) for one in found}


def flows_without_port() -> int:
    """Packets that began a flow for which there was no place: neither a port of the fixed address
    that no flow to the same destination has, nor one in the table (`drop` of the kernel's
    statistics, nf_conntrack_core.c)."""
    try:
        lines = _STAT.read_text().splitlines()
        column = lines[0].split().index("drop")
        return sum(int(line.split()[column], 16) for line in lines[1:])
    except (OSError, ValueError, IndexError):
        return 0
