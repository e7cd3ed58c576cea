"""Real bridges and taps, in a network namespace that each test has to itself."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from templated.drivers.hypervisor.qemu.command import netdev
from templated.drivers.network import Port, make_network
from templated.drivers.network.base import PortOwner
from templated.drivers.network.bridge import TapNetwork
from templated.errors import Conflict, HostError, InvalidRequest
from templated.model.network import AddressPlan, BridgeNetwork, Forward, Tap

OWNER = "test-owner"
PLAN = AddressPlan("10.78.0.0/16", b"test")
BRIDGE = "templated0"
_numbers = itertools.count()

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2"),
]


class Namespace:
    """A named network namespace, and what iproute2 (not the code under test) says of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str) -> str:
        return run("ip", "netns", "exec", self.name, *command)

    def ip(self, *arguments: str) -> str:
        return run("ip", "-n", self.name, *arguments)

    def links(self) -> dict[str, dict[str, Any]]:
        shown = json.loads(self.ip("-d", "-j", "link", "show") or "[]")
        return {link["ifname"]: link for link in shown if link["ifname"] != "lo"}

    def made(self) -> dict[str, tuple[Any, ...]]:
        """What somebody set; flags and timers change by themselves."""
        return {
            name: (link["address"], link["mtu"], link.get("ifalias"), link.get("master"))
            for name, link in self.links().items()
        }

    def config(self, **fields: Any) -> BridgeNetwork:
        return BridgeNetwork(netns=self.name, **fields)

    def network(self, *, owner: str = OWNER, **fields: Any) -> TapNetwork:
        network = make_network(self.config(**fields), PLAN, owner)
        assert isinstance(network, TapNetwork)
        return network


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.fixture
def ns() -> Iterator[Namespace]:
    name = f"templated-{os.getpid()}-{next(_numbers)}"
    host = run("ip", "-o", "link")
    threads = threading.active_count()
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield Namespace(name)
    finally:
        run("ip", "netns", "del", name)
    gc.collect()
    assert run("ip", "-o", "link") == host, "something leaked into the host's namespace"
    assert threading.active_count() <= threads + 1, "only asyncio's own helper may linger"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_bridge_is_made_quiet_and_removed(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        await network.open()
        await network.open()
        bridge = ns.links()[BRIDGE]
        data = bridge["linkinfo"]["info_data"]
        assert (data["stp_state"], data["forward_delay"], data["mcast_snooping"]) == (0, 0, 0)
        assert bridge["ifalias"] == f"templated:{OWNER}"
        assert bridge["address"].startswith("0a:") and "UP" in bridge["flags"]
        assert "10.78.0.1/16" in ns.ip("addr", "show", BRIDGE)
        assert "inet6" not in ns.ip("addr", "show", BRIDGE)
        assert network.created
        await network.make_port("a")
        await network.make_port("b")
        assert ns.links()[BRIDGE]["address"] == bridge["address"]
        await network.close(remove=True)
        await network.close(remove=True)
        assert ns.links() == {}

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_a_port_is_a_tap_that_stays_until_it_is_dropped(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        await network.open()
        port = await network.make_port("c1")
        link = ns.links()["tpc1"]
        assert link["linkinfo"]["info_kind"] == "tun"
        tap = link["linkinfo"]["info_data"]
        assert (tap["type"], tap["pi"], tap["vnet_hdr"], tap["persist"]) == (
            "tap",
            False,
            False,
            True,
        )
        assert link["linkinfo"]["info_slave_data"]["isolated"] is True
        assert (link["master"], link["mtu"]) == (BRIDGE, ns.links()[BRIDGE]["mtu"])
        assert link["ifalias"] == f"templated:{OWNER}" and "UP" in link["flags"]
        assert link["address"].startswith("06:") and link["address"] != PLAN.mac(0)
        attached = network.attach(port, 0)
        assert port.fd is not None and attached == Tap(port.fd)
        assert not os.get_inheritable(port.fd)
        port.close()
        port.close()
        assert "tpc1" in ns.links()
        with pytest.raises(InvalidRequest, match="handed over"):
            network.attach(port, 0)
        await network.drop_port("c1")
        await network.drop_port("c1")
        await network.drop_port("never")
        assert set(ns.links()) == {BRIDGE}
        await network.close(remove=True)

    asyncio.run(scenario())


def test_settings_reach_the_kernel(ns: Namespace) -> None:
    async def scenario() -> None:
        ns.ip("link", "add", "name", "lan0", "mtu", "1400", "type", "bridge")
        ns.ip("link", "set", "lan0", "up")
        network = ns.network(bridge="lan0", host_address=False, isolate=False)
        await network.open()
        assert not network.created
        await network.make_port("a")
        link = ns.links()["tpa"]
        assert link["mtu"] == 1400
        assert link["linkinfo"]["info_slave_data"]["isolated"] is False
        await network.close(remove=True)
        assert set(ns.links()) == {"lan0"}, "a bridge of others stays"

    asyncio.run(scenario())


def test_ports_are_refused(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        with pytest.raises(HostError, match="not open"):
            await network.make_port("a")
        await network.open()
        port = await network.make_port("a", 5)
        with pytest.raises(Conflict, match="there already"):
            await network.make_port("a")
        for tag in ("", "-a", "a/b", "A", "fourteen-chars"):
            with pytest.raises(InvalidRequest, match="bad port tag"):
                await network.make_port(tag)
        with pytest.raises(InvalidRequest, match="forwards no ports"):
            network.attach(port, 5, [Forward(80, 0)])
        with pytest.raises(InvalidRequest, match="made for index 5"):
            network.attach(port, 6)
        with pytest.raises(ValueError, match="no address"):
            await network.make_port("b", PLAN.capacity)
        ns.ip("tuntap", "add", "dev", "tpforeign", "mode", "tap")
        with pytest.raises(Conflict, match="not this daemon's"):
            await network.make_port("foreign")
        await network.drop_port("foreign")
        assert "tpforeign" in ns.links()
        await network.close(remove=True)
        assert set(ns.links()) == {"tpforeign"}

    asyncio.run(scenario())


def test_sweep_takes_what_carries_our_tag_and_nothing_else(ns: Namespace) -> None:
    async def scenario() -> None:
        other = ns.network(owner="other")
        await other.open()
        await other.make_port("theirs")
        first = ns.network()
        await first.open()
        assert not first.created
        for tag in ("keep", "old1", "old2"):
            await first.make_port(tag)
        await first.close(remove=False)
        ns.ip("tuntap", "add", "dev", "tpnobody", "mode", "tap")
        ns.ip("link", "set", "tpnobody", "master", BRIDGE)

        second = ns.network()
        await second.open()
        assert await second.sweep({"keep", "unknown"}) == ["old1", "old2"]
        assert await second.sweep({"keep"}) == []
        assert set(ns.links()) == {BRIDGE, "tpkeep", "tptheirs", "tpnobody"}
        await second.close(remove=True)
        assert set(ns.links()) == {BRIDGE, "tptheirs", "tpnobody"}
        await other.close(remove=True)
        assert set(ns.links()) == {BRIDGE, "tpnobody"}, "a bridge with ports of others stays"

    asyncio.run(scenario())


def test_a_next_daemon_takes_over_bridge_and_idle_taps(ns: Namespace) -> None:
    async def scenario() -> None:
        first = ns.network()
        await first.open()
        await first.make_port("idle")
        used = await first.make_port("used")
        assert used.fd is not None
        held = os.dup(used.fd)  # as a running QEMU has it
        await first.close(remove=False)
        assert set(ns.links()) == {BRIDGE, "tpidle", "tpused"}
        ns.ip("addr", "add", "10.99.0.1/24", "dev", BRIDGE)

        second = ns.network()
        await second.open()
        assert second.created
        assert "10.99.0.1" not in ns.ip("addr", "show", BRIDGE)
        assert "10.78.0.1/16" in ns.ip("addr", "show", BRIDGE)
        assert (await second.make_port("idle")).fd is not None
        with pytest.raises(Conflict, match="in use"):
            await second.make_port("used")
        await second.close(remove=True)
        assert ns.links() == {}
        os.close(held)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prepare", "fields", "says", "hint"),
    [
        ((), {"create": False}, "there is no bridge", "create: true"),
        (("tuntap add dev templated0 mode tap",), {}, "not a bridge but tun", "another"),
        (("link add name templated0 type bridge",), {}, "is down", "ip link set"),
        (
            ("link add name templated0 type bridge", "link set templated0 up"),
            {},
            "no address 10.78.0.1/16",
            "ip addr add",
        ),
        (
            (
                "link add name lan0 type bridge",
                "link set lan0 up",
                "addr add 10.78.3.1/24 dev lan0",
            ),
            {},
            "overlaps the host's route to 10.78.3.",
            "another subnet",
        ),
        (
            ("route add 10.0.0.0/8 dev lo",),
            {},
            "overlaps the host's route to 10.0.0.0/8",
            "another subnet",
        ),
        ((), {"nat": True}, "forwards IPv4", "ip_forward=1"),
    ],
)
def test_open_is_refused_and_leaves_nothing(
    ns: Namespace, prepare: tuple[str, ...], fields: dict[str, Any], says: str, hint: str
) -> None:
    async def scenario() -> None:
        network = ns.network(**fields)
        with pytest.raises(HostError, match=says) as caught:
            await network.open()
        assert hint in caught.value.hint
        await network.close(remove=True)

    if fields.get("nat"):
        ns.run("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")
    for command in prepare:
        ns.ip(*command.split())
    links, fds = ns.made(), open_fds()
    asyncio.run(scenario())
    assert ns.made() == links
    assert open_fds() == fds


def test_a_default_route_is_no_overlap(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        await network.open()
        await network.close(remove=True)

    for route in ("default", "0.0.0.0/1", "128.0.0.0/1"):
        ns.ip("route", "add", route, "dev", "lo")
    asyncio.run(scenario())


def test_a_namespace_that_is_not_there(ns: Namespace) -> None:
    missing = BridgeNetwork(netns=f"{ns.name}-missing")
    with pytest.raises(HostError, match="no network namespace") as caught:
        asyncio.run(make_network(missing, PLAN, OWNER).open())
    assert "ip netns add" in caught.value.hint
    assert not os.path.exists(f"/run/netns/{ns.name}-missing")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv to drop a capability")
def test_without_the_capability(ns: Namespace) -> None:
    program = (
        "import asyncio, sys\n"
        "from templated.drivers.network import make_network\n"
        "from templated.errors import HostError\n"
        "from templated.model.network import AddressPlan, BridgeNetwork\n"
        "config = BridgeNetwork(netns=sys.argv[1])\n"
        "plan = AddressPlan(config.subnet, b'test')\n"
        "try:\n"
        "    asyncio.run(make_network(config, plan, 'test').open())\n"
        "except HostError as error:\n"
        "    print(error.message, '|', error.hint)\n"
    )
    bare = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    said = run(*bare, sys.executable, "-W", "error", "-c", program, ns.name)
    assert "cannot make tap devices" in said and "CAP_NET_ADMIN" in said
    assert ns.links() == {}


# Frames: the test is the guest, at the tap's fd. What it sends stays in the namespace.


def arp(index: int, target: str, *, ip: str = "") -> bytes:
    """A request from the clone `index`, who has its own MAC and says that it has `ip`."""
    mac = bytes.fromhex(PLAN.mac(index).replace(":", ""))
    sender, wanted = socket.inet_aton(ip or PLAN.ip(index)), socket.inet_aton(target)
    header = b"\xff" * 6 + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
    return (header + mac + sender + bytes(6) + wanted).ljust(60, b"\0")


def received(port: Port, seconds: float) -> list[bytes]:
    frames: list[bytes] = []
    end = time.monotonic() + seconds
    assert port.fd is not None
    while select.select([port.fd], [], [], max(0.0, end - time.monotonic()))[0]:
        frames.append(os.read(port.fd, 2048))
        if frames[-1][12:14] == b"\x08\x06":
            break
    return [frame for frame in frames if frame[12:14] == b"\x08\x06"]


def send(port: Port, frame: bytes) -> None:
    assert port.fd is not None
    assert os.write(port.fd, frame) == len(frame)


def answered(port: Port, frame: bytes, tries: int = 50) -> list[bytes]:
    """What a frame is answered. The first ones may be lost, until the kernel has readied a port."""
    answer: list[bytes] = []
    while not answer and tries:
        send(port, frame)
        answer = received(port, 0.1)
        tries -= 1
    return answer


@pytest.mark.parametrize("isolate", [True, False])
def test_clones_reach_the_gateway_and_each_other_only_if_allowed(
    ns: Namespace, isolate: bool
) -> None:
    async def scenario() -> None:
        network = ns.network(isolate=isolate)
        await network.open()
        one, two = await network.make_port("one", 0), await network.make_port("two", 1)
        answer = answered(one, arp(0, PLAN.gateway))
        assert answer and answer[0][28:32] == socket.inet_aton(PLAN.gateway)
        received(two, 0.2)
        send(one, arp(0, PLAN.ip(1)))
        assert bool(received(two, 0.3)) is not isolate
        await network.close(remove=True)

    asyncio.run(scenario())


needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft")


@needs_nft
def test_a_guarded_port_sends_from_its_own_address_only(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network(antispoof=True)
        await network.open()
        with pytest.raises(InvalidRequest, match="one address"):
            await network.make_port("one")
        port = await network.make_port("one", 0)
        for honest, frame in (
            (True, arp(0, PLAN.gateway)),
            (False, arp(0, PLAN.gateway, ip=PLAN.ip(1))),
            (False, arp(1, PLAN.gateway)),
            (False, arp(1, PLAN.gateway, ip=PLAN.ip(0))),
        ):
            assert bool(answered(port, frame, tries=50 if honest else 2)) is honest
        await network.close(remove=False)

        again = ns.network(antispoof=True)
        await again.open({"one": PortOwner(0)})
        assert PLAN.mac(0) in ns.run("nft", "list", "ruleset"), "running clones stay guarded"
        port = await again.make_port("one", 1)
        rules = ns.run("nft", "list", "ruleset")
        assert PLAN.mac(1) in rules and PLAN.mac(0) not in rules
        await again.drop_port("one")
        assert "tpone" not in ns.run("nft", "list", "ruleset")
        ns.ip("tuntap", "add", "dev", "tpforeign", "mode", "tap")
        with pytest.raises(Conflict):
            await again.make_port("foreign", 2)
        assert "tpforeign" not in ns.run("nft", "list", "ruleset")
        await again.close(remove=True)
        assert ns.run("nft", "list", "ruleset").strip() == ""

    asyncio.run(scenario())


@needs_nft
def test_nat_has_one_table_that_goes_at_close(ns: Namespace) -> None:
    async def scenario() -> None:
        ns.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        network = ns.network(bridge="lab-0.x", nat=True)
        await network.open()
        rules = ns.run("nft", "list", "table", "ip", "templated_lab_0_x")
        assert 'ip saddr 10.78.0.0/16 oifname != "lab-0.x" masquerade' in rules
        await network.close(remove=False)
        second = ns.network(bridge="lab-0.x", nat=True)
        await second.open()
        assert ns.run("nft", "list", "ruleset").count("masquerade") == 1
        await second.close(remove=True)
        assert ns.run("nft", "list", "ruleset").strip() == ""
        assert ns.links() == {}

    asyncio.run(scenario())


def test_a_missing_nft_leaves_no_bridge(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="nft is not installed") as caught:
        asyncio.run(ns.network(antispoof=True).open())
    monkeypatch.undo()
    assert "apt install" in caught.value.hint
    assert ns.links() == {}


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")
def test_qemu_takes_the_fd(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        await network.open()
        port = await network.make_port("vm", 0)
        attached = network.attach(port, 0)
        # not in the namespace: the fd carries it
        qemu = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-monitor", "stdio", "-netdev", netdev(attached, "net0")),
            pass_fds=(attached.fd,),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        port.close()
        assert qemu.stdin is not None
        carrier = "NO-CARRIER" not in ns.links()["tpvm"]["flags"]
        output, _ = await asyncio.wait_for(qemu.communicate(b"info network\nquit\n"), 20)
        assert b"type=tap,fd=" in output and qemu.returncode == 0
        assert carrier
        # the kernel tells of a lost carrier a moment later
        for _ in range(50):
            if "NO-CARRIER" in ns.links()["tpvm"]["flags"]:
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the tap is still open after QEMU ended")
        await network.close(remove=True)

    asyncio.run(scenario())


def test_many_ports_at_once_and_a_cancelled_one(ns: Namespace) -> None:
    async def scenario() -> None:
        network = ns.network()
        await network.open()
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(network.make_port(f"p{number}", number))
        assert len(ns.links()) == 21
        task = asyncio.create_task(network.make_port("gone"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await network.drop_port("gone")
        assert "tpgone" not in ns.links()
        await network.close(remove=True)
        assert ns.links() == {}

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
