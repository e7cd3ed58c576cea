"""Limits of clones hold, are reported by their names, and are there after a restart."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.hypervisor.process import file_limit_problem
from tests.real.harness import Daemon

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make control groups here"),
]
LIMITED = "limits: {memory: 80MiB, pids: 90, cpus: 0.3, cpu_weight: 50, disk: 16MiB, vms: 3}"
BUSY = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that is to come true, and return it."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def events(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
    """The events of one type so far."""
    lines = daemon.cli("-o", "json", "events", "--no-follow").splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == kind]


def groups_of(pid: int) -> dict[str, str]:
    """The control groups of a process, by controller."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return {name: path for _, names, path in lines for name in names.split(",")}


@pytest.fixture(scope="module")
def limited(image_store: Path) -> Any:
    """A daemon with a template that has limits; skipped where there are no control groups."""
    from tests.real.conftest import prepare

    daemon = prepare(Daemon(), image_store)
    try:
        daemon.variant("lim", LIMITED, without_probes=True)
        daemon.start()
        if not daemon.control_groups():
            pytest.skip(daemon.control_groups().problem)
        daemon.build("lim")
        yield daemon
    finally:
        daemon.close()
        assert daemon.groups() == []


@pytest.fixture
def host(limited: Daemon) -> Any:
    """The daemon, without a clone before and after."""
    yield limited
    limited.cli("rm", "--all", "--yes")


def test_memory(host: Daemon) -> None:
    """Who wants more than its memory dies of it, and is reported with the limit's name."""
    for name in ("greedy", "other"):
        host.cli("clone", name, "--template", "lim")
    done = host.run("exec", "greedy", "--", "python3", "-c", "b'x' * (60 << 20)")
    assert done.returncode != 0
    clone = until(
        lambda: (c := host.json("show", "greedy"))["state"] == "dead" and c, "it did not die"
    )
    assert "more than its limits.memory, 80 MiB" in clone["reason"]
    assert events(host, "clone.dead")[-1]["details"]["reason"] == clone["reason"]
    assert host.cli("exec", "other", "--", "hostname") == "other\n"


def reported(daemon: Daemon, name: str) -> list[str]:
    """The limits that were reported of a clone."""
    found = [event for event in events(daemon, "clone.limit") if event["subject"] == name]
    return [event["details"]["limit"] for event in found]


def limited_files(host: Daemon, pid: int) -> bool:
    """Whether the files that a VM writes have the limit of the template."""
    bound = re.search(r"Max file size +(\w+) +(\w+)", Path(f"/proc/{pid}/limits").read_text())
    return bound is not None and bound.groups() == (str(16 << 20),) * 2


def test_disk(host: Daemon) -> None:
    """A layer 3 does not grow beyond its limit, at once: the guest gets errors, as of a full disk.

    However much it tries: its VM goes on, and is reported.
    """
    while not limited_files(host, host.json("clone", "writer", "--template", "lim")["pid"]):
        # A daemon that lacks the right for it may come too late: it says so.
        assert file_limit_problem() and "may have no limit" in host.log
        host.cli("rm", "writer")
    # Not through the guest's cache, which would come to its limit of memory.
    command = "dd if=/dev/zero of=/x bs=64k count=400 oflag=direct"
    host.run("exec", "writer", "--", "sh", "-c", command)
    until(lambda: "disk" in reported(host, "writer"), "the limit was not reported")
    layers = [path.stat().st_size for path in host.state.glob("slots/*/disk.qcow2")]
    assert 12 << 20 < max(layers) <= 16 << 20
    assert "I/O error" in host.cli("logs", "writer")
    assert host.cli("exec", "writer", "--", "hostname") == "writer\n"


def test_cpu_time(host: Daemon) -> None:
    """A clone that uses its time up is reported once while it goes on, and the metric counts."""
    host.cli("clone", "busy", "--template", "lim")
    host.cli("exec", "busy", "--", "sh", "-c", BUSY)
    assert until(lambda: reported(host, "busy"), "the limit was not reported") == ["cpus"]
    with host.client as client:
        series = 'templated_clone_limit_hits_total{limit="cpus",template="lim"} '
        (line,) = (x for x in client.metrics().splitlines() if x.startswith(series))
    assert float(line.removeprefix(series)) > 0


def test_who_is_in_it(host: Daemon) -> None:
    """A clone has its group by the time that it is up, and nobody else is in it; CPU limits come
    then. The daemon itself is in none."""
    host.cli("clone", "one", "--template", "lim")
    pid = host.json("show", "one")["pid"]
    found = host.control_groups()
    mine = groups_of(pid)
    assert host.process is not None
    others = groups_of(host.process.pid)
    assert found.prefix in mine["memory"] and mine["memory"] != others["memory"]
    root = found.bases["cpu"] / Path(mine["cpu"]).name
    assert (root / "cgroup.procs").read_text().split() == [str(pid)]
    if found.version == 1:
        until(lambda: (root / "cpu.cfs_quota_us").read_text() == "30000\n", "no quota")
        until(lambda: (root / "cpu.shares").read_text() == "512\n", "no weight")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_restart(host: Daemon, how: signal.Signals) -> None:
    """The group stays through a restart of the daemon, and the clone still counts."""
    names = ["a", "b", "c"]
    for name in names:
        host.cli("clone", name, "--template", "lim")
    pids = [host.json("show", name)["pid"] for name in names]
    before = [groups_of(pid) for pid in pids]
    host.stop(how)
    host.start()
    assert [groups_of(pid) for pid in pids] == before
    assert "its limits.vms is 3" in host.run("clone", "d", "--template", "lim").stderr
    host.cli("rm", "a")
    host.cli("clone", "d", "--template", "lim")


def test_death_while_the_daemon_is_away(host: Daemon) -> None:
    """The group tells the next daemon what its VM died of."""
    host.cli("clone", "gone", "--template", "lim")
    # What the guest was told goes on without the daemon.
    command = "(sleep 2; exec python3 -c 'bytes(range(256)) * (60 << 12)') >/dev/null 2>&1 &"
    host.cli("exec", "gone", "--", "sh", "-c", command)
    pid = host.json("show", "gone")["pid"]
    host.stop(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}/mem").exists(), "it did not die")
    host.start()
    reason = host.json("show", "gone")["reason"]
    assert "while the daemon was away: it wanted more than its limits.memory" in reason


def test_a_process_that_hides(host: Daemon) -> None:
    """What is left in the group of a VM that nobody wants is ended, whatever it looks like."""
    host.cli("pool", "set", "lim", "--standby", "1")
    until(lambda: host.json("pool", "ls")[0]["standby"]["ready"], "no member")
    (qemu,) = host.qemus()
    found = host.control_groups()
    names = {Path(path).name for path in groups_of(qemu).values() if found.prefix in path}
    host.stop(signal.SIGKILL)
    with subprocess.Popen(["sleep", "600"]) as hidden:
        try:
            for base in found.bases.values():
                (base / min(names) / "cgroup.procs").write_text(str(hidden.pid))
            host.start()
            assert hidden.wait(10) == -signal.SIGKILL
        finally:
            hidden.kill()
    assert qemu not in host.qemus()
    host.cli("pool", "set", "lim", "--reset")


def test_what_is_promised(host: Daemon) -> None:
    """No more clones than limits.vms, counted with the members of pools; refused ones leave
    nothing."""
    host.cli("clone", "fn", "--count", "2", "--template", "lim")
    held = host.at_rest()
    done = host.run("clone", "more", "--count", "2", "--template", "lim")
    assert (
        done.returncode != 0 and "2 VMs more of lim would be too many: there are 2" in done.stderr
    )
    assert host.settled(held) == held
    host.cli("pool", "set", "lim", "--standby", "1")
    until(lambda: host.json("pool", "ls")[0]["standby"]["ready"], "no member")
    refused = host.run("clone", "x", "--template", "lim", "--path", "direct").stderr
    assert "1 VM more of lim would be too many: there are 3" in refused
    host.cli("clone", "x", "--template", "lim")
    host.cli("pool", "set", "lim", "--reset")


def test_all_together(host: Daemon) -> None:
    """`limits.memory` of the configuration bounds what all VMs together are promised."""
    bound = {"limits": {"memory": "170MiB"}}
    host.stop()
    usual = host.config
    host.config = {**usual, **bound}
    host.start()
    host.cli("clone", "fn", "--count", "2", "--template", "lim")
    refused = host.run("clone", "more", "--template", "lim").stderr
    assert "may come to use 80 MiB of memory, and 160 MiB of the 170 MiB" in refused
    host.stop()
    host.config = usual
    host.start()
    host.cli("clone", "more", "--template", "lim")


def test_too_low(limited: Daemon) -> None:
    """A limit below what the guest needs is refused by the build, with the figure."""
    limited.variant("low", "limits: {memory: 4MiB}", without_probes=True)
    done = limited.run("template", "build", "low")
    assert done.returncode != 0
    assert "limits.memory of low is 4194304 bytes, and its canary took" in done.stderr
    assert "set limits.memory higher" in done.stderr
