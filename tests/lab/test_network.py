"""Bridge mode under the unit: taps and nft inside its sandbox, and a way out by `nat`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.product import Product

pytestmark = pytest.mark.lab
# A network beyond the lab: it has no way back to the clones' subnet, so that only what is
# masqueraded is answered. It answers with the address that it sees.
OUTSIDE = """
ip netns add outside
ip link add out0 type veth peer name in0 netns outside
ip address add 192.0.2.1/24 dev out0
ip link set out0 up
ip -n outside address add 192.0.2.2/24 dev in0
ip -n outside link set in0 up
ip -n outside link set lo up
sysctl -qw net.ipv4.ip_forward=1
systemd-run --quiet --unit=outside ip netns exec outside python3 -c '
import socket
with socket.create_server(("192.0.2.2", 7)) as server:
    while True:
        connection, peer = server.accept()
        connection.sendall(peer[0].encode())
        connection.close()
'
for _ in $(seq 100); do (: </dev/tcp/192.0.2.2/7) 2>/dev/null && exit 0; sleep 0.2; done
exit 1
"""
GONE = "systemctl stop outside; ip netns del outside; sysctl -qw net.ipv4.ip_forward=0"
ASK = """
import socket
with socket.create_connection(("192.0.2.2", 7), 10) as connection:
    print(connection.recv(64).decode())
"""


@pytest.fixture
def bridged(host: Product) -> Iterator[Product]:
    """The product in bridge mode, with a network outside of the lab."""
    host.lab.do(OUTSIDE)
    try:
        host.configure(network={"mode": "bridge", "nat": True, "antispoof": True})
        yield host
        host.cli("rm", "--all", "--yes")
    finally:
        host.lab.run(GONE)
        host.configure()
        host.lab.do(
            "ip link del templated0; nft delete table ip templated_templated0;"
            " nft delete table bridge templated_templated0"
        )


@pytest.mark.parametrize(
    "paths", [("direct",), pytest.param(("warm", "direct", "cold"), marks=pytest.mark.long)]
)
def test_nat(bridged: Product, paths: tuple[str, ...]) -> None:
    """Clones of a pool and of none reach the network outside by the lab's address."""
    if "warm" in paths:
        bridged.cli("pool", "set", "python-fn", "--warm", "1", "--wait")
    clones = {}
    for path in paths:
        clones[path] = bridged.clone(path, "--path", path)["identity"]
        assert clones[path]["ip"].startswith("10.78.")
        assert bridged.cli("exec", path, "--", "python3", "-c", ASK).strip() == "192.0.2.1"
    # Its interfaces keep the addresses that the daemon gave them, whatever udev would like.
    for identity in clones.values():
        assert identity["mac"] in bridged.lab.do(f"ip neigh show {identity['ip']}")
    if len(paths) > 1:
        ping = f"templated exec warm -- ping -c 1 -w 3 {clones['direct']['ip']}"
        assert bridged.lab.run(ping).returncode != 0
    bridged.lab.do("systemctl restart templated")
    assert bridged.cli("exec", "direct", "--", "python3", "-c", ASK).strip() == "192.0.2.1"
