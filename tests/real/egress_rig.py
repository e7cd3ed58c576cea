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

    def __init__(self, directory: Path, *, clones: bool = True) -> None:
        """Without `clones` the host has no bridge yet: a daemon makes it."""
        self.directory = directory
        tag = f"t{os.getpid()}-{next(_numbers)}"
        self.host, self.vpc, self.clone = (Net(f"{tag}-{n}") for n in ("host", "vpc", "clone"))
        self.host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        if clones:
            self._make_clone()
        self.join(self.vpc, "vpc0", "eth0", "172.20.0.1/16")
        self.ways = Ways(owner=f"templated:{tag}", clones=CLONES, links=LINKS, netns=self.host.name)

    def _make_clone(self) -> None:
        self.host.ip("link", "add", "templated0", "type", "bridge")
        self.host.ip("addr", "add", "10.78.0.1/16", "dev", "templated0")
        self.host.ip("link", "set", "templated0", "up")
        self.join(self.clone, "tp1", "eth0", "10.78.0.3/16")
        self.host.ip("link", "set", "tp1", "master", "templated0")
        self.clone.ip("route", "add", "default", "via", "10.78.0.1")

    def join(self, other: Net, here: str, there: str, address: str) -> None:
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


class Sink:
    """A server of the VPC that counts what flows bring; see `templated.bench.flows`."""

    def __init__(self, rig: Rig, port: int = 9000) -> None:
        program = (sys.executable, "-m", "templated.bench.flows", "sink", "172.20.0.1", str(port))
        self._process = rig.vpc.start(*program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line(self._process)

    def result(self, sent: list[int]) -> tuple[int, list[float], set[str]]:
        """How many flows were lost, the longest silence of each, sorted, and all source addresses.

        A flow is lost when one of its messages is: `sent` says how many each one has.
        """
        out, _ = self._process.communicate(timeout=30)
        arrived = {flow["flow"]: flow for flow in json.loads(out)}
        lost = sum(arrived.get(i, {}).get("messages") != count for i, count in enumerate(sent))
        silences = sorted(flow["silent"] for flow in arrived.values())
        return lost, silences, {flow["peer"] for flow in arrived.values()}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Flows:
    """TCP flows from the clone to the VPC while the block runs."""

    def __init__(self, rig: Rig, number: int, seconds: float, port: int = 9000) -> None:
        self._sink = Sink(rig, port)
        program = (sys.executable, "-m", "templated.bench.flows", "send", "172.20.0.1", str(port))
        self._send = rig.clone.start(*program, str(number), str(seconds), stdout=subprocess.PIPE)
        line(self._send)

    def result(self) -> tuple[int, list[float], set[str]]:
        """As `Sink.result`, once all is sent."""
        told = json.loads(line(self._send))
        self._send.communicate(timeout=30)
        return self._sink.result(told["sent"])

    def close(self) -> None:
        self._send.kill()
        self._send.communicate()
        self._sink.close()


def line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line that a process says."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "nothing was said"
    return process.stdout.readline()
