"""Clones on real QEMU: what a user is promised, read in the guests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.real.harness import Daemon

pytestmark = pytest.mark.real

PHASES = ["allocate", "spawn", "restore", "resume", "identify", "link"]
# What a guest knows of itself, a line each. All of it is busybox, since the first run of each
# program is slow in a guest under TCG.
READ = """
for file in /proc/sys/kernel/hostname /etc/machine-id /proc/sys/kernel/random/boot_id \
    /sys/class/net/eth0/address /run/templated/uuid /proc/sys/kernel/random/uuid
do
    read -r line <$file
    echo $line
done
set -- $(busybox ip -o -4 addr show eth0)
echo ${4%/*}
echo $(busybox od -An -N32 -tx1 /dev/urandom)
while read -r line; do echo $line; done </etc/hosts
"""
DISTINCT = ("hostname", "machine_id", "boot_id", "mac", "uuid", "kernel_uuid", "ip", "random")


def read(host: Daemon, name: str) -> dict[str, Any]:
    """What a guest knows of itself."""
    lines = host.output(name, "busybox", "sh", "-c", READ).splitlines()
    count = len(DISTINCT)
    return {**dict(zip(DISTINCT, lines, strict=False)), "hosts": lines[count:]}


def clock_error(host: Daemon, name: str) -> float:
    """Seconds by which a guest's clock lies outside of the moment it was read in."""
    before = time.time()
    guest = float(host.output(name, "date", "+%s.%N"))
    return max(before - guest, guest - time.time(), 0.0)


def test_a_clone_is_what_the_design_says(host: Daemon) -> None:
    """The JSON has the fixed names, and the guest agrees with it."""
    clone = host.json("clone", "fn-123")
    assert clone["name"] == "fn-123" and clone["template"] == "python-fn"
    assert clone["state"] == "running" and clone["path"] == "direct"
    assert list(clone["phases_ms"]) == PHASES
    assert clone["total_ms"] >= sum(clone["phases_ms"].values()) * 0.9
    assert clone["generation"] == host.json("template", "show", "python-fn")["active"]
    assert str(clone["uuid"]) in Path(f"/proc/{clone['pid']}/cmdline").read_text()
    guest = read(host, "fn-123")
    for key in ("mac", "ip", "hostname", "machine_id"):
        assert guest[key] == clone["identity"][key]
    assert guest["uuid"] == clone["uuid"]
    assert f"{guest['ip']} fn-123" in guest["hosts"]
    assert host.json("ls") == [host.json("show", "fn-123")]


def test_three_disk_layers(host: Daemon) -> None:
    """Image, template, clone; what a clone writes, no other layer sees."""
    host.cli("clone", "writer")
    host.cli("clone", "reader")
    host.cli("exec", "writer", "--", "sh", "-c", "echo mine > /root/mark && sync")
    assert host.run("exec", "reader", "--", "cat", "/root/mark").returncode != 0
    overlay = next(
        path
        for path in (host.state / "slots").glob("*/disk.qcow2")
        if host.json("show", "writer")["pid"] in _openers(str(path))
    )
    command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(overlay)]
    chain = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert len(chain) == 3


def _openers(path: str) -> list[int]:
    """Processes that have a file open."""
    found = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                links = [
                    os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
                ]
            except OSError:
                continue
            if path in links:
                found.append(int(pid))
    return found


def test_exec(host: Daemon) -> None:
    """Output, input, exit code and timeout of a guest's command reach the user."""
    host.cli("clone", "e")
    done = host.run("exec", "e", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)
    assert host.cli("exec", "e", "--", "cat", stdin=b"given") == "given"
    assert host.run("exec", "e", "--", "no-such-program").returncode == 127
    assert host.run("exec", "--timeout", "1", "e", "--", "sleep", "60").returncode == 124
    big = host.cli("exec", "e", "--", "python3", "-c", "print('x' * 3_000_000)")
    assert len(big) == 3_000_001


def test_files(host: Daemon, tmp_path: Any) -> None:
    """`cp` carries a file in and out again, byte by byte."""
    host.cli("clone", "c")
    content = os.urandom(200_000)
    (tmp_path / "in").write_bytes(content)
    host.cli("cp", str(tmp_path / "in"), "c:/root/file")
    host.cli("cp", "c:/root/file", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == content


def test_agent_survives_a_reconnection(host: Daemon) -> None:
    """An exec under way when its client goes away does not stop the next one."""
    host.cli("clone", "r")
    command = [sys.executable, "-m", "templated", "--socket", str(host.socket)]
    child = subprocess.Popen(
        [*command, "exec", "r", "--", "sh", "-c", "yes | head -c 50000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    child.stdout.read(1000)
    child.kill()
    child.stdout.close()
    child.wait()
    assert host.cli("exec", "r", "--", "echo", "still here") == "still here\n"


def test_twenty_at_the_same_time(host: Daemon) -> None:
    """Twenty requests at once all run, each with its own identity."""
    with ThreadPoolExecutor(20) as pool:
        clones = list(pool.map(lambda i: host.json("clone", f"p-{i}"), range(20)))
    assert all(clone["state"] == "running" for clone in clones)
    for key in ("mac", "ip", "hostname", "machine_id"):
        assert len({clone["identity"][key] for clone in clones}) == 20
    assert len({clone["uuid"] for clone in clones}) == 20


def test_fifty_clones_share_no_identity(host: Daemon) -> None:
    """Pairwise distinct, read in the guests; clocks within 100 ms of the host's."""
    clones = host.json("clone", "id", "--count", "50")
    assert len(clones) == 50
    names = [clone["name"] for clone in clones]
    with ThreadPoolExecutor(4) as pool:
        guests = dict(zip(names, pool.map(lambda name: read(host, name), names), strict=True))
    for key in DISTINCT:
        values = [guest[key] for guest in guests.values()]
        assert len(set(values)) == 50, f"{key} is not distinct"
    for clone in clones:
        guest = guests[clone["name"]]
        for key in ("mac", "ip", "hostname", "machine_id", "boot_id"):
            assert guest[key] == clone["identity"][key]
    errors = {name: clock_error(host, name) for name in names}
    assert max(errors.values()) <= 0.1, errors


@pytest.mark.long  # test_soak.py does it with more around it
def test_two_hundred_cycles_leave_nothing(host: Daemon) -> None:
    """No process, file, descriptor or journal row more than before."""
    host.cli("clone", "warm-up")
    host.cli("rm", "warm-up")
    time.sleep(1)
    before = host.at_rest()

    def cycle(names: str) -> None:
        for i in range(100):
            host.client.create_clone(f"{names}-{i % 7}")
            host.client.remove_clone(f"{names}-{i % 7}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cycle, ("even", "odd")))
    assert host.settled(before) == before


def test_a_killed_vm_is_noticed(host: Daemon) -> None:
    """A VM that was killed from outside is dead, says so, and can be removed."""
    clone = host.json("clone", "victim")
    os.kill(clone["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while host.json("show", "victim")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    shown = host.json("show", "victim")
    assert shown["state"] == "dead" and "SIGKILL" in shown["reason"]
    assert "victim is dead" in host.fails("exec", "victim", "--", "true")
    host.cli("rm", "victim")


def test_cold_path(host: Daemon) -> None:
    """A cold boot ends in the same state, by other phases."""
    clone = host.json("clone", "cold", "--path", "cold")
    assert clone["path"] == "cold" and "boot" in clone["phases_ms"]
    assert read(host, "cold")["machine_id"] == clone["identity"]["machine_id"]


def test_events_and_logs(host: Daemon) -> None:
    """What happened is there to read."""
    host.cli("clone", "ev")
    events = [
        json.loads(line) for line in host.cli("-o", "json", "events", "--no-follow").splitlines()
    ]
    running = [e for e in events if e["type"] == "clone.running" and e["subject"] == "ev"]
    assert running and running[-1]["details"]["path"] == "direct"
    host.cli("exec", "ev", "--", "sh", "-c", "echo to the console > /dev/console")
    assert "to the console" in host.cli("logs", "ev")
