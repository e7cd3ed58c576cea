"""Policies of functions on real virtual machines, and the first connection that one opens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.harness import Daemon
from tests.real.test_bridge import ip
from tests.real.test_bridge import namespace as namespace
from tests.real.test_functions import invoke, until

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
]
# One try, as the code is loaded: nothing of the guest's start comes after it was handed out.
APP = """
import socket

try:
    socket.create_connection(("192.0.2.2", 8000), 5).close()
    first = "connected"
except OSError as error:
    first = str(error)


def handler(event, context):
    if event is None:
        return first
    try:
        socket.create_connection(("192.0.2.2", 8000), 1).close()
        return "connected"
    except OSError as error:
        return str(error)
"""
SERVER = """
import socket
with socket.create_server(("192.0.2.2", 8000), backlog=100) as server:
    print("ready", flush=True)
    while True:
        server.accept()[0].close()
"""
TRIES = 1
"""By each path; `bench policy --connect` tries 100."""


@pytest.fixture
def world(namespace: str) -> Iterator[str]:
    """A network namespace with a server, which the host's reaches by a link of its own."""
    name = f"{namespace}-w"
    ip("netns", "add", name)
    try:
        ip("-n", namespace, "link", "add", "out0", "type", "veth", "peer", "far0", "netns", name)
        for place, link, address in ((namespace, "out0", 1), (name, "far0", 2)):
            ip("-n", place, "addr", "add", f"192.0.2.{address}/24", "dev", link)
            ip("-n", place, "link", "set", link, "up")
        ip("netns", "exec", namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", SERVER]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == "ready\n"
                yield name
            finally:
                server.kill()
    finally:
        ip("netns", "del", name)


@pytest.fixture
def walled(copied: Daemon, namespace: str, tmp_path: Path) -> Daemon:
    """A daemon whose template has no policy, with a function that calls the server."""
    copied.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": namespace}
    copied.start()
    (tmp_path / "app.py").write_text(APP)
    return copied


def deploy(daemon: Daemon, code: Path, *options: str) -> None:
    words = ("--code", str(code), "--handler", "app.handler", "--now", *options)
    daemon.cli("function", "deploy", "dial", *words)


def test_a_function_has_a_policy_of_its_own(walled: Daemon, world: str, tmp_path: Path) -> None:
    """From its deploy on, changed under an instance that runs, over a restart, and gone with it."""

    def rules() -> str:
        return ip("netns", "exec", str(walled.config["network"]["netns"]), "nft", "list", "ruleset")

    assert "no egress acme" in walled.fails(
        *("function", "deploy", "dial", "--code", str(tmp_path), "--handler", "app.handler"),
        *("--egress", "acme"),
    )
    assert walled.json("function", "ls") == [] and rules().strip() == ""
    deploy(walled, tmp_path, "--egress", "none")
    assert invoke(walled, "dial") != {"payload": "connected"}
    answer = invoke(walled, "dial", "again")
    assert answer["payload"] != "connected"
    clone = answer["instance"]
    traced = walled.json("net", "trace", clone, "192.0.2.2:8000")
    assert not traced["passes"] and traced["policy"] == "function dial"
    view = walled.json("net", "show", "dial")
    assert (view["egress"], view["template"]) == ("none", "python-fn")
    assert view["dropped"]["egress"] > 0

    options = ("--egress", "nat", "--allow", "192.0.2.2:8000", "--limit", "connections=100")
    walled.cli("function", "network", "dial", *options)
    answer = invoke(walled, "dial", "again")
    assert (answer["instance"], answer["payload"]) == (clone, "connected"), "no restart"
    assert walled.json("net", "trace", clone, "192.0.2.2:8000")["passes"]
    assert "10.99.0." in rules() and walled.json("net", "show", clone)["name"] == "dial"
    walled.stop()
    walled.start()
    assert invoke(walled, "dial")["payload"] == "connected"
    assert walled.json("function", "show", "dial")["network"]["allow"] == ["192.0.2.2:8000"]
    walled.cli("function", "network", "dial", "--reset")
    assert rules().strip() == "", "nobody has a policy any more"
    walled.cli("function", "network", "dial", "--egress", "none")
    walled.cli("function", "rm", "dial")
    until(lambda: walled.json("net", "ls") == [], "its policy goes with its last instance")
    assert rules().strip() == "" and walled.json("ls") == []


def test_the_first_connection(walled: Daemon, world: str, tmp_path: Path) -> None:
    """A function that connects the moment its clone is handed out succeeds at the first try, by
    every path, though its port was under no such policy while it waited."""
    deploy(walled, tmp_path, "--egress", "nat", "--allow", "192.0.2.2:8000")
    found: dict[str, list[Any]] = {}
    for path in ("warm", "standby", "direct"):
        sizes = {tier: "1" if tier == path else "0" for tier in ("warm", "standby")}
        for number in range(TRIES):
            words = [word for tier, size in sizes.items() for word in (f"--{tier}", size)]
            walled.cli("pool", "set", "python-fn", *words, "--wait", "--timeout", "120")
            # Of a version that had requests before, the daemon would keep an instance ready.
            deploy(walled, tmp_path, "--env", f"TRY={path}{number}")
            version = walled.json("function", "publish", "dial")["version"]
            answer = invoke(walled, f"dial:{version}")
            assert answer["start"] == ("direct" if path == "direct" else "pool")
            found.setdefault(path, []).append(answer["payload"])
            walled.cli("rm", answer["instance"])
    assert found == {path: ["connected"] * TRIES for path in ("warm", "standby", "direct")}
