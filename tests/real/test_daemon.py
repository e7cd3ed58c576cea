"""The daemon's own life: restarts, kills, rollbacks, transports, machines."""

from __future__ import annotations

import grp
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.real.harness import Daemon

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_clones_outlive_the_daemon(copied: Daemon, number: signal.Signals) -> None:
    """A restarted daemon adopts its clones and goes on serving them, and keeps no orphan."""
    copied.start()
    before = copied.json("clone", "keep", "--count", "2")
    lost = copied.json("clone", "lost")
    starting = subprocess.Popen(
        [sys.executable, "-m", "templated", "--socket", str(copied.socket), "clone", "half"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(0.12)  # most likely in the middle of a start; any moment must do
    copied.stop(number)
    starting.wait(60)
    os.kill(lost["pid"], signal.SIGKILL)
    copied.start()
    after = {clone["name"]: clone for clone in copied.json("ls")}
    for clone in before:
        assert after[clone["name"]] == clone
        assert copied.cli("exec", clone["name"], "--", "hostname").strip() == clone["name"]
    assert after["lost"]["state"] == "dead"
    expected = {clone["pid"] for clone in after.values() if clone["state"] == "running"}
    assert set(copied.qemus()) == expected
    # A victim of the restart is noticed as any other.
    os.kill(before[0]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while copied.json("show", "keep-1")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert copied.json("show", "keep-1")["state"] == "dead"
    copied.cli("rm", "--all", "--yes")
    assert copied.qemus() == []
    copied.cli("clone", "again")


def building(daemon: Daemon) -> subprocess.Popen[bytes]:
    """A build under way, whose base VM runs."""
    command = [sys.executable, "-m", "templated", "--socket", str(daemon.socket)]
    build = subprocess.Popen(
        [*command, "template", "build", "python-fn"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not daemon.qemus() and time.monotonic() < deadline:
        time.sleep(0.05)
    return build


@pytest.mark.long  # tests/faults kills it there in each place
def test_killed_in_the_middle_of_a_build(fresh: Daemon) -> None:
    """Nothing of the build stays, and the template can be built again."""
    fresh.start()
    build = building(fresh)
    assert fresh.qemus()
    fresh.stop(signal.SIGKILL)
    build.wait(60)
    fresh.start()
    assert fresh.qemus() == [] and list(fresh.shm.rglob("*")) == []
    assert fresh.rows() == {"clones": 0, "slots": 0, "generations": 0, "templates": 0}
    assert fresh.build()


def test_stopped_in_the_middle_of_a_build(fresh: Daemon) -> None:
    """An orderly stop gives everything of a build back by itself."""
    fresh.start()
    build = building(fresh)
    fresh.stop()
    build.wait(60)
    assert fresh.qemus() == [] and list(fresh.shm.rglob("*")) == []


def test_generations(copied: Daemon) -> None:
    """Rollback goes back; a generation that clones still map is kept until they end."""
    copied.variant("python-fn", without_probes=True)  # no probe has a say here
    copied.start()
    first = copied.json("template", "show", "python-fn")["active"]
    copied.cli("clone", "old")
    second = copied.build()
    assert copied.json("clone", "new")["generation"] == second
    copied.cli("template", "rollback", "python-fn")
    assert copied.json("clone", "back")["generation"] == first
    copied.cli("rm", "new", "back")
    third = copied.build()
    fourth = copied.build()
    shown = {g["id"]: g for g in copied.json("template", "show", "python-fn")["generations"]}
    assert set(shown) == {first, third, fourth} and shown[first]["clones"] == 1
    assert shown[first]["state"] == "retired"
    assert copied.cli("exec", "old", "--", "hostname") == "old\n"
    assert "clones of template" in copied.fails("template", "rm", "python-fn")
    copied.cli("rm", "old")
    left = [g["id"] for g in copied.json("template", "show", "python-fn")["generations"]]
    assert left == [third, fourth]
    copied.cli("template", "rm", "python-fn")
    assert list(copied.shm.rglob("*")) == []


def test_manifest(host: Daemon) -> None:
    """The manifest tells what a generation is made of."""
    manifest = host.json("template", "show", "python-fn")["manifest"]
    assert set(manifest["files"]) == {"memory", "state", "disk.qcow2"}
    assert all(len(f["sha256"]) == 64 for f in manifest["files"].values())
    assert manifest["files"]["memory"]["size"] == 128 << 20
    # Whatever the guest's memory is, it stays out of the stream.
    assert manifest["files"]["state"]["size"] < 1 << 20
    assert [p["name"] for p in manifest["probes"]] == ["console", "agent", "python", "settle"]
    assert {p["name"] for p in manifest["canary_probes"]} == {"agent", "python", "settle"}
    for key in (
        "qemu",
        "accel",
        "cpu",
        "command_line",
        "kernel",
        "kernel_sha256",
        "kernel_cmdline",
        "image",
        "phases_s",
    ):
        assert manifest[key]


def test_frozen_files_are_read_only(host: Daemon) -> None:
    """Memory, state and layer 2 have no write bit (as root; see `seal` for other users)."""
    files = [*host.shm.glob("*/*/*"), *host.state.glob("generations/*/*/disk.qcow2")]
    assert len(files) >= 3
    if os.geteuid() == 0:
        assert [f for f in files if f.stat().st_mode & 0o222] == []


def test_transport_exec(copied: Daemon) -> None:
    """`restore: {transport: exec}` works as the default does."""
    copied.config["restore"] = {"transport": "exec"}
    copied.start()
    clone = copied.json("clone", "by-exec")
    assert copied.cli("exec", "by-exec", "--", "hostname") == "by-exec\n"
    assert clone["path"] == "direct"


@pytest.mark.parametrize("confine", [True, False])
def test_confine(copied: Daemon, confine: bool) -> None:
    """Every thread of a clone's QEMU is under a filter of its own; without it, the daemon warns."""
    copied.config["confine"] = confine
    copied.start()
    pid = copied.json("clone", "boxed")["pid"]
    assert copied.process is not None
    daemon = _filters(Path(f"/proc/{copied.process.pid}"))
    for thread in Path(f"/proc/{pid}/task").iterdir():
        assert _filters(thread) == daemon + confine
    assert ("confine is false" in copied.log) is not confine


def _filters(process: Path) -> int:
    found = re.search(r"^Seccomp_filters:\t(\d+)$", (process / "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives VMs users of their own")
def test_users(copied: Daemon) -> None:
    """Each VM has a user of its own; with a range that others use it has not, and that is said."""
    copied.config["uids"] = {"first": 1999000000, "count": 64}
    copied.start()
    clones = [copied.json("clone", name)["pid"] for name in ("one", "two")]
    users = {_user(pid) for pid in clones}
    assert len(users) == 2 and all(1999000000 <= user < 1999000064 for user in users)
    copied.stop()
    copied.config["uids"] = {"first": min(users) - 1, "count": 64}
    copied.start(wait=False)
    assert copied.process is not None and copied.process.wait(60) != 0
    assert "which `uids` now gives to another VM" in copied.log
    copied.config["uids"] = {"first": 65530, "count": 10}
    copied.start()
    assert "VMs run as the user of this process: user nobody has uid 65534" in copied.log
    assert copied.cli("exec", "one", "--", "hostname") == "one\n"
    assert _user(copied.json("clone", "three")["pid"]) == os.geteuid()
    said = copied.run("doctor", "--config", str(copied.places / "templated.yaml")).stdout
    assert "WARN" in next(line for line in said.splitlines() if "users" in line)
    copied.cli("rm", "--all", "--yes")
    assert copied.qemus() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives VMs users of their own")
def test_few_users(copied: Daemon) -> None:
    """No more VMs than users, and one line says so; what is given back can be used again."""
    copied.config["uids"] = {"first": 1999000000, "count": 2}
    copied.config["slots"] = {"ready": 0}
    copied.start()
    copied.cli("clone", "one")
    copied.cli("clone", "two")
    assert "all 2 slots are in use" in copied.fails("clone", "three")
    copied.cli("rm", "one")
    copied.cli("clone", "three")


def _user(pid: int) -> int:
    return os.stat(f"/proc/{pid}").st_uid


def test_probe_types(fresh: Daemon) -> None:
    """tcp and http, from inside the guest and through a forward; and a build's events as JSON."""
    fresh.variant(
        "web",
        "probes:",
        "  - {name: start, type: exec, command: [sh, -c,"
        " 'cd / && (setsid python3 -m http.server 8080 >/dev/null 2>&1 &)']}",
        "  - {name: tcp-in, type: tcp, port: 8080}",
        "  - {name: http-in, type: http, port: 8080, pattern: Directory}",
        "  - {name: tcp-out, type: tcp, port: 8080, via: forward}",
        "  - {name: http-out, type: http, port: 8080, via: forward, pattern: Directory}",
        without_probes=True,
    )
    fresh.start()
    lines = fresh.cli("-o", "json", "template", "build", "web").splitlines()
    events = [json.loads(line) for line in lines]
    passed = {e["name"] for e in events if e["type"] == "probe" and e["state"] == "passed"}
    assert passed == {"start", "tcp-in", "http-in", "tcp-out", "http-out"}
    assert events[-1]["type"] == "end" and events[-1]["state"] == "done"


def test_q35(fresh: Daemon) -> None:
    """The other machine type freezes and restores as well."""
    fresh.variant("pc")
    text = (fresh.templates / "pc.yaml").read_text().replace("type: microvm", "type: q35")
    fresh.template("pc", text)
    fresh.start()
    fresh.build("pc")
    fresh.cli("clone", "on-q35")
    assert fresh.cli("exec", "on-q35", "--", "hostname") == "on-q35\n"


def test_socket_access_and_metrics(copied: Daemon) -> None:
    """The socket has the configured mode and group; /metrics is what Prometheus reads."""
    from prometheus_client.parser import text_string_to_metric_families

    group = grp.getgrgid(os.getgid()).gr_name
    copied.config["socket_access"] = {"mode": "0600", "group": group}
    copied.config["metrics"] = {"listen": "127.0.0.1:0"}
    copied.start()
    assert copied.socket.stat().st_mode & 0o777 == 0o600
    assert copied.socket.stat().st_gid == os.getgid()
    copied.cli("clone", "counted")
    command = ["curl", "-s", "--unix-socket", str(copied.socket), "http://x/metrics"]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    labels = (("path", "direct"), ("template", "python-fn"))
    assert samples["templated_clone_seconds_count", labels] == 1
    assert samples["templated_clones", (("state", "running"), ("template", "python-fn"))] == 1
    assert samples["process_open_fds", ()] > 0
