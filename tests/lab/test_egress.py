"""Forwarders of an egress as units: in a sandbox of their own, and apart from the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab.product import TEMPLATES, Product

pytestmark = pytest.mark.lab
FIXED = "172.20.0.100"
# A VPC with one server, which answers with the address that it sees.
VPC = """
ip netns add vpc
ip link add vpc0 type veth peer name eth0 netns vpc
ip link set vpc0 up
ip -n vpc address add 172.20.0.1/16 dev eth0
ip -n vpc link set eth0 up
sysctl -qw net.ipv4.ip_forward=1
systemd-run --quiet --unit=vpc ip netns exec vpc python3 -c '
import socket
with socket.create_server(("172.20.0.1", 7)) as server:
    while True:
        connection, peer = server.accept()
        connection.sendall(peer[0].encode())
        connection.close()
'
"""
GONE = "systemctl stop vpc; ip netns del vpc; sysctl -qw net.ipv4.ip_forward=0"
CREATE = (
    *("egress", "create", "acme", "--interface", "vpc0", "--address", f"{FIXED}/16"),
    *("--gateway", "172.20.0.1", "--to", "172.20.0.0/16"),
)
ASK = """
import socket
with socket.create_connection(("172.20.0.1", 7), 10) as connection:
    print(connection.recv(64).decode())
"""
UNITS = [f"templated-forwarder@acme-{number}.service" for number in (1, 2)]
# All that an egress has of the host, beside its rows: nothing without one.
HELD = """
ip -o link | grep ': tl'
ip rule | grep fwmark
ip route show table all proto 84
nft list tables netdev
systemctl --plain --no-legend --all list-units 'templated-forwarder@*'
ls /run/templated/egress
true
"""
TEMPLATE = f"{TEMPLATES}/python-fn.yaml"


@pytest.fixture
def bridged(host: Product) -> Iterator[Product]:
    """The product in bridge mode, beside a VPC that is joined to the host by `vpc0`."""
    host.lab.do(VPC)
    try:
        host.configure(network={"mode": "bridge"})
        yield host
    finally:
        host.cli("rm", "--all", "--yes")
        host.lab.do(f"cp /opt/templated/templates/python-fn.yaml {TEMPLATE}")
        host.cli("net", "apply", "python-fn")
        host.lab.run("templated egress rm acme")
        host.configure()
        host.lab.run(
            f"{GONE}; ip link del templated0; nft delete table ip templated_templated0;"
            " nft delete table bridge templated_templated0"
        )


def test_units(bridged: Product) -> None:
    """They serve a clone, stay when the daemon restarts, and are started again when killed."""
    view = bridged.json(*CREATE)
    pids = main_pids(bridged)
    bridged.lab.do(f"echo 'network: {{egress: acme}}' >>{TEMPLATE}")
    bridged.cli("net", "apply", "python-fn")
    bridged.clone("c")
    assert seen(bridged) == FIXED
    bridged.lab.do("systemctl restart templated")
    view = until(bridged, both)
    assert main_pids(bridged) == pids

    active = view["active"]
    bridged.lab.do(f"kill -KILL {pids[active - 1]}")
    until(bridged, lambda view: view["active"] == 3 - active)
    assert seen(bridged) == FIXED
    until(bridged, both)
    now = main_pids(bridged)
    assert now[active - 1] != pids[active - 1] and now[2 - active] == pids[2 - active]

    bridged.cli("rm", "c")
    bridged.lab.do(f"sed -i '/^network:/d' {TEMPLATE}")
    bridged.cli("net", "apply", "python-fn")
    bridged.cli("egress", "rm", "acme")
    assert bridged.lab.do(HELD) == ""
    assert bridged.lab.do("systemctl --failed --plain --no-legend") == ""


def seen(host: Product) -> str:
    """The address that the server sees of a clone."""
    return host.cli("exec", "c", "--", "python3", "-c", ASK).strip()


def main_pids(host: Product) -> list[int]:
    """The units' processes; both are active."""
    host.lab.do(f"systemctl is-active {' '.join(UNITS)}")
    return [int(host.lab.do(f"systemctl show --value -p MainPID {unit}")) for unit in UNITS]


def until(host: Product, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The view of the egress once `what` holds of it."""
    deadline = time.monotonic() + 120
    while not what(view := host.json("egress", "show", "acme")):
        assert time.monotonic() < deadline, f"{view}\n{host.log()[-2000:]}"
        time.sleep(0.5)
    return dict(view)


def both(view: dict[str, Any]) -> bool:
    """Whether one serves, and the other could."""
    return sorted(one["role"] for one in view["forwarders"]) == ["active", "standby"]
