"""An egress between two hosts: a daemon, a clone and a forwarder on each; see `egress_site`."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.egress import vxlan
from templated.errors import Conflict, HostError, InvalidRequest, TemplatedError
from templated.model.egress import EgressHost, EgressView, Peer, Role
from templated.model.network import EXIT_MASK
from tests.real.egress_parts import Daemon, answer, daemon, in_thread, left_running, server, until
from tests.real.egress_rig import FIXED, LINKS, NEEDS, Flows
from tests.real.egress_site import HOSTS, Host, Site

pytestmark = NEEDS
_numbers = itertools.count()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    owner = getattr(request, "param", "")
    made = Site(f"templated-{os.getpid()}-site{next(_numbers)}", tmp_path, owner)
    try:
        yield made
    finally:
        made.close()


@asynccontextmanager
async def daemons(site: Site, tmp_path: Path) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """One on each host."""
    async with AsyncExitStack() as stack:
        made = []
        for host in site.hosts:
            place = tmp_path / f"host{host.side}"
            place.mkdir(exist_ok=True)
            made.append(await stack.enter_async_context(daemon(host, place)))
        yield made[0], made[1]


async def _created(site: Site, *made: Daemon) -> EgressView:
    """The egress on both hosts, with marks; forwarder 1 is active. The second one's view."""
    for host, one in zip(site.hosts, made, strict=True):
        view = await one.egresses.create(host.spec())
        host.mark(one.egresses._egresses["acme"].plan.mark)
    await until(made[0], lambda view: view.peer is Peer.SEEN)
    return view


async def _seen(*hosts: Host) -> list[str]:
    """What the server sees of a clone of each host."""
    with server(hosts[0]):
        return [await in_thread(answer, host) for host in hosts]


def _bulk(host: Host) -> str:
    """What comes of a megabyte to the VPC and back: the number of bytes."""
    program = (
        "import socket; s = socket.create_connection(('172.20.0.1', 8), 5);"
        "s.sendall(bytes(1000000)); s.shutdown(1);"
        "print(sum(map(len, iter(lambda: s.recv(65536), b''))))"
    )
    echo = (
        "import socket; l = socket.create_server(('', 8)); print(flush=True); s = l.accept()[0]\n"
        "data = b''.join(iter(lambda: s.recv(65536), b'')); s.sendall(data)"
    )
    return _served(host, echo, program)


def _served(host: Host, said: str, program: str) -> str:
    """What a program of the clone prints, while the VPC runs another one, once that has begun."""
    process = host.vpc.start("python3", "-c", said, stdout=-1)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        return host.clone.run("python3", "-c", program, check=False).strip()
    finally:
        process.kill()
        process.communicate()


def _large(host: Host) -> str:
    """What comes of datagrams that the way between the hosts is too narrow for: their size."""
    said = """
import contextlib, socket, time
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind(("172.20.0.1", 9))
print(flush=True)
s.connect(s.recvfrom(9)[1])
s.setsockopt(socket.IPPROTO_IP, 10, 1)  # IP_MTU_DISCOVER, IP_PMTUDISC_WANT: as is said to it
for _ in range(20):
    with contextlib.suppress(OSError):
        s.send(bytes(1472))
    time.sleep(0.1)
"""
    program = (
        "import socket; s = socket.socket(type=2); s.settimeout(5);"
        "s.connect(('172.20.0.1', 9)); s.send(b'?'); print(len(s.recv(2000)))"
    )
    return _served(host, said, program)


def _forged(site: Site, number: int) -> None:
    """A frame in VXLAN from another address than the other host's."""
    site.switch.ip("addr", "replace", "10.9.0.9/24", "dev", "under")
    packet = (8 << 24).to_bytes(4, "big") + (number << 8).to_bytes(4, "big") + bytes(60)
    program = "import socket; s = socket.socket(type=2); s.sendto(bytes.fromhex('%s'), ('%s', %d))"
    said = program % (packet.hex(), HOSTS[0].address, vxlan.PORT)
    site.switch.run("python3", "-c", said)


async def _refused(made: Daemon, host: Host) -> None:
    """What does not fit this host; nothing is left of any."""
    elsewhere = EgressHost(address="10.9.0.7", clones=HOSTS[0].clones)
    others = EgressHost(address=HOSTS[0].address, clones="10.80.0.0/16")
    host.host.ip("addr", "add", f"{LINKS[16 * 7 + 1]}/28", "dev", "lo")
    refusals: list[tuple[type[TemplatedError], str, dict[str, Any]]] = [
        (InvalidRequest, "none is this one", {"hosts": (elsewhere, HOSTS[1])}),
        (InvalidRequest, "are in 10.78.0.0/16", {"hosts": (others, HOSTS[1])}),
        (Conflict, "link 7 of 100.127.0.0/16 is not free", {"link": 7}),
    ]
    for kind, part, fields in refusals:
        with pytest.raises(kind) as caught:
            await made.egresses.create(host.spec(**fields))
        assert part in caught.value.message and "\n" not in caught.value.message
    host.host.ip("addr", "del", f"{LINKS[16 * 7 + 1]}/28", "dev", "lo")


def test_life(site: Site, tmp_path: Path) -> None:
    """Made on one host and on the other; both are seen under the one address; removed."""
    one, two = site.hosts

    async def scenario() -> None:
        before = [host.shown() for host in site.hosts]
        async with daemons(site, tmp_path) as (first, second):
            await _refused(first, one)
            view = await first.egresses.create(one.spec())
            assert (view.active, view.here, view.peer) == (1, 1, Peer.UNSEEN)
            assert view.problem == "forwarder 2, on host 10.9.0.2, is not seen"
            with pytest.raises(Conflict, match="no standby"):
                await first.egresses.switch("acme")
            view = await second.egresses.create(two.spec())
            assert (view.active, view.here, view.problem) == (1, 2, "")
            await until(first, lambda view: not view.problem)
            for host, made in zip(site.hosts, (first, second), strict=True):
                host.mark(made.egresses._egresses["acme"].plan.mark)
            one.watch()
            assert await _seen(one, two) == [FIXED, FIXED]
            assert await in_thread(_bulk, two) == "1000000"
            assert await in_thread(_large, two) == "1472"
            with pytest.raises(Conflict, match=r"is on host 10\.9\.0\.1"):
                await second.egresses.switch("acme")
            view = await first.egresses.switch("acme")
            assert (view.active, view.forwarders[0].number) == (2, 1)
            await until(second, lambda view: view.active == 2 and not view.problem)
            assert await _seen(one, two) == [FIXED, FIXED]
            assert await in_thread(_bulk, one) == "1000000"
            assert one.wrong() == 0
            plan = first.egresses._egresses["acme"].plan
            _forged(site, vxlan._number(plan, sync=False))
            counter = ("nft", "list", "counter", "ip", plan.tunnel(), "other")
            async with asyncio.timeout(5):
                while "packets 1 " not in one.host.run(*counter):
                    await asyncio.sleep(0.05)
            for made in (first, second):
                await made.egresses.remove("acme")
        for host in site.hosts:
            host.host.run("nft", "delete", "table", "ip", "marks")
            assert not left_running(host)
        assert [host.shown() for host in site.hosts] == before

    asyncio.run(scenario())


@pytest.mark.long
def test_takeovers(site: Site, tmp_path: Path) -> None:
    """The active one's process ends, and then all of its host: flows of the other's clone go on."""
    one, two = site.hosts

    async def scenario() -> None:
        async with daemons(site, tmp_path) as (first, second):
            await _created(site, first, second)
            one.watch()
            flows = await asyncio.to_thread(Flows, two, 50, 5)
            try:
                await asyncio.sleep(1)
                os.kill(first.egresses.view("acme").forwarders[0].pid, signal.SIGKILL)
                await until(second, lambda view: view.forwarders[0].role is Role.ACTIVE)
                view = await until(first, lambda view: view.active == 2 and not view.problem)
                assert view.forwarders[0].role is Role.STANDBY
                await second.egresses.switch("acme")
                await until(first, lambda view: view.active == 1)
                lost, _, sources = await in_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources) == (0, {FIXED})
            flows = await asyncio.to_thread(Flows, two, 50, 3.5, 9001)
            try:
                await asyncio.sleep(1)
                one.cut("vpc", "under")
                await until(second, lambda view: view.active == 2)
                lost, _, sources = await in_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources) == (0, {FIXED})
            assert one.wrong() == 0
            view = await until(second, lambda view: view.peer is Peer.UNSEEN)
            assert "on host 10.9.0.1, is not seen" in view.problem
            one.cut("vpc", "under", state="up")
            await until(first, lambda view: view.active == 2 and not view.problem)
            assert await _seen(one, two) == [FIXED, FIXED]
            for made in (first, second):
                await made.egresses.remove("acme")

    asyncio.run(scenario())


@pytest.mark.long
def test_split_brain(site: Site, tmp_path: Path) -> None:
    """The network between the hosts is cut: one goes on, the other says why it does not."""
    one, two = site.hosts

    async def scenario() -> None:
        async with daemons(site, tmp_path) as (first, second):
            await first.egresses.create(one.spec())
            one.cut("under")
            before = two.shown()
            with pytest.raises(HostError, match="is taken") as caught:
                await second.egresses.create(two.spec())
            assert f"UDP port {vxlan.PORT}" in caught.value.hint
            assert two.shown() == before
            one.cut("under", state="up")
            await second.egresses.create(two.spec())
            for host, made in zip(site.hosts, (first, second), strict=True):
                host.mark(made.egresses._egresses["acme"].plan.mark)
            one.watch()
            flows = await asyncio.to_thread(Flows, one, 50, 5)
            try:
                await asyncio.sleep(1)
                one.cut("under")
                view = await until(second, lambda view: view.forwarders[0].contested > 0)
                lost, _, sources = await in_thread(flows.result)
            finally:
                flows.close()
            assert (lost, sources) == (0, {FIXED})
            view = await until(second, lambda view: view.forwarders[0].role is Role.FAULT)
            assert "sends under" in view.problem and view.active is None
            os.kill(view.forwarders[0].pid, signal.SIGKILL)
            view = await until(second, lambda view: view.forwarders[0].role is Role.GONE)
            view = await until(second, lambda view: view.forwarders[0].role is Role.FAULT)
            assert "sends under" in view.problem and view.forwarders[0].takeovers == 0
            view = await until(first, lambda view: view.peer is Peer.UNSEEN)
            assert view.active == 1 and "is not seen" in view.problem
            assert await _seen(one, two) == [FIXED, ""]
            one.cut("under", state="up")
            await until(second, lambda view: view.active == 1 and not view.problem)
            await until(first, lambda view: not view.problem)
            assert await _seen(one, two) == [FIXED, FIXED]
            one.cut("vpc")  # its clones go by the other host then
            await until(first, lambda view: view.active == 2)
            assert await _seen(one, two) == [FIXED, FIXED]
            one.cut("vpc", state="up")
            await until(first, lambda view: view.forwarders[0].role is Role.STANDBY)
            assert one.wrong() == 0
            for made in (first, second):
                await made.egresses.remove("acme")

    asyncio.run(scenario())


@pytest.mark.long
@pytest.mark.parametrize("site", ["same"], indirect=True)
def test_the_next_daemon(site: Site, tmp_path: Path) -> None:
    """It makes again what lacks, and takes away what nobody knows. Both have the same owner."""
    one, two = site.hosts

    async def scenario() -> None:
        before = one.shown()
        async with daemons(site, tmp_path) as (first, second):
            await _created(site, first, second)
            plan = first.egresses._egresses["acme"].plan
        one.host.ip("link", "del", plan.tunnel())
        one.host.run("nft", "delete", "table", "ip", plan.tunnel())
        two.host.ip("link", "del", plan.tunnel(sync=True))
        # As a daemon before lanes made it.
        mark = str(plan.mark)
        one.host.ip("rule", "del", "fwmark", f"{mark}/{EXIT_MASK:#x}", "table", mark)
        one.host.ip("rule", "add", "fwmark", mark, "table", mark, "priority", "20000")
        async with daemons(site, tmp_path) as (first, second):
            await until(first, lambda view: not view.problem and view.active is not None)
            await until(second, lambda view: not view.problem and view.active is not None)
            assert await _seen(one, two) == [FIXED, FIXED]
            for host in (one, two):  # and while it runs
                host.host.run("nft", "delete", "table", "ip", plan.tunnel())
            async with asyncio.timeout(30):
                while any(
                    plan.tunnel() not in h.host.run("nft", "list", "tables") for h in (one, two)
                ):
                    await asyncio.sleep(0.5)
            assert await _seen(one, two) == [FIXED, FIXED]
        one.clones = IPv4Network("10.80.0.0/16")  # as after a change of its configuration
        one.host.ip("addr", "add", "10.80.0.1/16", "dev", "templated0")
        async with daemons(site, tmp_path) as (first, second):
            view = first.egresses.view("acme")
            assert view.problem.startswith("neither of its hosts has its clones in 10.80.0.0/16")
            assert (view.forwarders, view.here) == ((), None) and not left_running(one)
            await until(second, lambda view: view.active == 2)
        one.clones = IPv4Network(HOSTS[0].clones)
        one.host.ip("addr", "del", "10.80.0.1/16", "dev", "templated0")
        async with daemons(site, tmp_path) as (first, second):
            await until(first, lambda view: not view.problem and view.active == 2)
            await first.rows.drop("acme")
        one.host.run("nft", "delete", "table", "ip", "marks")
        async with daemons(site, tmp_path) as (first, second):
            assert first.egresses.views() == []
            assert not left_running(one) and one.shown() == before
            await until(second, lambda view: view.active == 2)
            assert await _seen(two) == [FIXED]
            await second.egresses.remove("acme")

    asyncio.run(scenario())
