"""The nftables rules of a bridge: source NAT, and ports that cannot use another address.

Tables are named after the bridge, so that two daemons on one host do not share them. All
scripts are sent whole to `nft -f -`, which applies each in one transaction.
"""

from __future__ import annotations

import json
import re

from templated.drivers.host.programs import run_here

_TIMEOUT = 20.0


def table_of(bridge: str) -> str:
    """A table's name; nftables takes no dash in it."""
    return "templated_" + re.sub(r"[^a-z0-9]", "_", bridge)


def add_nat(bridge: str, subnet: str) -> None:
    """Masquerade packets from `subnet` that leave for other networks. May be called again."""
    table = table_of(bridge)
    _apply(
        f"add table ip {table}\n"
        f"add chain ip {table} out {{ type nat hook postrouting priority 100; policy accept; }}\n"
        f"flush chain ip {table} out\n"
        f'add rule ip {table} out ip saddr {subnet} oifname != "{bridge}" masquerade\n'
    )


def add_guard(bridge: str) -> None:
    """The rules that guarded ports are held to. May be called again: it keeps the ports.

    Only IPv4 and ARP have rules that accept them: all other frames are dropped, also IPv6.
    """
    table = f"bridge {table_of(bridge)}"
    _apply(
        f"add table {table}\n"
        f"add set {table} ports {{ type ifname; }}\n"
        f"add set {table} owners {{ type ifname . ether_addr . ipv4_addr; }}\n"
        f"add chain {table} check\n"
        f"flush chain {table} check\n"
        f"add rule {table} check iifname . ether saddr . ip saddr @owners accept\n"
        f"add rule {table} check iifname . ether saddr . arp saddr ip @owners"
        " iifname . arp saddr ether . arp saddr ip @owners accept\n"
        f"add rule {table} check drop\n"
        f"add chain {table} in {{ type filter hook prerouting priority -300; policy accept; }}\n"
        f"flush chain {table} in\n"
        f"add rule {table} in iifname @ports jump check\n"
    )


def guard_port(bridge: str, ifname: str, mac: str, ip: str) -> None:
    """Let `ifname` send from this MAC and address only. Raises HostError."""
    table = f"bridge {table_of(bridge)}"
    _apply(
        f'add element {table} owners {{ "{ifname}" . {mac} . {ip} }}\n'
        f'add element {table} ports {{ "{ifname}" }}\n'
    )


def unguard_ports(bridge: str, ifnames: set[str]) -> None:
    """Undo `guard_port`, also for ports of an earlier daemon. Raises HostError."""
    table = table_of(bridge)
    listed = json.loads(_nft(["-j", "list", "table", "bridge", table]))
    sets = {item["set"]["name"]: item["set"] for item in listed["nftables"] if "set" in item}
    owners = [element["concat"] for element in sets["owners"].get("elem", ())]
    stale = [f'"{owner[0]}" . {owner[1]} . {owner[2]}' for owner in owners if owner[0] in ifnames]
    ports = [f'"{name}"' for name in sets["ports"].get("elem", ()) if name in ifnames]
    lines = [f"delete element bridge {table} owners {{ {element} }}\n" for element in stale]
    lines += [f"delete element bridge {table} ports {{ {element} }}\n" for element in ports]
    if lines:
        _apply("".join(lines))


def remove_tables(bridge: str, families: tuple[str, ...]) -> None:
    """Remove the tables, `ip` for NAT and `bridge` for the guard. No error if there are none."""
    table = table_of(bridge)
    lines = [f"add table {family} {table}\ndelete table {family} {table}\n" for family in families]
    if lines:
        _apply("".join(lines))


def _apply(script: str) -> None:
    """Raises HostError, with nothing of the script applied."""
    _nft(["-f", "-"], script)


def _nft(arguments: list[str], script: str = "") -> str:
    """The output of nft, in the network namespace of the calling thread. Raises HostError."""
    hint = "nf_tables must be in the kernel"
    return run_here("nft", *arguments, stdin=script, timeout=_TIMEOUT, hint=hint)
