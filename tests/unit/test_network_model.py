"""The section `network:` and the plan of addresses."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest

from templated.drivers.network import Port, make_network
from templated.drivers.network.user import SlirpNetwork
from templated.errors import InvalidRequest
from templated.model.network import (
    AddressPlan,
    BridgeNetwork,
    Forward,
    NetworkConfig,
    Slirp,
    UserNetwork,
)

SUBNETS = ["10.0.0.0/8", "10.77.0.0/16", "192.168.7.0/24", "172.16.3.128/25", "10.1.2.248/29"]


def decode(section: dict[str, Any]) -> NetworkConfig:
    config: NetworkConfig = msgspec.convert(section, type=NetworkConfig)
    return config


def indexes(plan: AddressPlan) -> list[int]:
    """All of a small plan, or a spread with both ends of a large one."""
    step = max(1, plan.capacity // 997)
    return sorted({*range(0, plan.capacity, step), plan.capacity - 1})


def test_the_mode_chooses_the_struct() -> None:
    assert decode({"mode": "user"}) == UserNetwork()
    bridge = decode({"mode": "bridge", "bridge": "br-x", "nat": True, "netns": "lab"})
    assert bridge == BridgeNetwork(bridge="br-x", nat=True, netns="lab")
    assert msgspec.to_builtins(bridge)["mode"] == "bridge"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "mode"),
        ({"mode": "macvtap"}, "macvtap"),
        ({"mode": "user", "bridge": "b0"}, "bridge"),
        ({"mode": "user", "subnet": "10.77.0.1/16"}, "host bits"),
        ({"mode": "user", "subnet": "10.77.0.0/30"}, "/8 to /29"),
        ({"mode": "user", "subnet": "10.0.0.0/7"}, "not an IPv4 network|/8 to /29"),
        ({"mode": "user", "subnet": "10.999.0.0/16"}, "not an IPv4 network"),
        ({"mode": "user", "subnet": "fd00::/16"}, "subnet"),
        ({"mode": "bridge", "subnet": "127.0.0.0/8"}, "cannot have"),
        ({"mode": "bridge", "subnet": "224.0.0.0/8"}, "cannot have"),
        ({"mode": "bridge", "subnet": "0.0.0.0/8"}, "cannot have"),
        ({"mode": "bridge", "bridge": "sixteen-letters0"}, "bridge"),
        ({"mode": "bridge", "bridge": "a b"}, "bridge"),
        ({"mode": "bridge", "bridge": "-b"}, "bridge"),
        ({"mode": "bridge", "netns": "../1/ns/net"}, "netns"),
        ({"mode": "bridge", "nat": True, "host_address": False}, "host_address"),
    ],
)
def test_a_bad_section_is_named(section: dict[str, Any], says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says):
        decode(section)


@pytest.mark.parametrize("subnet", SUBNETS)
def test_every_index_has_its_own_usable_address(subnet: str) -> None:
    plan, network = AddressPlan(subnet, b"host"), ipaddress.IPv4Network(subnet)
    taken = {str(network[0]), str(network[1]), str(network[2]), str(network[-1])}
    assert plan.capacity == network.num_addresses - len(taken)
    chosen = indexes(plan)
    addresses = [plan.ip(index) for index in chosen]
    assert [plan.index(address) for address in addresses] == chosen
    assert len(set(addresses)) == len(chosen)
    assert not taken & set(addresses)
    assert all(ipaddress.IPv4Address(address) in network for address in addresses)


@pytest.mark.parametrize("subnet", SUBNETS)
def test_every_index_has_its_own_unicast_mac(subnet: str) -> None:
    plan = AddressPlan(subnet, b"host")
    macs = [bytes.fromhex(plan.mac(index).replace(":", "")) for index in indexes(plan)]
    assert len(set(macs)) == len(macs)
    assert {len(mac) for mac in macs} == {6}
    # bit 0 of the first byte is multicast, bit 1 locally administered
    assert {mac[0] & 3 for mac in macs} == {2}
    assert [int.from_bytes(mac[3:], "big") for mac in macs] == indexes(plan)


def test_a_small_plan_in_full() -> None:
    plan = AddressPlan("10.1.2.248/29", b"host")
    assert (plan.gateway, plan.dns, plan.prefix, plan.capacity) == (
        "10.1.2.249",
        "10.1.2.250",
        29,
        4,
    )
    assert [plan.ip(i) for i in range(4)] == [f"10.1.2.{i}" for i in (251, 252, 253, 254)]


@pytest.mark.parametrize("index", [-1, 4, 1 << 32])
def test_an_index_out_of_range_has_no_address(index: int) -> None:
    plan = AddressPlan("10.1.2.248/29", b"host")
    with pytest.raises(ValueError, match="no address"):
        plan.ip(index)
    with pytest.raises(ValueError, match="no address"):
        plan.mac(index)


@pytest.mark.parametrize(
    "address", ["10.1.2.248", "10.1.2.250", "10.1.2.255", "10.1.3.0", "9.9.9.9"]
)
def test_an_address_of_no_clone_has_no_index(address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        AddressPlan("10.1.2.248/29", b"host").index(address)


def test_macs_depend_on_the_host_alone() -> None:
    one, same = (AddressPlan("10.77.0.0/16", b"one") for _ in range(2))
    other = AddressPlan("10.77.0.0/16", b"other")
    assert one.mac(7) == same.mac(7) == AddressPlan("10.78.0.0/16", b"one").mac(7)
    assert one.mac(7) != other.mac(7)
    assert one.mac(7).startswith("02:") and one.mac(7).endswith(":00:00:07")


def test_slirp() -> None:
    plan = AddressPlan("10.77.0.0/16", b"host")
    network = make_network(UserNetwork(), plan, "lab")
    assert isinstance(network, SlirpNetwork)
    attached = network.attach(Port("a"), 0)
    assert attached == Slirp("10.77.0.0/16", "10.77.0.1", "10.77.0.2", "10.77.0.3", restrict=True)
    forwards = (Forward(80, 8080), Forward(53, 0, "127.0.0.2", "udp"))
    attached = SlirpNetwork(UserNetwork(restrict=False), plan).attach(Port("a"), 256, forwards)
    assert (attached.address, attached.restrict, attached.forwards) == (
        "10.77.1.3",
        False,
        forwards,
    )


@pytest.mark.parametrize(
    "forward",
    [
        Forward(80, 8080, "1.2.3.4,smb=/"),
        Forward(80, 8080, "::1"),
        Forward(0, 1),
        Forward(1, 65536),
    ],
)
def test_a_bad_forward_never_reaches_the_command_line(forward: Forward) -> None:
    network = SlirpNetwork(UserNetwork(), AddressPlan("10.77.0.0/16", b"host"))
    with pytest.raises(InvalidRequest, match="forward"):
        network.attach(Port("a"), 0, [forward])
