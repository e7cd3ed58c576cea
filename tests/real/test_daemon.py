"""The daemon's own life: restarts, kills, rollbacks, transports, machines."""

from __future__ import annotations

import grp
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.real.harness import Daemon

pytestmark = pytest.mark.real


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_clones_outlive_the_daemon(fresh: Daemon, number: signal.Signals) -> None:
    """A restarted daemon adopts its clones and goes on serving them, and keeps no orphan."""
    fresh.start()
    fresh.build()
    before = fresh.json("clone", "keep", "--count", "2")
    lost = fresh.json("clone", "lost")
    starting = subprocess.Popen(
        [sys.executable, "-m", "templated", "--socket", str(fresh.socket), "clone", "half"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(0.12)  # most likely in the middle of a start; any moment must do
    fresh.stop(number)
    starting.wait(60)
    os.kill(lost["pid"], signal.SIGKILL)
    fresh.start()
    after = {clone["name"]: clone for clone in fresh.json("ls")}
    for clone in before:
        assert after[clone["name"]] == clone
        assert fresh.cli("exec", clone["name"], "--", "hostname").strip() == clone["name"]
    assert after["lost"]["state"] == "dead"
    expected = {clone["pid"] for clone in after.values() if clone["state"] == "running"}
    assert set(fresh.qemus()) == expected
    # A victim of the restart is noticed as any other.
    os.kill(before[0]["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while fresh.json("show", "keep-1")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fresh.json("show", "keep-1")["state"] == "dead"
    fresh.cli("rm", "--all", "--yes")
    assert fresh.qemus() == []
    fresh.cli("clone", "again")


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


def test_generations(fresh: Daemon) -> None:
    """Rollback goes back; a generation that clones still map is kept until they end."""
    fresh.start()
    first = fresh.build()
    fresh.cli("clone", "old")
    second = fresh.build()
    assert fresh.json("clone", "new")["generation"] == second
    fresh.cli("template", "rollback", "python-fn")
    assert fresh.json("clone", "back")["generation"] == first
    fresh.cli("rm", "new", "back")
    third = fresh.build()
    fourth = fresh.build()
    shown = {g["id"]: g for g in fresh.json("template", "show", "python-fn")["generations"]}
    assert set(shown) == {first, third, fourth} and shown[first]["clones"] == 1
    assert shown[first]["state"] == "retired"
    assert fresh.cli("exec", "old", "--", "hostname") == "old\n"
    assert "clones of template" in fresh.fails("template", "rm", "python-fn")
    fresh.cli("rm", "old")
    left = [g["id"] for g in fresh.json("template", "show", "python-fn")["generations"]]
    assert left == [third, fourth]
    fresh.cli("template", "rm", "python-fn")
    assert list(fresh.shm.rglob("*")) == []


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


def test_transport_exec(fresh: Daemon) -> None:
    """`restore: {transport: exec}` works as the default does."""
    fresh.config["restore"] = {"transport": "exec"}
    fresh.start()
    fresh.build()
    clone = fresh.json("clone", "by-exec")
    assert fresh.cli("exec", "by-exec", "--", "hostname") == "by-exec\n"
    assert clone["path"] == "direct"


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


def test_socket_access_and_metrics(fresh: Daemon) -> None:
    """The socket has the configured mode and group; /metrics is what Prometheus reads."""
    from prometheus_client.parser import text_string_to_metric_families

    group = grp.getgrgid(os.getgid()).gr_name
    fresh.config["socket_access"] = {"mode": "0600", "group": group}
    fresh.config["metrics"] = {"listen": "127.0.0.1:0"}
    fresh.start()
    assert fresh.socket.stat().st_mode & 0o777 == 0o600
    assert fresh.socket.stat().st_gid == os.getgid()
    fresh.build()
    fresh.cli("clone", "counted")
    command = ["curl", "-s", "--unix-socket", str(fresh.socket), "http://x/metrics"]
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
