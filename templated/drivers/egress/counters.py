"""What a forwarder has counted: read in its own network namespace."""

from __future__ import annotations

import json
from pathlib import Path

from templated.drivers.egress.rules import TABLE
from templated.drivers.host.programs import run_here

_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_STAT = Path("/proc/thread-self/net/stat/nf_conntrack")


def count() -> tuple[dict[str, tuple[int, int]], int]:
    """The packets and bytes of each counter, and how many flows are tracked. HostError."""
    text = run_here("nft", "-j", "list", "counters", "table", "ip", TABLE, stdin="", timeout=10)
    found = [item["counter"] for item in json.loads(text)["nftables"] if "counter" in item]
    counters = {one["name"]: (int(one["packets"]), int(one["bytes"])) for one in found}
    return counters, int(_COUNT.read_text())


def flows_without_port() -> int:
    """Flows that got no place in the table: all ports of the fixed address were taken, by a flow to
    the same destination (`insert_failed` and `drop` of the kernel's statistics)."""
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return 0
    names = lines[0].split()
    wanted = [names.index(name) for name in ("insert_failed", "drop") if name in names]
    return sum(int(line.split()[i], 16) for line in lines[1:] for i in wanted)
