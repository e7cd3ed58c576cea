"""A stock Debian with systemd and qemu-ga: nothing of ours in it, and its clones share nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.conftest import prepare
from tests.real.harness import ROOT, Daemon
from tests.sample import ALL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces"),
    pytest.mark.timeout(1800),
]
TEMPLATES = ROOT / "templates"
_numbers = itertools.count()
# Reads an item per line, each by its name.
READ = """
show() { echo "$1=$2"; }
show hostname "$(hostname)"
show machine_id "$(cat /etc/machine-id)"
show boot_id "$(cat /proc/sys/kernel/random/boot_id)"
show uuid "$(cat /sys/class/dmi/id/product_uuid)"
set -- $(ip -o -4 addr show scope global)
show ip "${4%/*}"
show nic "$2"
show mac "$(cat /sys/class/net/$2/address)"
show link_local "$(ip -o -6 addr show dev $2 scope link | tr -s ' ' | cut -d ' ' -f 4)"
show route "$(ip route show default)"
show ed25519 "$(cat /etc/ssh/ssh_host_ed25519_key.pub)"
show ecdsa "$(cat /etc/ssh/ssh_host_ecdsa_key.pub)"
show keys "$(ls /etc/ssh/ssh_host_* | wc -l)"
show seed "$(cksum </var/lib/systemd/random-seed)"
show random "$(head -c 32 /dev/urandom | cksum)"
show kernel_uuid "$(cat /proc/sys/kernel/random/uuid)"
show leases "$(find /var/lib/dhcp /run/systemd/netif/leases -type f 2>/dev/null | wc -l)"
"""
DISTINCT = (
    *("hostname", "machine_id", "boot_id", "uuid", "ip", "mac", "link_local"),
    *("ed25519", "ecdsa", "seed", "random", "kernel_uuid"),
)


def read(host: Daemon, name: str) -> dict[str, str]:
    """What a guest knows of itself."""
    lines = host.output(name, "sh", "-c", READ).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def eventually(host: Daemon, name: str, command: str, wanted: str, seconds: float = 120) -> None:
    """Wait until a command in a guest prints `wanted`: services start in the background."""
    end = time.monotonic() + seconds
    while (seen := host.output(name, "sh", "-c", f"{command} || true")).strip() != wanted:
        assert time.monotonic() < end, f"{command}: {seen!r}"
        time.sleep(0.5)


class DebianDaemon(Daemon):
    """A daemon whose clones can be reached, in a network namespace of its own."""

    def __init__(self, netns: str, template: str) -> None:
        network = {"mode": "bridge", "subnet": "10.98.0.0/24", "netns": netns}
        super().__init__(network=network)
        self.netns, self.template_name = netns, template
        (self.templates / "python-fn.yaml").unlink()
        text = (TEMPLATES / f"{template}.yaml").read_text()
        (self.templates / f"{template}.yaml").write_text(text)

    def within(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the host beside the clones."""
        return subprocess.run(
            ["ip", "netns", "exec", self.netns, *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def started(image_store: Path, template: str, changes: dict[str, str]) -> Iterator[DebianDaemon]:
    """A daemon with the template built, for a fixture."""
    # Several are there at once: a fixture's, and that of a test with an image of its own.
    netns = f"templated-{template}-{next(_numbers)}-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", netns], check=True)
    daemon = DebianDaemon(netns, template)
    try:
        prepare(daemon, image_store)
        file = daemon.templates / f"{template}.yaml"
        text = file.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
        daemon.start()
        daemon.cli("template", "build", template, timeout=1500)
        yield daemon
    finally:
        daemon.close()
        subprocess.run(["ip", "netns", "del", netns], check=True)


@pytest.fixture(scope="module")
def debian(image_store: Path) -> Iterator[DebianDaemon]:
    """Debian 13, built once."""
    yield from started(image_store, "debian-13", {})


@pytest.fixture
def host(debian: DebianDaemon) -> Iterator[DebianDaemon]:
    """The shared daemon; a test leaves no clone."""
    yield debian
    debian.cli("rm", "--all", "--yes")
    assert debian.qemus() == []


def check(host: Daemon, clone: dict[str, Any], guest: dict[str, str]) -> None:
    """The guest agrees with what is told of its clone."""
    for key in ("mac", "ip", "hostname", "machine_id", "boot_id"):
        assert guest[key] == clone["identity"][key]
    assert guest["uuid"] == clone["uuid"]
    assert guest["route"].startswith("default via 10.98.0.1 ")
    assert guest["keys"] == "4", "an Ed25519 and an ECDSA key, and no other"
    assert guest["leases"] == "0"


def test_twenty_clones_share_nothing(host: DebianDaemon) -> None:
    """All items that a guest can show are distinct, and as the host says; six without all tests."""
    guests, parts = [], 10 if ALL in os.environ else 3
    for part in range(parts):
        clones = host.json("clone", f"d{part}", "--count", "2", timeout=600)
        for clone in clones:
            assert clone["path"] == "direct"
            guests.append(read(host, clone["name"]))
            check(host, clone, guests[-1])
        if part < parts - 1:
            host.cli("rm", *(clone["name"] for clone in clones))
    for item in DISTINCT:
        assert len({guest[item] for guest in guests}) == len(guests), item
        assert all(guest[item] for guest in guests), item
    name, machine_id = clones[0]["name"], clones[0]["identity"]["machine_id"]
    eventually(host, name, "systemctl is-active systemd-journald", "active")
    eventually(host, name, "ls /var/log/journal", machine_id)
    eventually(host, name, "systemctl is-active systemd-networkd", "active")
    eventually(host, name, "systemctl is-system-running", "running")
    # What manages the network agrees with what was set, also when it starts again.
    host.output(name, "systemctl", "restart", "systemd-networkd")
    eventually(host, name, "networkctl --no-legend list | grep -c configured", "1")
    again = read(host, name)
    for item in ("ip", "mac", "route", "link_local"):
        assert again[item].split() == guests[-2][item].split() or item == "route", item


def test_ssh_meets_its_own_host_key(host: DebianDaemon, tmp_path: Path) -> None:
    """From the host's end of the bridge; two clones, and neither answers with the other's key."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    clones = host.json("clone", "s", "--count", "2", timeout=600)
    host_keys = {}
    for clone in clones:
        name = clone["name"]
        host.output(name, "mkdir", "-p", "-m", "700", "/root/.ssh")
        public = key.with_suffix(".pub").read_bytes()
        host.client.put_file(name, "/root/.ssh/authorized_keys", public)
        host_keys[name] = " ".join(read(host, name)["ed25519"].split()[:2])
        eventually(host, name, "systemctl is-active ssh", "active")
    assert len(set(host_keys.values())) == 2
    for clone in clones:
        for other in clones:
            known = tmp_path / "known"
            known.write_text(f"{clone['identity']['ip']} {host_keys[other['name']]}\n")
            options = [f"UserKnownHostsFile={known}", "StrictHostKeyChecking=yes", "BatchMode=yes"]
            options += ["ConnectTimeout=60", "HostKeyAlgorithms=ssh-ed25519"]
            argv = ["ssh", "-i", str(key), *(word for o in options for word in ("-o", o))]
            done = host.within(*argv, f"root@{clone['identity']['ip']}", "hostname")
            if other is clone:
                assert (done.returncode, done.stdout) == (0, clone["name"] + "\n"), done.stderr
            else:
                assert done.returncode == 255 and "verification failed" in done.stderr


def test_commands_and_files(host: DebianDaemon, tmp_path: Path) -> None:
    """As in a guest with our own agent."""
    host.cli("clone", "c", timeout=600)
    done = host.run("exec", "c", "--", "sh", "-c", "cat; echo err >&2; exit 3", stdin=b"in\n")
    assert (done.returncode, done.stdout) == (3, "in\n") and "err" in done.stderr
    content = bytes(range(256)) * 5000
    (tmp_path / "in").write_bytes(content)
    host.cli("cp", str(tmp_path / "in"), "c:/root/file")
    host.cli("cp", "c:/root/file", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == content
    assert host.run("exec", "c", "--", "no-such-program").returncode == 127
    before = time.time()
    seen = float(host.output("c", "date", "+%s.%N"))
    assert before - 0.1 <= seen <= time.time() + 0.1


def test_a_daemon_that_starts_again(host: DebianDaemon) -> None:
    """It speaks with the agents of the clones that it finds."""
    host.cli("clone", "kept", timeout=600)
    before = read(host, "kept")
    host.stop()
    host.start()
    after = read(host, "kept")
    for item in DISTINCT:
        assert after[item] == before[item] or item in ("random", "kernel_uuid")


@pytest.mark.long
def test_every_path(host: DebianDaemon) -> None:
    """Pools and a full boot give the same identity."""
    host.cli(
        "pool", "set", host.template_name, "--standby", "1", "--warm", "1", "--wait", timeout=600
    )
    try:
        guests = []
        for path in ("warm", "standby", "cold"):
            clone = host.json("clone", f"p-{path}", "--path", path, timeout=900)
            guests.append(read(host, clone["name"]))
            check(host, clone, guests[-1])
    finally:
        host.cli("pool", "set", host.template_name, "--standby", "0", "--warm", "0")
    for item in DISTINCT:
        assert len({guest[item] for guest in guests}) == 3, item


def test_a_guest_without_the_agent(fresh: Daemon, tmp_path: Path) -> None:
    """The line says what to install: here there is not even a boot loader."""
    disk = tmp_path / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    fresh.template(
        "empty",
        f"name: empty\nimage: {{path: {disk}}}\nmachine: {{type: q35}}\n"
        "identity: {agent: qemu-ga}\nboot_timeout: 5s\n",
    )
    fresh.start()
    error = fresh.fails("template", "build", "empty")
    assert "did not boot within 5 s" in error
    assert "install the package qemu-guest-agent in the image" in error
    assert fresh.qemus() == []


def test_no_functions(host: DebianDaemon, tmp_path: Path) -> None:
    """They need our own agent, and the refusal says what to take."""
    (tmp_path / "app.py").write_text("def handler(event, context):\n    return 1\n")
    command = ["function", "deploy", "f", "--code", str(tmp_path), "--handler", "app.handler"]
    assert "code" in host.fails(*command, "--template", host.template_name)


@pytest.mark.long
def test_uefi(image_store: Path) -> None:
    """The same image starts by UEFI, and each clone has variables of its own."""
    changes = {"firmware: bios": "firmware: uefi"}
    for host in started(image_store, "debian-13", changes):
        clones = host.json("clone", "u", "--count", "2", timeout=600)
        for clone in clones:
            check(host, clone, read(host, clone["name"]))
            assert "efivars" in host.output(clone["name"], "ls", "/sys/firmware/efi")
        stores = list((host.state / "slots").glob("*/variables.fd"))
        assert len(stores) >= 2


@pytest.mark.long
def test_debian_12(image_store: Path) -> None:
    """The release before."""
    for host in started(image_store, "debian-12", {}):
        clones = host.json("clone", "d", "--count", "2", timeout=600)
        guests = [read(host, clone["name"]) for clone in clones]
        for clone, guest in zip(clones, guests, strict=True):
            check(host, clone, guest)
        for item in DISTINCT:
            assert guests[0][item] != guests[1][item], item


@pytest.mark.long
def test_a_file_and_an_agent_that_forbids(image_store: Path, debian: DebianDaemon) -> None:
    """An image of one's own: built once it is right; before, the line says what is wrong."""
    generation = debian.json("template", "show", debian.template_name)
    assert generation["active"]
    (image,) = [p for p in (image_store / "images").glob("*/disk.qcow2") if is_trixie(p)]
    name = "mine"
    text = (TEMPLATES / "debian-13.yaml").read_text().replace("name: debian-13", f"name: {name}")
    start, end = text.index("\nimage:") + 1, text.index("\nmachine:") + 1
    text = f"{text[:start]}image:\n  path: {image}\n  size: 2GiB\n{text[end:]}"
    debian.template(name, text)
    debian.cli("template", "build", name, timeout=1500)
    clone = debian.json("clone", "m", "--template", name, timeout=600)
    check(debian, clone, read(debian, "m"))
    debian.cli("rm", "m")
    debian.template(name, text.replace(str(image), str(image.with_name("image.json"))))
    assert "it is no qcow2 file" in debian.fails("template", "build", name)
    debian.cli("template", "rm", name)


def is_trixie(disk: Path) -> bool:
    """Whether this is the image of debian-13."""
    record = disk.with_name("image.json").read_text()
    return '"boot":"disk"' in record and "trixie" in record
