"""The parts of a daemon that egresses need, over `egress_rig`, and who asks it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from templated.drivers.network import make_network
from templated.journal import EgressRows, Journal
from templated.model.config import Config, EgressConfig
from templated.model.egress import EgressView, Role
from templated.model.network import AddressPlan, BridgeNetwork
from templated.services.egress.egresses import Egresses
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus
from templated.services.reports.metrics import Metrics
from templated.services.tasks import Tasks
from tests.real.egress_rig import Rig
from tests.real.harness import processes
from tests.unit.fake_daemon import configured


class Daemon:
    """The parts of a daemon that egresses need, over the rig's namespaces."""

    def __init__(self, rig: Rig, tmp_path: Path, egress: EgressConfig) -> None:
        bridge = BridgeNetwork(netns=rig.host.name, create=False, subnet=str(rig.clones))
        self.config: Config = configured(tmp_path, metrics=None, network={"mode": "user"})
        self.config = msgspec.structs.replace(self.config, network=bridge, egress=egress)
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
async def daemon(rig: Rig, tmp_path: Path, **egress: str) -> AsyncIterator[Daemon]:
    """One that ends as a daemon does: forwarders go on. `egress` is configured so."""
    made = Daemon(rig, tmp_path, EgressConfig(**egress))
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


def left_running(rig: Rig) -> list[int]:
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


in_thread = asyncio.to_thread


def end(rig: Rig) -> None:
    """End whatever of this rig's forwarders still runs."""
    for pid in left_running(rig):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def rigged(tmp_path: Path) -> Iterator[Rig]:
    """A rig; whatever of its forwarders still runs at the end is killed."""
    made = Rig(tmp_path / "forwarders")
    try:
        yield made
    finally:
        end(made)
        made.close()
