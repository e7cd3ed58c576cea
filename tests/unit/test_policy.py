"""Policies: what people write, what comes of it, and what is refused with which words."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.drivers.network import nft
from templated.errors import InvalidRequest, NotFound
from templated.model.network import BridgeNetwork, Exit, UserNetwork
from templated.model.policy import (
    Allowed,
    Policy,
    PolicyKeys,
    PolicyLimits,
    Published,
    networks,
    parse_target,
    policy_of,
)
from templated.model.rules import REASONS, Flow, judge, reaching
from templated.model.spec import NetworkSpec, TemplateSpec, stored
from templated.model.trace import Place, trace
from templated.services.daemon import Services
from tests.unit.fake_daemon import play

BRIDGE = BridgeNetwork()
SEGMENT = nft.Segment("templated0", "10.78.0.0/16", "10.78.0.1", nat=False)


def keys(**said: Any) -> PolicyKeys:
    return msgspec.convert(said, PolicyKeys)


def policy(**said: Any) -> Policy:
    found = policy_of(keys(**said), BRIDGE)
    assert found is not None
    return found


def test_what_is_not_said() -> None:
    """No key, no policy; what is left out is as the daemon has it for all."""
    assert policy_of(PolicyKeys(), BRIDGE) is None
    assert policy(peers="isolated") == Policy()
    daemon = BridgeNetwork(nat=True, isolate=False)
    assert policy_of(keys(limits={}), daemon) == Policy(egress="nat", peers=True)
    assert policy_of(keys(egress="none", peers="isolated"), daemon) == Policy()


def test_all_that_can_be_said() -> None:
    said = policy(
        egress="acme",
        allow=["10.1.0.0/16", "10.2.0.1:443", "10.2.0.2:53/udp"],
        peers="open",
        publish=["8080:80", "53:5353/udp"],
        limits={"bandwidth": "10MiB", "packets": 1000, "connections": 50},
    )
    assert said.egress == "acme" and said.peers
    assert [str(one) for one in said.allow] == [
        "10.1.0.0/16",
        "10.2.0.1/32:443/tcp",
        "10.2.0.2/32:53/udp",
    ]
    assert said.publish == (Published(8080, 80), Published(53, 5353, "udp"))
    assert (said.bandwidth, said.packets, said.connections) == (10 << 20, 1000, 50)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"egress": "nat", "allow": ["10.78.3.0/24"]}, "clones' own subnet 10.78.0.0/16"),
        ({"egress": "nat", "allow": ["10.78.0.0/16:80"]}, "clones' own subnet"),
        ({"egress": "nat", "allow": ["169.254.169.254"]}, "169.254.0.0/16, which no clone"),
        ({"egress": "nat", "allow": ["100.100.100.200/32:80"]}, "which no clone"),
        ({"egress": "nat", "allow": ["127.0.0.1"]}, "127.0.0.0/8"),
        ({"egress": "nat", "allow": ["10.1.2.3/16"]}, "host bits"),
        ({"egress": "nat", "allow": ["10.1.0.0/33"]}, "10.1.0.0/33"),
        ({"egress": "nat", "allow": ["10.1.0.0/16:0"]}, "1 to 65535"),
        ({"egress": "nat", "allow": ["10.1.0.0/16:80/icmp"]}, "no CIDR"),
        ({"egress": "nat", "allow": ["example.org"]}, "no CIDR"),
        ({"egress": "none", "allow": ["10.1.0.0/16"]}, "no use with egress: none"),
        ({"allow": ["10.1.0.0/16"]}, "no use with egress: none"),
        ({"publish": ["80"]}, "no HOSTPORT:PORT"),
        ({"publish": ["0:80"]}, "1 to 65535"),
        ({"publish": ["80:1", "80:2"]}, "80/tcp twice"),
    ],
)
def test_what_is_refused(said: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        policy(**said)


def test_networks_that_no_policy_can_hold() -> None:
    """User mode, and a bridge without the host's address, each by its name."""
    with pytest.raises(InvalidRequest, match=r"network\.egress needs a network of mode bridge"):
        policy_of(keys(egress="none"), UserNetwork())
    with pytest.raises(InvalidRequest, match="host_address is false"):
        policy_of(keys(egress="nat"), BridgeNetwork(host_address=False))
    with pytest.raises(msgspec.ValidationError, match="libvirt"):
        msgspec.convert({"mode": "libvirt", "name": "default", "egress": "nat"}, NetworkSpec)


def test_a_template_without_a_policy_is_written_as_ever() -> None:
    plain = stored(TemplateSpec(name="t"))["network"]
    assert set(plain) == {"dns"}
    spec = TemplateSpec(name="t", network=NetworkSpec(limits=PolicyLimits(packets=10)))
    assert msgspec.convert(stored(spec), TemplateSpec) == spec


def test_what_a_function_says_comes_first() -> None:
    template = keys(egress="nat", peers="open")
    assert keys(egress="acme").over(template) == keys(egress="acme", peers="open")


def test_overlaps_are_one_network() -> None:
    """The kernel's sets take none."""
    said = policy(egress="nat", allow=["10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/16:80"])
    assert {key: list(map(str, nets)) for key, nets in networks(said.allow).items()} == {
        None: ["10.0.0.0/8"],
        ("tcp", 80): ["10.1.0.0/16"],
    }


def test_wide_networks_open_nothing_that_is_closed() -> None:
    rules = reaching(policy(egress="nat", allow=["0.0.0.0/0"]))
    for address, drop in (
        ("8.8.8.8", None),
        ("169.254.169.254", "denied"),
        ("127.0.0.1", "denied"),
    ):
        found = judge(rules, Flow(IPv4Address(address), "tcp", 80, "eth0"))
        assert found is not None and found.drop == drop


@pytest.mark.parametrize(
    ("text", "port", "protocol"),
    [("10.1.2.3", None, "icmp"), ("10.1.2.3:80", 80, "tcp"), ("10.1.2.3:53/udp", 53, "udp")],
)
def test_targets(text: str, port: int | None, protocol: str) -> None:
    assert parse_target(text) == (IPv4Address("10.1.2.3"), port, protocol)


@pytest.mark.parametrize("text", ["", "x", "10.1.2", "10.1.2.3:", "10.1.2.3:0", "10.1.2.3:1/sctp"])
def test_bad_targets(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_target(text)


def test_every_drop_has_a_counter() -> None:
    """No rule of a group drops a packet uncounted."""
    said = policy(
        egress="acme",
        allow=["10.1.0.0/16:80"],
        peers="open",
        publish=["80:80"],
        limits={"bandwidth": "1MiB", "packets": 100, "connections": 5},
    )
    script = nft.group_rules(SEGMENT, "t.web", said, [Exit("acme", 7, "eg0")])
    dropping = [line for line in script.splitlines() if line.endswith(" drop")]
    assert dropping and all('counter name "t.web.' in line for line in dropping)
    counted = {line.split('counter name "t.web.')[1].split('"')[0] for line in dropping}
    assert counted <= set(REASONS)


def test_rules_do_not_grow_with_clones() -> None:
    """A port is elements of maps and sets alone."""
    member = nft.Member("tpa", "02:00:00:00:00:01", "10.78.0.3", "t.web")
    found = set(nft.elements(SEGMENT, member))
    lines = nft.moved(SEGMENT, (), found).splitlines()
    assert len(lines) == len(found) and all(line.startswith("add element ") for line in lines)
    undone = nft.moved(SEGMENT, found, ()).splitlines()
    assert len(undone) == len(lines) and all(x.startswith("delete element ") for x in undone)


def test_trace_says_why() -> None:
    place = Place("templated0", "10.78.0.0/16", "10.78.0.1")
    said = policy(egress="acme", allow=["10.1.0.0/16:80"])
    to_port = Flow(IPv4Address("10.1.0.5"), "tcp", 81, "eg0")
    steps = trace(said, [Exit("acme", 7, "eg0")], place, to_port)
    assert [step.at for step in steps] == ["port", "route", "leave", "reach"]
    assert (steps[-1].passes, steps[-1].counter) == (False, "allow")
    missing = trace(said, [], place, to_port)
    assert (missing[-1].at, missing[-1].counter) == ("leave", "egress")
    allowed = Allowed(said.allow[0].network, 80)
    assert said.allow == (allowed,)
    passed = trace(said, [Exit("acme", 7, "eg0")], place, to_port._replace(port=80))
    assert passed[-1].passes and passed[-1].at == "egress"


def test_a_daemon_in_user_mode_refuses(tmp_path: Path) -> None:
    """Before a build, with the mode that is needed; and shows that there is no policy."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        with pytest.raises(InvalidRequest, match="mode bridge"):
            await running.context.policies.check("t", keys(egress="nat"))
        assert await running.nets.views() == []
        with pytest.raises(NotFound, match="has no network policy"):
            await running.nets.view("t")

    play(tmp_path, scenario)
