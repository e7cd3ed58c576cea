"""A host, its clones and a VPC, each a network namespace, for tests of egresses."""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from templated.drivers.egress.host import Ways
from templated.model.egress import EgressSpec, ForwarderSpec, LinkPlan

CLONES = IPv4Network("10.78.0.0/16")
LINKS = IPv4Network("100.127.0.0/16")
_numbers = itertools.count()


def run(*command: str, check: bool = True) -> str:
    """A program's output, or its error as a failed test."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert not check or done.returncode == 0, (command, done.stderr)
    return done.stdout


class Net:
    """A named network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        # Its addresses come and go by themselves.
        self.run(
            "sysctl", "-qw", *(f"net.ipv6.conf.{w}.disable_ipv6=1" for w in ("all", "default"))
        )
        self.ip("link", "set", "lo", "up")

    def run(self, *command: str, check: bool = True) -> str:
        return run("ip", "netns", "exec", self.name, *command, check=check)

    def ip(self, *arguments: str, check: bool = True) -> str:
        return run("ip", "-n", self.name, *arguments, check=check)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def shown(self) -> dict[str, Any]:
        """What there is, for before and after: links, addresses, rules, routes, nft."""
        what = ("link", "addr", "rule", "route show table all")
        found: dict[str, Any] = {}
        for one in what:
            rows = json.loads(self.ip("-j", *one.split()) or "[]")
            found[one] = sorted(json.dumps(_steady(row), sort_keys=True) for row in rows)
        found["nft"] = self.run("nft", "list", "ruleset")
        return found

    def close(self) -> None:
        run("ip", "netns", "del", self.name)


class Rig:
    """`host` has a bridge of clones and the interface `vpc0`; `vpc` is at its other end.

    `clone` is one clone, at 10.78.0.3; 172.20.0.1 of `vpc` is the gateway and a server.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tag = f"t{os.getpid()}-{next(_numbers)}"
        self.host, self.vpc, self.clone = (Net(f"{tag}-{n}") for n in ("host", "vpc", "clone"))
        self.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.host.ip("link", "add", "templated0", "type", "bridge")
        self.host.ip("addr", "add", "10.78.0.1/16", "dev", "templated0")
        self.host.ip("link", "set", "templated0", "up")
        self._join(self.clone, "tp1", "eth0", "10.78.0.3/16")
        self.host.ip("link", "set", "tp1", "master", "templated0")
        self.clone.ip("route", "add", "default", "via", "10.78.0.1")
        self._join(self.vpc, "vpc0", "eth0", "172.20.0.1/16")
        self.ways = Ways(owner=f"templated:{tag}", clones=CLONES, links=LINKS, netns=self.host.name)

    def _join(self, other: Net, here: str, there: str, address: str) -> None:
        self.host.ip("link", "add", here, "type", "veth", "peer", there, "netns", other.name)
        other.ip("addr", "add", address, "dev", there)
        other.ip("link", "set", there, "up")
        self.host.ip("link", "set", here, "up")

    def mark(self, plan: LinkPlan) -> None:
        """What a policy does: packets of clones get the mark of their egress."""
        rules = (
            "add table ip marks; add chain ip marks in"
            " { type filter hook prerouting priority -150; };"
            f'add rule ip marks in iifname "templated0" meta mark set {plan.mark}'
        )
        self.host.run("nft", rules)

    def port(self, name: str, *change: str) -> None:
        """Change a port of a bridge of the host."""
        self.host.run("bridge", "link", "set", "dev", name, *change)

    def spec(self, **fields: Any) -> EgressSpec:
        given = {
            "name": "acme",
            "interface": "vpc0",
            "address": "172.20.0.100/16",
            "gateway": "172.20.0.1",
            "to": ("172.20.0.0/16",),
        }
        return EgressSpec(**(given | fields))

    def forwarder(self, plan: LinkPlan, egress: EgressSpec, number: int) -> ForwarderSpec:
        return ForwarderSpec(
            egress=egress,
            number=number,
            owner=self.ways.owner,
            index=plan.index,
            link=str(plan.network),
            inside=plan.inside,
            sync=plan.sync,
            clones=str(CLONES),
            links=str(LINKS),
            netns=self.host.name,
            directory=str(self.directory / f"{egress.name}-{number}"),
        )

    def close(self) -> None:
        for net in (self.clone, self.vpc, self.host):
            net.close()


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what changes by itself."""
    moving = ("valid_life_time", "preferred_life_time", "operstate", "flags", "ifindex")
    return {k: v for k, v in row.items() if k not in moving}


class Flows:
    """TCP flows from the clone to the VPC while the block runs; see `templated.bench.flows`."""

    def __init__(self, rig: Rig, number: int, seconds: float, port: int = 9000) -> None:
        program = (sys.executable, "-m", "templated.bench.flows")
        where = ("172.20.0.1", str(port))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._sink = rig.vpc.start(*program, "sink", *where, **pipes)
        self._line(self._sink)
        self._send = rig.clone.start(*program, "send", *where, str(number), str(seconds), **pipes)
        self._line(self._send)

    def result(self) -> tuple[int, list[float], set[str]]:
        """How many flows were lost, the longest silence of each, sorted, and all source addresses.

        A flow is lost when one of its messages is.
        """
        told = json.loads(self._line(self._send))
        sent = told["sent"]
        out, _ = self._sink.communicate(timeout=30)
        self._send.communicate(timeout=30)
        arrived = {flow["flow"]: flow for flow in json.loads(out)}
        lost = sum(arrived.get(i, {}).get("messages") != count for i, count in enumerate(sent))
        return (
            lost,
            sorted(f["silent"] for f in arrived.values()),
            {f["peer"] for f in arrived.values()},
        )

    def close(self) -> None:
        for process in (self._send, self._sink):
            process.kill()
            process.communicate()

    @staticmethod
    def _line(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "nothing was said"
        return process.stdout.readline()
