"""Clones on a real bridge, in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.real.harness import Daemon

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]
HOOK = """#!/usr/bin/python3
import socket, time
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"early", ("10.99.0.1", 9))
time.sleep(1)
sent = open("/sys/class/net/eth0/statistics/tx_packets").read().strip()
open("/run/hook", "w").write(f"{sent} {time.time()}")
"""
BAKE = f"""
import os, pathlib
hook = pathlib.Path("/etc/templated/identity.d/10-test")
hook.parent.mkdir(parents=True, exist_ok=True)
hook.write_text({HOOK!r})
hook.chmod(0o755)
"""
CAPTURE = """
import socket, time
frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
print("ready", flush=True)
while True:
    frame = frames.recv(2048)
    print(frame[6:12].hex(":"), time.time(), flush=True)
"""


def ip(*arguments: str) -> str:
    """Run `ip`."""
    return subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=True, timeout=30
    ).stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace that is gone afterwards."""
    name = f"templated-test-{os.getpid()}"
    ip("netns", "add", name)
    try:
        yield name
    finally:
        ip("netns", "del", name)


def test_clones_on_a_bridge(fresh: Daemon, namespace: str) -> None:
    """Each answers at its own address with its own MAC; the template's MAC is never seen."""
    links = ip("-o", "link")
    fresh.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": namespace}
    fresh.start()
    fresh.build()
    clones = fresh.json("clone", "b", "--count", "3")
    for clone in clones:
        address = clone["identity"]["ip"]
        ping = ["netns", "exec", namespace, "ping", "-c", "1", "-W", "5", address]
        if os.path.exists("/bin/ping") or os.path.exists("/usr/bin/ping"):
            ip(*ping)
        else:  # any packet makes the kernel ask for the MAC
            probe = f"import socket; socket.create_connection(('{address}', 9), 2)"
            command = ["ip", "netns", "exec", namespace, "python3", "-c", probe]
            subprocess.run(command, capture_output=True, timeout=30, check=False)
        neighbours = ip("-n", namespace, "neigh", "show", address)
        assert clone["identity"]["mac"] in neighbours
    known = ip("netns", "exec", namespace, "bridge", "fdb", "show", "br", "templated0")
    guests = {clone["identity"]["mac"] for clone in clones}
    learned = {
        line.split()[0]
        for line in known.splitlines()
        if " master " in line and "permanent" not in line
    }
    assert learned <= guests
    fresh.cli("rm", "--all", "--yes")
    fresh.stop()
    left = [line for line in ip("-n", namespace, "-o", "link").splitlines() if ": tp" in line]
    assert left == [] and ip("-o", "link") == links


@pytest.mark.long
def test_a_generation_of_user_mode_serves_a_bridge(fresh: Daemon, namespace: str) -> None:
    """A saved state has nothing of the network that the base VM was on."""
    fresh.start()
    fresh.build()
    fresh.stop()
    fresh.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": namespace}
    fresh.start()
    clone = fresh.json("clone", "moved")
    assert clone["identity"]["ip"].startswith("10.99.0.")
    assert clone["identity"]["mac"] in fresh.cli(
        "exec", "moved", "--", "ip", "link", "show", "eth0"
    )


def test_nothing_passes_before_a_guest_has_confirmed(fresh: Daemon, namespace: str) -> None:
    """A hook sends while its guest is being identified: the guest sees it go, the bridge does not.

    The guest's NIC has no link status (it costs a guest milliseconds to take note of it): QEMU
    drops what comes before `set_link`.
    """
    fresh.variant(
        "early",
        "probes:",
        "  - name: hook",
        "    type: exec",
        f"    command: [python3, -c, {json.dumps(BAKE)}]",
        without_probes=True,
    )
    fresh.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": namespace}
    fresh.start()
    fresh.build("early")
    command = ["ip", "netns", "exec", namespace, sys.executable, "-u", "-c", CAPTURE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as capture:
        try:
            assert capture.stdout is not None and capture.stdout.readline() == "ready\n"
            mac = fresh.json("clone", "a")["identity"]["mac"]
            sent, confirmed = fresh.cli("exec", "a", "--", "cat", "/run/hook").split()
            # The kernel in the guest asks for the gateway's MAC again and again.
            time.sleep(3)
        finally:
            capture.kill()
            seen = capture.stdout.read().splitlines() if capture.stdout else []
    times = [float(when) for source, when in map(str.split, seen) if source == mac]
    assert int(sent) >= 1
    # The guest's clock may be 0.1 s off.
    assert times and min(times) > float(confirmed) - 0.2


WALLED = "network: {egress: none, limits: {packets: 1000}}"
OPEN = "network: {egress: nat, peers: open, allow: [10.9.0.0/16:80], publish: ['8080:80']}"


def test_a_policy_holds_and_changes(fresh: Daemon, namespace: str) -> None:
    """From the build on, live by `net apply`, over a killed daemon, and gone with its template."""

    def rules() -> str:
        return ip("netns", "exec", namespace, "nft", "list", "ruleset")

    def reached(name: str, address: str) -> bool:
        return fresh.run("exec", name, "--", "ping", "-c", "1", "-W", "2", address).returncode == 0

    ip("netns", "exec", namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    fresh.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": namespace}
    fresh.variant("walled", WALLED)
    fresh.start()
    assert "there is no egress acme" in _refused(fresh, "network: {egress: acme}")
    assert "own subnet" in _refused(fresh, "network: {egress: nat, allow: [10.99.0.7]}")
    fresh.variant("walled", WALLED)
    fresh.build("walled")
    one, two = fresh.json("clone", "w", "--count", "2", "--template", "walled")
    other = two["identity"]["ip"]
    assert reached("w-1", "10.99.0.1") and not reached("w-1", other)
    traced = fresh.json("net", "trace", "w-1", other)
    assert not traced["passes"] and traced["steps"][-1]["counter"] == "peers"
    assert fresh.json("net", "show", "w-1")["dropped"]["peers"] > 0
    assert fresh.cli("net", "trace", "w-1", "10.99.0.1:22").endswith("dropped\n")

    fresh.variant("walled", OPEN)
    fresh.cli("net", "apply", "walled")
    # The guest's kernel remembers for a moment that the neighbour did not answer.
    assert any(reached("w-1", other) for _ in range(5))
    assert fresh.json("net", "trace", "w-1", other)["passes"]
    view = fresh.json("net", "show", "walled")
    assert (view["egress"], view["peers"]) == ("nat", "open")
    assert view["published"] == {"8080:80/tcp": "w-1"}
    fresh.stop(signal.SIGKILL)
    assert one["identity"]["ip"] in rules()
    fresh.start()
    assert any(reached("w-1", other) for _ in range(5))
    assert one["identity"]["mac"] in rules()
    fresh.cli("rm", "w-1")
    assert fresh.json("net", "show", "walled")["published"] in ({}, {"8080:80/tcp": "w-2"})
    fresh.cli("rm", "--all", "--yes")
    fresh.cli("template", "rm", "walled")
    assert rules().strip() == "" and fresh.json("net", "ls") == []


def _refused(daemon: Daemon, network: str) -> str:
    daemon.variant("walled", network)
    return daemon.fails("template", "build", "walled")
