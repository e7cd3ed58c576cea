"""Pools of real virtual machines."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.harness import Daemon

pytestmark = pytest.mark.real

IDENTITY = """
import json, os, time
read = lambda path: open(path).read()
print(json.dumps({
    "time": time.time(),
    "hostname": os.uname().nodename,
    "etc": read("/etc/hostname").strip(),
    "hosts": read("/etc/hosts"),
    "machine_id": read("/etc/machine-id").strip(),
    "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
    "mac": [read(f"/sys/class/net/{n}/address").strip() for n in os.listdir("/sys/class/net")
            if n != "lo"][0],
    "random": os.urandom(16).hex(),
}))
"""


def until(condition: Callable[[], Any], what: str, bound: float = 60.0) -> None:
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def sized(daemon: Daemon, standby: int = 0, warm: int = 0, template: str = "python-fn") -> None:
    """Set pools and wait until they are full."""
    sizes = ("--standby", str(standby), "--warm", str(warm))
    daemon.cli("pool", "set", template, *sizes, "--wait", "--timeout", "120")


def pool(daemon: Daemon, template: str = "python-fn") -> dict[str, Any]:
    (view,) = [v for v in daemon.json("pool", "ls") if v["template"] == template]
    assert isinstance(view, dict)
    return view


@pytest.fixture
def pooled(host: Daemon) -> Iterator[Daemon]:
    """The shared daemon; pools that a test made are taken down again."""
    yield host
    host.cli("pool", "set", "python-fn", "--reset", "--wait")
    until(lambda: len(host.qemus()) == len(host.json("ls")), "members stay behind")


def waiting(daemon: Daemon) -> list[int]:
    """QEMU processes that are no clone's."""
    clones = {view["pid"] for view in daemon.json("ls")}
    return [pid for pid in daemon.qemus() if pid not in clones]


def test_each_path_gives_a_whole_identity(pooled: Daemon) -> None:
    sized(pooled, standby=1, warm=2)
    views = [pooled.json("clone", f"p{i}") for i in range(2)]
    assert [view["path"] for view in views] == ["warm", "warm"]
    views += [pooled.json("clone", f"{path}-1", "--path", path) for path in ("standby", "direct")]
    seen = []
    for view in views:
        before = time.time()
        guest = json.loads(pooled.guest(view["name"], IDENTITY))
        assert before - 0.1 <= guest["time"] <= time.time() + 0.1
        assert guest["hostname"] == guest["etc"] == view["name"]
        identity = view["identity"]
        assert f"{identity['ip']} {view['name']}\n" in guest["hosts"]
        for key in ("machine_id", "boot_id", "mac"):
            assert guest[key] == identity[key]
        seen.append((guest["random"], *(identity[k] for k in ("machine_id", "mac", "ip"))))
    for values in zip(*seen, strict=True):
        assert len(set(values)) == len(views)


def test_a_paused_member_costs_no_cpu(pooled: Daemon) -> None:
    sized(pooled, warm=1)
    (pid,) = waiting(pooled)

    def used() -> int:
        return sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )

    before = used()
    time.sleep(2)
    # Its main loop may wake; the vCPU does not run. One tick is 10 ms.
    assert used() - before <= 1
    assert os.getpriority(os.PRIO_PROCESS, pid) == 0, "a claim must run at the usual priority"


def test_twenty_at_once_from_a_pool_of_five(pooled: Daemon) -> None:
    sized(pooled, warm=5)
    views = pooled.json("clone", "b", "--count", "20")
    for key in ("mac", "ip", "hostname", "machine_id", "boot_id"):
        assert len({view["identity"][key] for view in views}) == 20
    assert sum(view["path"] == "warm" for view in views) >= 5
    guests = [json.loads(pooled.guest(view["name"], IDENTITY)) for view in views]
    assert {guest["hostname"] for guest in guests} == {view["name"] for view in views}
    assert len({guest["random"] for guest in guests}) == 20


def test_a_member_that_is_killed_is_replaced(pooled: Daemon) -> None:
    sized(pooled, standby=1, warm=1)
    killed = waiting(pooled)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not set(killed) & set(waiting(pooled)), "the members live on")
    until(lambda: pool(pooled)["warm"]["ready"] == 1, "no new warm member")
    until(lambda: pool(pooled)["standby"]["ready"] == 1, "no new standby member")
    assert pooled.json("clone", "after")["pid"] not in killed
    lost = [
        e
        for e in pooled.cli("events", "--no-follow", "-o", "json").splitlines()
        if "member_lost" in e
    ]
    assert sum("SIGKILL" in line for line in lost) >= 2


def test_a_guest_that_does_not_answer_its_claim(fresh: Daemon) -> None:
    """A stopped QEMU neither ends nor answers: the next member is taken, this one ended."""
    fresh.config["pools"] = {"check_interval": "60s"}
    fresh.variant("short", "identity: {timeout: 2s}", "pool: {warm: 2}", without_probes=True)
    fresh.start()
    fresh.build("short")
    until(lambda: pool(fresh, "short")["warm"]["ready"] == 2, "the spec's pool is not filled")
    stopped = min(waiting(fresh), key=lambda pid: Path(f"/proc/{pid}").stat().st_ctime)
    os.kill(stopped, signal.SIGSTOP)
    views = [fresh.json("clone", name) for name in ("a", "b")]
    assert {view["pid"] for view in views}.isdisjoint({stopped})
    until(lambda: stopped not in fresh.qemus(), "the stopped member was not ended")


def test_members_end_with_the_daemon_and_with_their_generation(fresh: Daemon) -> None:
    fresh.variant("p", "pool: {warm: 1, standby: 1}", without_probes=True)
    fresh.start()
    first = fresh.build("p")
    until(lambda: pool(fresh, "p")["warm"]["ready"] == 1, "the spec's pool is not filled")
    kept = fresh.json("clone", "kept")
    assert (kept["generation"], kept["path"]) == (first, "warm")
    fresh.cli("pool", "set", "p", "--warm", "2", "--wait")

    old = waiting(fresh)
    second = fresh.build("p")
    fresh.cli("pool", "set", "p", "--warm", "2", "--wait")
    assert not set(old) & set(fresh.qemus()), "members of the old generation are left"
    assert fresh.json("clone", "new", "--path", "warm")["generation"] == second

    fresh.cli("pool", "set", "p", "--warm", "2", "--wait")
    old = waiting(fresh)
    fresh.stop(signal.SIGKILL)
    fresh.start()
    until(lambda: pool(fresh, "p")["warm"] == {"target": 2, "ready": 2}, "no pool after a crash")
    assert not set(old) & set(fresh.qemus()), "members of a daemon that was killed are left"
    assert {view["name"] for view in fresh.json("ls")} == {"kept", "new"}

    fresh.stop()
    assert set(fresh.qemus()) == {pid for (pid,) in fresh.clone_pids()}, (
        "members outlive an orderly stop"
    )


def test_a_template_that_no_longer_restores(fresh: Daemon) -> None:
    fresh.variant("p", without_probes=True)
    fresh.start()
    generation = fresh.build("p")
    sized(fresh, warm=1, template="p")
    state = fresh.shm / "p" / generation / "state"
    good = state.read_bytes()
    state.chmod(0o600)
    state.write_bytes(b"x" * len(good))
    fresh.cli("pool", "set", "p", "--warm", "2")
    until(lambda: "failed" in pool(fresh, "p")["problem"], "no problem is shown")
    assert fresh.json("clone", "a")["path"] == "warm", "what works is not used"
    assert "has changed" in fresh.fails("clone", "b", "--path", "direct")


def test_sizes_that_the_host_cannot_hold(pooled: Daemon) -> None:
    line = pooled.fails("pool", "set", "python-fn", "--warm", "10000")
    assert "10000 warm python-fn x " in line and "MiB" in line
    assert pool(pooled)["warm"]["target"] == 0
    pooled.fails("pool", "set", "none", "--warm", "1")
    pooled.fails("pool", "set", "python-fn")
    pooled.fails("clone", "x", "--path", "warm")
