"""The bench's namespaces, with what tests of forwarders need beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec

from templated.bench import netrig
from templated.bench.netrig import FIXED as FIXED
from templated.bench.netrig import Flows as Flows
from templated.bench.netrig import Sink as Sink
from templated.bench.netrig import run as run
from templated.drivers.egress.host import Ways
from templated.drivers.network import make_network
from templated.journal import EgressRows, Journal
from templated.model.config import Config
from templated.model.egress import EgressSpec, EgressView, LinkPlan, Role
from templated.model.network import AddressPlan, BridgeNetwork
from templated.services.egress.egresses import Egresses
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus
from templated.services.reports.metrics import Metrics
from templated.services.tasks import Tasks
from tests.real.harness import processes
from tests.unit.fake_daemon import configured

CLONES = IPv4Network("10.78.0.0/16")
LINKS = IPv4Network("100.127.0.0/16")


class Rig(netrig.Rig):
    """A host with the parts of a daemon, and `clone` on its bridge.

    Without `clones` it has no bridge yet: a daemon makes it.
    """

    def __init__(self, directory: Path, *, clones: bool = True) -> None:
        super().__init__()
        self.directory = directory
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


class Daemon:
    """The parts of a daemon that egresses need, over the rig's namespaces."""

    def __init__(self, rig: Rig, tmp_path: Path) -> None:
        bridge = BridgeNetwork(netns=rig.host.name, create=False)
        self.config: Config = configured(tmp_path, metrics=None, network={"mode": "user"})
        self.config = msgspec.structs.replace(self.config, network=bridge)
        plan = AddressPlan(bridge.subnet, b"test")
        self.metrics = Metrics()
        self.events = EventBus(self.metrics.events)
        self.network = make_network(bridge, plan, "test")
        self.journal = Journal(tmp_path / "journal")
        self.tasks = Tasks()
        self.rows = EgressRows(self.journal)
        self.egresses = Egresses(
            *(self.config, self.rows, self.network, plan, rig.directory),
            *(rig.ways.owner.removeprefix("templated:"), self.tasks, self.events),
            EgressMetrics(self.metrics.registry),
        )

    def seen(self, kind: str) -> list[dict[str, object]]:
        return [event.details for event in self.events.recent() if event.type == kind]


@asynccontextmanager
async def daemon(rig: Rig, tmp_path: Path) -> AsyncIterator[Daemon]:
    """One that ends as a daemon does: forwarders go on."""
    made = Daemon(rig, tmp_path)
    await made.journal.open()
    try:
        await made.egresses.load()
        await made.network.open({})
        await made.egresses.open()
        yield made
    finally:
        await made.tasks.end()
        await made.egresses.close()
        await made.network.close(remove=False)
        await made.journal.close()


@contextlib.contextmanager
def rigged(tmp_path: Path) -> Iterator[Rig]:
    """A rig; whatever of its forwarders still runs at the end is killed."""
    made = Rig(tmp_path / "forwarders")
    try:
        yield made
    finally:
        for pid in running(made):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.close()


def running(rig: Rig) -> list[int]:
    """Whatever of this rig's forwarders still runs."""
    return [pid for pid, said in processes() if f"forwarder run {rig.directory}/" in said]


def answer(rig: Rig, port: int = 7, target: str = "172.20.0.1") -> str:
    """What a server of the VPC sees of a connection of the clone: its address; empty: none."""
    program = (
        "import socket; s = socket.create_connection(('%s', %d), 2); print(s.recv(99).decode())"
    )
    return rig.clone.run("python3", "-c", program % (target, port), check=False).strip()


@contextlib.contextmanager
def server(rig: Rig, port: int = 7) -> Iterator[None]:
    """A server of the VPC that tells each client its address."""
    program = f"""
import socket
listener = socket.create_server(("", {port}))
print("ready", flush=True)
while True:
    peer, name = listener.accept()
    peer.send(name[0].encode())
    peer.close()
"""
    process = rig.vpc.start("python3", "-c", program, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


async def until(
    made: Daemon, what: Callable[[EgressView], bool], seconds: float = 15
) -> EgressView:
    """The view of acme once `what` holds of it."""
    async with asyncio.timeout(seconds):
        while not what(view := made.egresses.view("acme")):
            await asyncio.sleep(0.05)
    return view


def roles(view: EgressView) -> list[Role]:
    return [one.role for one in view.forwarders]


def both(view: EgressView) -> bool:
    return sorted(roles(view)) == [Role.ACTIVE, Role.STANDBY]
