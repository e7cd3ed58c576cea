"""The units, checked by systemd's own tools; the notify protocol on a real socket."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from templated.api import systemd
from templated.model.config import Config, defaults
from templated.model.network import BridgeNetwork, NetworkConfig

pytestmark = pytest.mark.real
UNITS = Path(__file__).parents[2] / "systemd"
NAMES = ("templated.service", "templated-image@.service", "templated-forwarder@.service")
# systemd-analyze takes tenths: an exposure of 3.0 for the daemon. Images are made with mounts, a
# chroot and files of any owner; forwarders are namespaces, with raw sockets.
THRESHOLDS = {
    "templated.service": 30,
    "templated-image@.service": 40,
    "templated-forwarder@.service": 40,
}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no systemd to run."""
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_verify(tmp_path: Path, name: str) -> None:
    """The units are valid. The program need not be installed where they expect it."""
    text = (UNITS / name).read_text()
    assert "\nExecStart=/usr/local/bin/templated " in text
    unit = tmp_path / name.replace("@", "@python-fn")
    unit.write_text(text.replace("/usr/local/bin/templated", "/bin/true"))
    done = analyze("verify", "--man=no", str(unit))
    # systemd before 254 says that it does not know it, and goes on.
    said = [line for line in done.stderr.splitlines() if "'DelegateSubgroup'" not in line]
    assert done.returncode == 0 and said == [], done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_security(name: str) -> None:
    """A unit's exposure stays below its threshold."""
    threshold = f"--threshold={THRESHOLDS[name]}"
    done = analyze("security", "--offline=true", threshold, str(UNITS / name))
    assert done.returncode == 0, done.stdout[-400:]


def test_what_running_vms_need() -> None:
    """Lines that hold the VMs over a restart of the daemon, let TCG run, and share the socket."""
    lines = (UNITS / "templated.service").read_text().splitlines()
    for line in ("KillMode=process", "RuntimeDirectoryPreserve=yes", "OOMPolicy=continue"):
        assert line in lines
    settings = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    assert not settings & {"MemoryDenyWriteExecute", "PrivateDevices", "PrivateNetwork"}
    # What @privileged denies: chown for socket_access.group, the others for users of VMs.
    filters = [line for line in lines if line.startswith("SystemCallFilter=")]
    assert filters[-2] == "SystemCallFilter=@chown @setuid capset setpriority seccomp"
    landlock = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}
    assert set(filters[-1].partition("=")[2].split()) == landlock


def test_sysusers_and_tmpfiles(tmp_path: Path) -> None:
    """Both are accepted, and make what they should below another root."""
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", tmp_path / "etc")
    sysusers = ["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "templated.sysusers")]
    subprocess.run(sysusers, check=True, timeout=60, capture_output=True)
    assert "\ntemplated:" in (tmp_path / "etc/group").read_text()
    tmpfiles = ["systemd-tmpfiles", "--create", f"--root={tmp_path}"]
    tmpfiles.append(str(UNITS / "templated.tmpfiles"))
    subprocess.run(tmpfiles, check=True, timeout=60, capture_output=True)
    assert (tmp_path / "etc/templated/templates").is_dir()
    assert (tmp_path / "dev/shm/templated").stat().st_mode & 0o777 == 0o700


def test_example_configuration_is_the_default() -> None:
    """Every key stands in the example, with its default."""
    example = yaml.safe_load((UNITS / "templated.yaml").read_text())
    converted = msgspec.convert(example, Config)
    assert converted == msgspec.convert(defaults({}, 0), Config)
    assert set(example) == {field.name for field in msgspec.structs.fields(Config)}
    for key, section in example.items():
        if isinstance(section, dict):
            known = {f.name for f in msgspec.structs.fields(type(getattr(converted, key)))}
            assert set(section) - {"mode"} == known - {"mode"}


def test_example_of_the_bridge_is_the_default() -> None:
    """The block that is commented out has every key of the bridge, with its default."""
    text = (UNITS / "templated.yaml").read_text()
    # Prose has a space after the sign.
    lines = [line[1:] for line in text.splitlines() if re.match("#(network:|  )", line)]
    network = yaml.safe_load("\n".join(lines))["network"]
    assert msgspec.convert(network, NetworkConfig) == BridgeNetwork()
    assert set(network) - {"mode"} == {
        field.name for field in msgspec.structs.fields(BridgeNetwork)
    }


def test_notify_and_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY and WATCHDOG arrive as the manager expects them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        systemd.notify("READY=1")
        assert manager.recv(100) == b"READY=1"

        async def beat() -> None:
            task = asyncio.create_task(systemd.watchdog())
            assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
            assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
            task.cancel()

        asyncio.run(beat())


def test_daemon_is_ready_only_when_it_serves(tmp_path: Path) -> None:
    """`serve` asks the manager for time, tells it that it is ready, and that it stops."""
    config: dict[str, object] = {
        "state_dir": str(tmp_path / "s"),
        "runtime_dir": str(tmp_path / "r"),
        "shm_dir": str(tmp_path / "m"),
        "template_dirs": [],
        "metrics": None,
    }
    (tmp_path / "c.yaml").write_text(msgspec.json.encode(config).decode())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        command = [sys.executable, "-m", "templated", "serve", "--config", str(tmp_path / "c.yaml")]
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        daemon = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        try:
            assert manager.recv(1000).startswith(b"EXTEND_TIMEOUT_USEC=")
            assert manager.recv(1000).startswith(b"READY=1")
            assert (tmp_path / "r/templated.sock").exists()
            daemon.terminate()
            assert manager.recv(1000) == b"STOPPING=1"
            assert daemon.wait(30) == 0
        finally:
            daemon.kill()
            daemon.wait()
