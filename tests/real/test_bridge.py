"""Clones on a real bridge, in a network namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.real.harness import Daemon

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]


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
