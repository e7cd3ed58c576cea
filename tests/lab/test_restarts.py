"""Clones live on whatever happens to the daemon, and the next one adopts them."""

from __future__ import annotations

import pytest

from tests.lab.product import Product

pytestmark = pytest.mark.lab
MAIN_PID = "systemctl show --value -p MainPID templated"
NEXT_QEMU = """#!/bin/sh
[ "$1" != --version ] || exec echo QEMU emulator version 99.0.1
exec qemu-system-x86_64 "$@"
"""
KILLED = f"kill -KILL $({MAIN_PID})"
# systemd ends a daemon that gives no sign of life for WatchdogSec, and starts another.
STOP, START = "systemctl stop templated", "systemctl start templated"
STOPPED = f"kill -STOP $({MAIN_PID})"


@pytest.mark.parametrize(
    ("how", "replaced", "counted"),
    [
        pytest.param("systemctl restart templated", True, 0, id="restart"),
        pytest.param(KILLED, True, 1, id="sigkill", marks=pytest.mark.long),
        pytest.param(STOPPED, True, 1, id="watchdog"),
        pytest.param("systemctl daemon-reexec", False, 0, id="daemon-reexec"),
        pytest.param(f"{STOP}; {START}", True, 0, id="stop", marks=pytest.mark.long),
    ],
)
def test_adoption(host: Product, how: str, replaced: bool, counted: int) -> None:
    """The clone has its process and memory still, answers, and can be removed; others start."""
    clone = host.clone("lasting")
    host.guest("lasting", "echo kept >/run/kept")
    daemon, restarts = host.unit("MainPID"), int(host.unit("NRestarts"))
    host.lab.do(how)
    if replaced:
        host.wait(f"pid=$({MAIN_PID}); [ $pid -gt 0 ] && [ $pid != {daemon} ]")
        host.wait("systemctl -q is-active templated")
    else:
        assert host.unit("MainPID") == daemon
    assert counted == 0 or int(host.unit("NRestarts")) == restarts + counted
    found = host.json("show", "lasting")
    assert found["state"] == "running"
    for key in ("pid", "uuid", "identity"):
        assert found[key] == clone[key]
    assert host.guest("lasting", "cat /run/kept") == "kept\n"
    assert host.clone("next")["state"] == "running"
    host.cli("rm", "lasting")
    assert host.lab.run(f"kill -0 {clone['pid']}").returncode != 0


def test_reboot(host: Product) -> None:
    """After a reboot it is as the guide says: templates serve, clones are dead."""
    host.clone("lost")
    before = host.active()
    host.lab.reboot()
    host.wait("systemctl -q is-active templated")
    assert host.json("show", "lost")["state"] == "dead"
    assert host.clone("early")["generation"] == before
    assert host.guest("early", "hostname") == "early\n"
    assert host.look("early")["early"]["clock"] < 0.1
    assert host.lab.do("systemctl --failed --plain --no-legend") == ""


@pytest.mark.long
def test_a_build_without_the_archive(host: Product) -> None:
    """The image is still there: nothing is fetched."""
    host.lab.do("systemctl stop lab-archive")
    host.cli("template", "build", "python-fn")
    host.lab.do("systemctl start lab-archive")
    assert host.clone("again")["state"] == "running"
    assert host.json("template", "show", "python-fn")["manifest"]["accel"] == "kvm"


@pytest.mark.long
def test_another_qemu(host: Product) -> None:
    """`apt upgrade` of QEMU: clones go on, the template is refused until it is built again."""
    host.lab.put("/usr/local/bin/qemu-next", NEXT_QEMU)
    host.lab.do("chmod 755 /usr/local/bin/qemu-next")
    old = host.active()
    host.clone("before")
    host.configure(qemu="/usr/local/bin/qemu-next")
    assert host.guest("before", "hostname") == "before\n"
    for line in (
        host.fails("clone", "after"),
        host.json("template", "show", "python-fn")["problem"],
    ):
        assert f"generation {old} of python-fn was frozen by QEMU" in line
        assert "this host has 99.0.1" in line
    assert host.build()["qemu"]["version"] == "99.0.1"
    assert host.clone("after")["state"] == "running"
    host.cli("rm", "--all", "--yes")
    host.configure()
    assert "was frozen by QEMU 99.0.1" in host.fails("clone", "back")
    host.cli("template", "rollback", "python-fn")
    assert host.active() == old
    assert host.clone("back")["state"] == "running"
