"""Policies against a guest with a real network stack: a namespace in place of a clone's tap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from templated.drivers.network import Port
from templated.drivers.network.bridge import TapNetwork
from templated.drivers.network.nft import BURST
from templated.model.policy import PolicyLimits
from tests.real.test_network import BRIDGE, PLAN, Namespace, run
from tests.real.test_network import ns as ns
from tests.real.test_policy import hold
from tests.real.test_policy import world as world

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]
RATE, SENT = 64 << 10, 224 << 10
SERVER = f"""
import socket, sys
with socket.create_server((sys.argv[1], 80)) as server:
    print("ready", flush=True)
    while True:
        peer = server.accept()[0]
        if (wanted := peer.recv(1)) == b"<":
            peer.sendall(bytes({SENT}))
        if wanted == b">":
            left = {SENT}
            while left:
                left -= len(peer.recv(65536)) or left
            peer.sendall(b"all")
        if wanted == b"?":
            peer.sendall(peer.getpeername()[0].encode())
        peer.close()
"""
UPLOAD = f"""
import socket
s = socket.create_connection(("10.1.0.5", 80), 30)
s.sendall(b">" + bytes({SENT}))
print(s.recv(3).decode())
"""
DOWNLOAD = f"""
import socket
s = socket.create_connection(("10.1.0.5", 80), 30)
s.sendall(b"<")
got = 0
while part := s.recv(65536):
    got += len(part)
print("all" if got == {SENT} else got)
"""
FLOOD = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(500):
    s.sendto(b"x", ("10.1.0.5", 9))
"""
MANY = """
import select, socket
trying = [socket.socket() for _ in range(8)]
for s in trying:
    s.setblocking(False)
    s.connect_ex(("10.1.0.5", 80))
up, waiting = set(), set(trying)
while (ready := select.select([], list(waiting), [], 0.5)[1]):
    up |= {s for s in ready if not s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)}
    waiting -= set(ready)
print(len(up))
"""
ASK = """
import socket, sys
try:
    s = socket.create_connection((sys.argv[1], 8080), 0.5)
    s.sendall(b"?")
    print(s.recv(100).decode())
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def guest(ns: Namespace) -> Iterator[Namespace]:
    """An empty namespace."""
    made = Namespace(f"{ns.name}-g")
    run("ip", "netns", "add", made.name)
    try:
        made.ip("link", "set", "lo", "up")
        yield made
    finally:
        run("ip", "netns", "del", made.name)


def plug(ns: Namespace, guest: Namespace, port: Port) -> None:
    """Put a guest's namespace in place of a port's tap: rules know a port by its name."""
    assert port.index is not None
    port.close()
    ns.ip("link", "del", port.ifname)
    ns.ip("link", "add", port.ifname, "type", "veth", "peer", "eth0", "netns", guest.name)
    guest.ip("link", "set", "eth0", "address", PLAN.mac(port.index), "up")
    guest.ip("addr", "add", f"{PLAN.ip(port.index)}/16", "dev", "eth0")
    guest.ip("route", "add", "default", "via", PLAN.gateway)
    ns.ip("link", "set", port.ifname, "master", BRIDGE, "up")


@contextlib.contextmanager
def serving(where: Namespace, address: str) -> Iterator[None]:
    """A server at port 80 of this address."""
    command = ["ip", "netns", "exec", where.name, sys.executable, "-c", SERVER, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            yield
        finally:
            server.kill()


def python(where: Namespace, code: str, *arguments: str) -> str:
    return where.run(sys.executable, "-c", code, *arguments).strip()


async def plugged(
    ns: Namespace, guest: Namespace, publish: tuple[str, ...] | None = None, **limits: object
) -> TapNetwork:
    """A network whose one port, of a policy with these limits, the guest has."""
    network = ns.network()
    egress = "none" if publish else "nat"
    said = PolicyLimits(**limits)  # type: ignore[arg-type]
    await hold(network, "t.web", egress=egress, publish=publish, limits=said)
    await network.open()
    plug(ns, guest, await network.make_port("one", 0, ("t.web",)))
    return network


@pytest.mark.parametrize("way", ["up", "down"])
def test_bandwidth(ns: Namespace, world: Namespace, guest: Namespace, way: str) -> None:
    """A transfer comes to its end, in each direction, and never with more than the limit gives:
    a bucket that is full at first, and its rate for as long as it took."""

    async def scenario() -> None:
        network = await plugged(ns, guest, bandwidth=f"{RATE >> 10}KiB")
        with serving(world, "10.1.0.5"):
            began = time.monotonic()
            assert python(guest, UPLOAD if way == "up" else DOWNLOAD) == "all"
            allowed = RATE + BURST + RATE * (time.monotonic() - began)
        counted = (await network.counters())["t.web"]
        assert counted["bandwidth"].packets > 0
        if way == "up":
            assert SENT < counted["sent"].bytes <= allowed
        else:
            seen = guest.run("cat", "/sys/class/net/eth0/statistics/rx_bytes")
            # It counts 14 bytes of each frame that the limit does not.
            assert SENT < int(seen) * 1400 // 1414 <= allowed
        await network.close(remove=True)

    asyncio.run(scenario())


def test_packets(ns: Namespace, world: Namespace, guest: Namespace) -> None:
    """What is beyond the limit is dropped, and all is counted."""

    async def scenario() -> None:
        network = await plugged(ns, guest, packets=50)
        began = time.monotonic()
        python(guest, FLOOD)
        allowed = 50 + 50 * (time.monotonic() - began)
        counted = (await network.counters())["t.web"]
        assert 0 < counted["sent"].packets <= allowed
        # ARP, at most a few times, counts as well; what the queue of ARP has lost was never sent.
        assert 300 < counted["sent"].packets + counted["packets"].packets <= 510
        await network.close(remove=True)

    asyncio.run(scenario())


def test_connections(ns: Namespace, world: Namespace, guest: Namespace) -> None:
    """So many at once, and no more."""

    async def scenario() -> None:
        network = await plugged(ns, guest, connections=5)
        with serving(world, "10.1.0.5"):
            assert python(guest, MANY) == "5"
        assert (await network.counters())["t.web"]["connections"].packets >= 3
        await network.close(remove=True)

    asyncio.run(scenario())


def test_published(ns: Namespace, world: Namespace, guest: Namespace) -> None:
    """From the world and from the host itself, to one of the host's addresses; not by loopback,
    where the host's own services are, and not once it is taken back."""

    async def scenario() -> None:
        network = await plugged(ns, guest, publish=("8080:80",))
        await network.publish({("tcp", 8080): (PLAN.ip(0), 80)})
        with serving(guest, PLAN.ip(0)):
            assert python(world, ASK, "192.0.2.1") == "192.0.2.2"
            assert python(ns, ASK, "192.0.2.1") == "192.0.2.1"
            assert python(ns, ASK, PLAN.gateway) == PLAN.gateway
            assert python(ns, ASK, "127.0.0.1") == "ConnectionRefusedError"
            await network.publish({})
            assert python(world, ASK, "192.0.2.1") == "ConnectionRefusedError"
        with serving(ns, "192.0.2.1"):
            assert ("tcp", 80) in (await network.host()).listening
        with serving(ns, "127.0.0.1"):
            assert ("tcp", 80) not in (await network.host()).listening
        await network.close(remove=True)

    asyncio.run(scenario())
