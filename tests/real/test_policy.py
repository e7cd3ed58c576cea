"""Policies on a real bridge: the test is the guest at each tap, a namespace is the world."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

import pytest

from templated.drivers.network import Port
from templated.drivers.network.base import PortOwner
from templated.drivers.network.bridge import TapNetwork
from templated.errors import HostError
from templated.model.network import BridgeNetwork, Exit
from templated.model.policy import PolicyKeys, PolicyLimits, policy_of
from templated.model.rules import Flow
from templated.model.trace import Place, trace
from tests.real.test_network import BRIDGE, PLAN, Namespace, answered, arp, received, run, send
from tests.real.test_network import ns as ns

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft"),
]
GATE = bytes(6)


@pytest.fixture
def world(ns: Namespace) -> Iterator[Namespace]:
    """A namespace behind `out0` of the host's, and behind `eg0`, with addresses of the world."""
    outside = Namespace(f"{ns.name}-w")
    run("ip", "netns", "add", outside.name)
    try:
        for name, net in (("out0", "192.0.2"), ("eg0", "100.127.0")):
            ns.ip("link", "add", name, "type", "veth", "peer", "name", "w" + name)
            ns.ip("link", "set", "w" + name, "netns", outside.name)
            ns.ip("addr", "add", f"{net}.1/24", "dev", name)
            ns.ip("link", "set", name, "up")
            outside.ip("addr", "add", f"{net}.2/24", "dev", "w" + name)
            outside.ip("link", "set", "w" + name, "up")
        outside.ip("link", "set", "lo", "up")
        for address in ("10.1.0.5", "10.2.0.5", "169.254.169.254", "100.100.100.200"):
            outside.ip("addr", "add", f"{address}/32", "dev", "lo")
        outside.ip("route", "add", "10.78.0.0/16", "via", "100.127.0.1")
        ns.ip("route", "add", "default", "via", "192.0.2.2")
        ns.ip("route", "add", "default", "via", "100.127.0.2", "table", "77")
        ns.ip("rule", "add", "fwmark", "77", "lookup", "77")
        for key in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
            ns.run("sysctl", "-qw", f"net.ipv4.{key}")
        yield outside
    finally:
        run("ip", "netns", "del", outside.name)


CONFIG = BridgeNetwork()


def keys(**said: object) -> PolicyKeys:
    return PolicyKeys(**said)  # type: ignore[arg-type]


async def hold(network: TapNetwork, group: str, **said: object) -> None:
    await network.set_policies({group: policy_of(keys(**said), CONFIG)})


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(index: int, gate: bytes, target: str, protocol: int, payload: bytes) -> bytes:
    """A frame from the clone `index` by the gateway."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
    head += socket.inet_aton(PLAN.ip(index)) + socket.inet_aton(target)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    mac = bytes.fromhex(PLAN.mac(index).replace(":", ""))
    return (gate + mac + b"\x08\x00" + head + payload).ljust(60, b"\0")


def syn(index: int, gate: bytes, target: str, port: int, source: int) -> bytes:
    """The first packet of a TCP connection."""
    tcp = struct.pack("!HHIIBBHHH", source, port, 1, 0, 0x50, 2, 1024, 0, 0)
    pseudo = socket.inet_aton(PLAN.ip(index)) + socket.inet_aton(target)
    summed = checksum(pseudo + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)
    return packet(index, gate, target, 6, tcp[:16] + struct.pack("!H", summed) + tcp[18:])


def echo(index: int, gate: bytes, target: str, number: int) -> bytes:
    """A ping."""
    body = struct.pack("!BBHHH", 8, 0, 0, 7, number) + b"data"
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return packet(index, gate, target, 1, body)


def datagram(index: int, gate: bytes, target: str, source: int, port: int) -> bytes:
    """A UDP packet, without a sum, which IPv4 allows."""
    return packet(index, gate, target, 17, struct.pack("!HHHH", source, port, 12, 0) + b"data")


def heard(port: Port, source: str, seconds: float = 0.25) -> bool:
    """Whether an IPv4 packet with this source arrives. ARP is answered meanwhile."""
    assert port.fd is not None and port.index is not None
    end = time.monotonic() + seconds
    while select.select([port.fd], [], [], max(0.0, end - time.monotonic()))[0]:
        frame = os.read(port.fd, 2048)
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x01":
            answer_arp(port, frame)
        elif frame[12:14] == b"\x08\x00" and frame[26:30] == socket.inet_aton(source):
            return True
    return False


def answer_arp(port: Port, asked: bytes) -> None:
    """Say the clone's MAC to who asks for its address."""
    assert port.index is not None
    mac, ip = bytes.fromhex(PLAN.mac(port.index).replace(":", "")), PLAN.ip(port.index)
    if asked[38:42] != socket.inet_aton(ip):
        return
    header = asked[6:12] + mac + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 2)
    send(port, (header + mac + socket.inet_aton(ip) + asked[22:32]).ljust(60, b"\0"))


def gate_of(port: Port) -> bytes:
    """The gateway's MAC; the kernel passes frames of the port from then on."""
    assert port.index is not None
    return answered(port, arp(port.index, PLAN.gateway))[0][6:12]


def tagged(frame: bytes) -> bytes:
    """The frame in a VLAN."""
    return frame[:12] + b"\x81\0\0\x05" + frame[12:]


async def dropped(network: TapNetwork, group: str) -> dict[str, int]:
    counted = (await network.counters())[group]
    return {name: one.packets for name, one in counted.items() if one.packets}


def reaches(port: Port, gate: bytes, flow: Flow, number: int) -> bool:
    """Whether the first packet of a connection is answered from where it was sent to."""
    assert port.index is not None
    target = str(flow.target)
    if flow.protocol == "icmp":
        frame = echo(port.index, gate, target, number)
    else:
        assert flow.port is not None
        frame = syn(port.index, gate, target, flow.port, 20000 + number)
    for _ in range(2):
        send(port, frame)
        if heard(port, target):
            return True
    return False


TARGETS: Sequence[tuple[str, int | None]] = (
    ("10.1.0.5", 80),
    ("10.1.0.5", 81),
    ("10.1.0.5", None),
    ("10.2.0.5", 80),
    ("10.2.0.5", None),
    ("169.254.169.254", 80),
    ("169.254.169.254", None),
    ("100.100.100.200", None),
    ("192.0.2.1", 22),
    ("192.0.2.1", None),
    (PLAN.gateway, 22),
    (PLAN.gateway, None),
    ("100.127.0.2", None),
    (PLAN.ip(1), None),
    (PLAN.ip(2), None),
)
POLICIES: tuple[dict[str, object], ...] = (
    {"egress": "none"},
    {"egress": "nat"},
    {"egress": "nat", "peers": "open"},
    {"egress": "nat", "allow": ("10.1.0.0/16:80", "10.2.0.0/16")},
    {"egress": "acme"},
    {"egress": "acme", "allow": ("10.1.0.5",)},
    {"egress": "missing"},
)


@pytest.mark.parametrize("said", POLICIES, ids=str)
def test_trace_and_reality_agree(ns: Namespace, world: Namespace, said: dict[str, object]) -> None:
    """Each target answers a SYN or a ping exactly when `trace` says that the packet passes."""
    exits = (Exit("acme", 77, "eg0"),)
    policy = policy_of(keys(**said), CONFIG)
    assert policy is not None

    async def scenario() -> None:
        network = ns.network()
        await network.set_policies({"t.web": policy})
        await hold(network, "t.other", peers="open")
        await network.open()
        await network.set_exits(exits)
        port = await network.make_port("one", 0, ("t.web",))
        peer, other = (
            await network.make_port("two", 1, ("t.web",)),
            await network.make_port("three", 2, ("t.other",)),
        )
        gate = gate_of(port)
        for waiting in (peer, other):
            gate_of(waiting)
        own = next((one for one in exits if one.name == policy.egress), None)
        wrong = []
        for number, (target, dport) in enumerate(TARGETS):
            way = await network.way(target, own.mark if own else 0)
            flow = Flow(
                IPv4Address(target),
                "icmp" if dport is None else "tcp",
                dport,
                "" if way.local else way.ifname or "none",
                target == PLAN.ip(1),
            )
            place = Place(BRIDGE, "10.78.0.0/16", PLAN.gateway)
            steps = trace(policy, exits, place, flow)
            if target in (PLAN.ip(1), PLAN.ip(2)):
                to = peer if target == PLAN.ip(1) else other
                send(port, arp(0, target))
                really = bool(received(to, 0.3))
            else:
                really = reaches(port, gate, flow, number)
            if steps[-1].passes is not really:
                wrong.append((target, dport, really, steps))
        assert not wrong
        await network.close(remove=True)
        assert ns.run("nft", "list", "ruleset").strip() == ""

    asyncio.run(scenario())


def test_a_policy_changes_under_what_is_open(ns: Namespace, world: Namespace) -> None:
    """One transaction, for ports that are there; counters stay; nothing of the port is touched."""

    async def scenario() -> None:
        network = ns.network()
        await network.open()
        port = await network.make_port("one", 0, ("t.web",))
        gate = gate_of(port)
        flow = Flow(IPv4Address("10.1.0.5"), "icmp", None, "out0")
        assert reaches(port, gate, flow, 1), "without a policy the host forwards, as ever"
        await hold(network, "t.web", egress="none")
        assert not reaches(port, gate, flow, 1)
        await hold(network, "t.web", egress="nat")
        assert reaches(port, gate, flow, 2)
        await hold(network, "t.web", egress="nat", allow=("10.2.0.0/16",))
        before = await dropped(network, "t.web")
        assert not reaches(port, gate, flow, 2), "what is open ends, too"
        assert (await dropped(network, "t.web"))["allow"] > before.get("allow", 0)
        assert (await dropped(network, "t.web"))["sent"] >= 1, "counters stay"
        await hold(network, "t.web", egress="acme")
        assert not reaches(port, gate, flow, 3), "no exit: closed"
        await network.set_exits([Exit("acme", 77, "eg0")])
        assert reaches(port, gate, flow, 4)
        await network.set_exits([])
        assert not reaches(port, gate, flow, 4)
        await hold(network, "t.wide", egress="nat")
        await network.move_port("one", ("t.wide",))
        assert reaches(port, gate, flow, 5), "a port is held to another group's policy"
        await network.set_policies({"t.wide": None})
        await network.move_port("one", ("t.web",))
        await network.set_policies({"t.web": None})
        assert ns.run("nft", "list", "ruleset").strip() == ""
        assert ns.links()["tpone"]["linkinfo"]["info_slave_data"]["isolated"] is True
        await network.close(remove=True)

    asyncio.run(scenario())


def test_hostile_guests(ns: Namespace, world: Namespace) -> None:
    """Spoofed MAC, address and ARP, router advertisements, DHCP answers, scans, floods: none
    passes, and each is counted."""

    async def scenario() -> None:
        network = ns.network()
        limits = PolicyLimits(packets=50, connections=5)
        await hold(network, "t.web", egress="nat", peers="open", limits=limits)
        await hold(network, "t.other", peers="open")
        await network.open()
        port = await network.make_port("one", 0, ("t.web",))
        other = await network.make_port("two", 1, ("t.other",))
        peer = await network.make_port("three", 2, ("t.web",))
        gate = gate_of(port)
        for waiting in (other, peer):
            gate_of(waiting)
        mac = bytes.fromhex(PLAN.mac(0).replace(":", ""))
        advert = b"\x33\x33\0\0\0\x01" + mac + b"\x86\xdd" + bytes(60)
        lies = [
            arp(0, PLAN.gateway, ip=PLAN.gateway),
            arp(0, PLAN.gateway, ip=PLAN.ip(1)),
            arp(1, PLAN.gateway),
            echo(1, gate, "10.1.0.5", 1),
            advert,
            tagged(echo(1, gate, "10.1.0.5", 1)),
            tagged(arp(0, PLAN.gateway, ip=PLAN.gateway)),
            tagged(tagged(echo(0, gate, "10.1.0.5", 1))),
        ]
        for frame in lies:
            send(port, frame)
        send(port, datagram(0, b"\xff" * 6, "255.255.255.255", 67, 68))
        for target in (1, 3, 4):
            send(port, arp(0, PLAN.ip(target)))
        await asyncio.sleep(1.1)  # the limit's second
        counted = await dropped(network, "t.web")
        assert counted["spoofed"] == len(lies) and counted["dhcp"] == 1
        assert counted["peers"] >= 3, "each scanned address was kept from the other tenant's port"
        assert not received(other, 0.2)
        assert {frame[6:12] for frame in received(peer, 0.2)} <= {mac, gate}
        for number in range(300):
            send(port, syn(0, gate, "10.1.0.5", 80, 30000 + number))
        counted = await dropped(network, "t.web")
        assert counted["packets"] > 100 and counted["connections"] >= 1
        await network.close(remove=True)

    asyncio.run(scenario())


def test_published_ports(ns: Namespace, world: Namespace) -> None:
    """A port of the host leads to a clone; without the policy's word for it, it is closed."""

    async def scenario() -> None:
        network = ns.network()
        await hold(network, "t.web", publish=("8080:80",))
        await network.open()
        port = await network.make_port("one", 0, ("t.web",))
        gate_of(port)
        await network.publish({("tcp", 8080): (PLAN.ip(0), 80)})
        knock = (
            "import socket; s = socket.socket(); s.settimeout(0.5); "
            "s.connect_ex(('192.0.2.1', 8080))"
        )
        command = ["ip", "netns", "exec", world.name, sys.executable, "-c", knock]
        with subprocess.Popen(command) as outside:  # noqa: ASYNC220
            assert heard(port, "192.0.2.2", 5)
            outside.kill()
        await network.publish({})
        assert "8080" not in ns.run("nft", "list", "map", "ip", "templated_templated0", "published")
        await network.close(remove=True)

    asyncio.run(scenario())


def test_a_daemon_that_comes_back_and_a_flushed_table(ns: Namespace, world: Namespace) -> None:
    """Ports of an earlier daemon keep their policy; tables that somebody deleted come back with
    the next change; rules of others stay as they are."""

    async def scenario() -> None:
        foreign = "table inet theirs { chain c { type filter hook forward priority 5; }; }"
        ns.run("nft", foreign)
        theirs = json.loads(ns.run("nft", "-j", "list", "table", "inet", "theirs"))
        first = ns.network()
        await hold(first, "t.web", egress="nat")
        await first.open()
        await first.make_port("one", 0, ("t.web",))
        await first.close(remove=False)
        second = ns.network()
        await hold(second, "t.web", egress="nat")
        await second.open({"one": PortOwner(0, ("t.web",))})
        assert PLAN.ip(0) in ns.run("nft", "list", "table", "ip", "templated_templated0")
        for family in ("ip", "bridge"):
            ns.run("nft", "delete", "table", family, "templated_templated0")
        await second.make_port("two", 1, ("t.web",))
        rules = ns.run("nft", "list", "ruleset")
        assert PLAN.ip(0) in rules and PLAN.ip(1) in rules
        assert json.loads(ns.run("nft", "-j", "list", "table", "inet", "theirs")) == theirs
        await second.close(remove=True)
        assert ns.run("nft", "list", "tables").strip() == "table inet theirs"

    asyncio.run(scenario())


@contextlib.contextmanager
def without_nft(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No program is found."""
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        yield


def test_a_refused_transaction_leaves_nothing(
    ns: Namespace, world: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What held before holds, also in what the daemon believes."""

    async def scenario() -> None:
        network = ns.network()
        await hold(network, "t.web", egress="none")
        await network.open()
        await network.make_port("one", 0, ("t.web",))
        before = ns.run("nft", "-s", "list", "ruleset")
        with without_nft(monkeypatch), pytest.raises(HostError, match="nft"):
            await hold(network, "t.web", egress="nat")
        assert ns.run("nft", "-s", "list", "ruleset") == before
        ns.run("nft", "flush", "ruleset")
        with without_nft(monkeypatch), pytest.raises(HostError, match="nft"):
            await network.make_port("two", 1, ("t.web",))
        assert "tptwo" not in ns.links()
        await hold(network, "t.web", egress="nat")
        assert "masquerade" in ns.run("nft", "list", "ruleset")
        await network.close(remove=True)

    asyncio.run(scenario())


def test_a_port_moves_to_the_group_of_a_function(ns: Namespace, world: Namespace) -> None:
    """The closest group that has a policy holds; one that comes or goes takes its ports along,
    counters of others stay, and nothing stays of a group that is gone."""
    function = f"f.{'t' * 49}.{'F' * 64}"

    async def scenario() -> None:
        network = ns.network()
        await hold(network, "t.web", egress="none")
        await network.open()
        before = ns.run("nft", "-s", "list", "ruleset")
        port = await network.make_port("one", 0, ("t.web",))
        peer = await network.make_port("two", 1, ("t.web",))
        gate = gate_of(port)
        gate_of(peer)
        flow = Flow(IPv4Address("10.1.0.5"), "icmp", None, "out0")
        assert not reaches(port, gate, flow, 1)
        await network.move_port("one", (function, "t.web"))
        assert not reaches(port, gate, flow, 2), "the function says nothing: as its template"
        await hold(network, function, egress="nat", peers="open")
        assert reaches(port, gate, flow, 3)
        assert not reaches(peer, gate, flow, 3)
        counted = await network.counters()
        assert counted["t.web"]["egress"].packets >= 4 and counted[function]["sent"].packets
        send(port, arp(0, PLAN.gateway, ip=PLAN.gateway))
        assert (await network.counters())[function]["spoofed"].packets == 1
        await network.move_port("two", (function, "t.web"))
        send(port, arp(0, PLAN.ip(1)))
        assert received(peer, 0.3), "both are of the function, which lets peers in"
        await network.set_policies({function: None})
        assert not reaches(port, gate, flow, 4)
        await network.drop_port("one")
        await network.drop_port("two")
        assert ns.run("nft", "-s", "list", "ruleset") == before
        with pytest.raises(HostError, match="no port"):
            await network.move_port("one", ("t.web",))
        await network.close(remove=True)

    asyncio.run(scenario())


def test_ports_that_had_no_policy_and_get_one_of_a_function(
    ns: Namespace, world: Namespace
) -> None:
    """The template says nothing: the host forwards as ever, until a function's policy holds."""

    async def scenario() -> None:
        network = ns.network()
        await hold(network, "f.web.shut", egress="none", peers="open")
        await network.open()
        port = await network.make_port("one", 0, ("t.web",))
        gate, flow = gate_of(port), Flow(IPv4Address("10.1.0.5"), "icmp", None, "out0")
        assert reaches(port, gate, flow, 1)
        assert ns.links()["tpone"]["linkinfo"]["info_slave_data"]["isolated"] is True
        await network.move_port("one", ("f.web.shut", "t.web"))
        assert not reaches(port, gate, flow, 2)
        assert ns.links()["tpone"]["linkinfo"]["info_slave_data"]["isolated"] is False
        await network.set_policies({"f.web.shut": None})
        assert ns.links()["tpone"]["linkinfo"]["info_slave_data"]["isolated"] is True
        assert reaches(port, gate, flow, 3)
        assert ns.run("nft", "list", "ruleset").strip() == ""
        await network.close(remove=True)

    asyncio.run(scenario())


def test_a_move_finds_the_tables_gone(ns: Namespace, world: Namespace) -> None:
    """They come back whole, with the port where it belongs."""

    async def scenario() -> None:
        network = ns.network()
        await hold(network, "t.web", egress="none")
        await hold(network, "f.web.a", egress="nat")
        await network.open()
        port = await network.make_port("one", 0, ("t.web",))
        gate, flow = gate_of(port), Flow(IPv4Address("10.1.0.5"), "icmp", None, "out0")
        ns.run("nft", "flush", "ruleset")
        await network.move_port("one", ("f.web.a", "t.web"))
        assert reaches(port, gate, flow, 1)
        await network.close(remove=True)
        assert ns.run("nft", "list", "ruleset").strip() == ""

    asyncio.run(scenario())
