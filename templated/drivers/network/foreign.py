"""Rules of others on the host that drop what clones send by it: docker's, firewalld's, ufw's.

They are read, for `doctor`, and never changed: what a chain of ours passes the others still see.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from templated.drivers.host.programs import run_here

_OURS = "templated_"
_LISTED_WITHIN = 20.0
_FAMILIES = ("ip", "inet")
_TELLING = (("DOCKER", "docker"), ("filter_FORWARD", "firewalld"), ("ufw-", "ufw"))
"""How a chain's name begins, and whose table it is in."""
_FIXES = {
    "docker": "iptables -I DOCKER-USER -i {0} -j ACCEPT; iptables -I DOCKER-USER -o {0} -j ACCEPT",
    "firewalld": "firewall-cmd --permanent --zone=trusted --add-interface={0}, and --reload",
    "ufw": "ufw route allow in on {0}; ufw route allow out on {0}",
}
_BRIDGED = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


class Blocker(NamedTuple):
    """A chain that drops what it has no rule for, and has none that lets the bridge's pass."""

    chain: str
    """As in `ip filter FORWARD`."""
    owner: str
    """docker, firewalld, ufw; empty: unknown."""
    fix: str


def judged_between_ports() -> bool:
    """Whether frames from port to port of a bridge, too, pass the host's rules for IPv4 packets.

    So it is in each namespace once the module br_netfilter is loaded, as by docker.
    """
    try:
        return _BRIDGED.read_text().strip() != "0"
    except OSError:
        return False


def blockers(bridge: str) -> list[Blocker]:
    """The chains that block forwarded packets of a bridge, in the calling thread's namespace.

    `bridge` may end with a plus: all whose names begin so. Raises HostError when nft cannot list
    what there is. Blocks.
    """
    found = list(_nftables(bridge)) if shutil.which("nft") else []
    names = Path("/proc/thread-self/net/ip_tables_names")
    legacy = shutil.which("iptables-legacy")
    if legacy and names.exists() and "filter" in names.read_text().split():
        found += _iptables(bridge, run_here(legacy, "-S", stdin="", timeout=_LISTED_WITHIN))
    return found


def _nftables(bridge: str) -> Iterator[Blocker]:
    listed = run_here("nft", "-j", "list", "ruleset", stdin="", timeout=_LISTED_WITHIN)
    items = json.loads(listed)["nftables"]
    chains = [item["chain"] for item in items if "chain" in item]
    rules = [item["rule"] for item in items if "rule" in item]
    for chain in chains:
        family, table, name = chain["family"], chain["table"], chain["name"]
        if chain.get("hook") != "forward" or family not in _FAMILIES or table.startswith(_OURS):
            continue
        there = [r for r in rules if (r["family"], r["table"]) == (family, table)]
        own = [rule["expr"] for rule in there if rule["chain"] == name]
        drops = chain.get("policy") == "drop" or (own and _ends(own[-1]))
        if drops and not any(_lets(rule["expr"], bridge) for rule in there):
            names = [c["name"] for c in chains if (c["family"], c["table"]) == (family, table)]
            owner = next((who for begin, who in _TELLING if _any(names, begin)), "")
            insert = f"nft insert rule {family} {table} {name}"
            by = bridge.replace("+", "*")
            other = f"{insert} iifname {by} accept; {insert} oifname {by} accept"
            fix = _FIXES.get(owner, other).format(bridge)
            yield Blocker(f"{family} {table} {name}", owner, fix)


def _any(names: list[str], begin: str) -> bool:
    return any(name.startswith(begin) for name in names)


def _ends(expressions: list[dict[str, Any]]) -> bool:
    """Whether a rule drops all that comes to it."""
    kinds = {kind for one in expressions for kind in one}
    return bool(kinds & {"drop", "reject"}) and not kinds & {"match", "xt", "limit", "lookup"}


def _lets(expressions: list[dict[str, Any]], bridge: str) -> bool:
    """Whether a rule accepts packets that come from the bridge."""
    if not any("accept" in one for one in expressions):
        return False
    for one in expressions:
        match = one.get("match", {})
        if match.get("left") == {"meta": {"key": "iifname"}} and match.get("op") == "==":
            right = match["right"]
            names = right.get("set", []) if isinstance(right, dict) else [right]
            return any(fnmatch.fnmatchcase(bridge, str(name)) for name in names)
    return False


def _iptables(bridge: str, listed: str) -> Iterator[Blocker]:
    """From `iptables-legacy -S`."""
    lines = listed.splitlines()
    open_ = any(f"-i {bridge} " in line and line.endswith("-j ACCEPT") for line in lines)
    if "-P FORWARD DROP" in lines and not open_:
        owner = "docker" if any(line.startswith("-N DOCKER") for line in lines) else ""
        other = "iptables-legacy -I FORWARD -i {0} -j ACCEPT; the same with -o {0}"
        fix = _FIXES.get(owner, other).format(bridge)
        yield Blocker("iptables-legacy filter FORWARD", owner, fix)
