"""The bench's namespaces, with what tests of forwarders need beside them."""

from __future__ import annotations

import json
import os
import shutil
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from templated.bench import netrig
from templated.bench.netrig import FIXED as FIXED
from templated.bench.netrig import Flows as Flows
from templated.bench.netrig import Sink as Sink
from templated.bench.netrig import run as run
from templated.drivers.egress.host import Ways
from templated.model.egress import EgressSpec, LinkPlan

NEEDS = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("keepalived") is None, reason="needs keepalived"),
]
"""The marks of tests with forwarders."""
CLONES = IPv4Network("10.78.0.0/16")
LINKS = IPv4Network("100.127.0.0/16")


class Rig(netrig.Rig):
    """A host with the parts of a daemon, and `clone` on its bridge.

    Without `clones` it has no bridge yet: a daemon makes it.
    """

    def __init__(self, directory: Path, *, clones: bool = True) -> None:
        super().__init__()
        self.directory = directory
        self.clones = CLONES
        if clones:
            self.host.ip("link", "add", "templated0", "type", "bridge")
            self.host.ip("addr", "add", "10.78.0.1/16", "dev", "templated0")
            self.host.ip("link", "set", "templated0", "up")
            self.add_clone()
        self.ways = Ways(
            owner=f"templated:{self.tag}", clones=CLONES, links=LINKS, netns=self.host.name
        )

    def ports(self, plan: LinkPlan, numbers: tuple[int, ...], key: str, value: str) -> None:
        """Change the ports of these forwarders, on both bridges of an egress."""
        for sync in (False, True):
            for number in numbers:
                name = plan.port(number, sync=sync)
                self.host.run("bridge", "link", "set", "dev", name, key, value)

    def spec(self, **fields: Any) -> EgressSpec:
        given = {
            "name": "acme",
            "interface": "vpc0",
            "address": "172.20.0.100/16",
            "gateway": "172.20.0.1",
            "to": ("172.20.0.0/16",),
        }
        return EgressSpec(**(given | fields))

    def shown(self) -> dict[str, Any]:
        """What the host has, for before and after: links, addresses, rules, routes, nft."""
        what = ("link", "addr", "rule", "route show table all")
        found: dict[str, Any] = {}
        for one in what:
            rows = json.loads(self.host.ip("-j", *one.split()) or "[]")
            found[one] = sorted(json.dumps(_steady(row), sort_keys=True) for row in rows)
        found["nft"] = self.host.run("nft", "list", "ruleset")
        return found


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what changes by itself."""
    moving = ("valid_life_time", "preferred_life_time", "operstate", "flags", "ifindex")
    return {k: v for k, v in row.items() if k not in moving}
