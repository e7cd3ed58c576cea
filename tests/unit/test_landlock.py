"""What QEMU may open by a path: the rules of a launch, and what is said where there can be none."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from templated.drivers.hypervisor import landlock
from templated.drivers.hypervisor.base import Launch
from templated.drivers.hypervisor.landlock import READ, RUN, WRITE, rule
from templated.drivers.hypervisor.process import Demotion
from templated.drivers.hypervisor.qemu import reach
from templated.drivers.hypervisor.qemu.reach import Reach
from templated.model.network import Tap
from templated.services.doctor import run_checks
from tests.unit.fake_daemon import configured
from tests.unit.test_command import BOOT, LAUNCH, NEW, SLIRP

MEMORY = Path("/dev/shm/t/python-fn/g/memory")
STATE = Path("/dev/shm/t/python-fn/g/state")
OPENED = {LAUNCH.disk: 20, LAUNCH.places.serial_log: 21}
CLONE = replace(LAUNCH, network=Tap(9), state_fd=10, memory=MEMORY, opened={**OPENED, MEMORY: 11})
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


def _rules(launch: Launch) -> set[str]:
    """Those that a launch has beside those of all."""
    all_of_them = Reach("true").options(launch)
    always = Reach("true").options(CLONE)
    assert all_of_them[: len(always)] == always
    return set(all_of_them[len(always) :])


@pytest.fixture
def supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host that can do all, whatever this one can, and with one server of names."""
    monkeypatch.setattr(landlock, "problem", lambda rules, *command: "")
    (tmp_path / "resolver").mkdir()
    (tmp_path / "resolver/resolv.conf").touch()
    (tmp_path / "resolv.conf").symlink_to("resolver/resolv.conf")
    monkeypatch.setattr(reach, "_RESOLVER", str(tmp_path / "resolv.conf"))


@pytest.mark.usefixtures("supported")
def test_what_is_opened_again() -> None:
    """Of what a VM inherits: memory that is a file, what it boots, and a state that `cat` reads."""
    new = replace(CLONE, hardware=NEW)
    assert _rules(CLONE) == set()  # its memory is a sealed copy
    assert _rules(new) == {rule("/proc/self/fd/11", READ)}
    by_program = replace(new, state_fd=None, opened={**new.opened, STATE: 12})
    assert _rules(by_program) == {rule(f"/proc/self/fd/{fd}", READ) for fd in (11, 12)}
    parts = {BOOT.kernel: 13, BOOT.initrd: 14}
    for hardware in (LAUNCH.hardware, NEW):
        base = replace(CLONE, hardware=hardware, boot=BOOT, memory_shared=True)
        base = replace(base, opened={**base.opened, **parts})
        booted = {rule(f"/proc/self/fd/{fd}", READ) for fd in (13, 14)}
        assert _rules(base) == {rule("/proc/self/fd/11", WRITE), *booted}


@pytest.mark.usefixtures("supported")
def test_network_and_kvm(tmp_path: Path) -> None:
    """Who slirp asks, where that is replaced; the device when it is there."""
    assert _rules(replace(CLONE, network=SLIRP)) == set()  # it has no way out
    slirp = replace(CLONE, network=replace(SLIRP, restrict=False))
    assert _rules(slirp) == {rule(tmp_path / "resolver", READ)}
    (tmp_path / "resolver/resolv.conf").unlink()
    assert _rules(slirp) == set()
    kvm = replace(CLONE, hardware=replace(LAUNCH.hardware, accel="kvm"))
    there = {rule("/dev/kvm", WRITE)} if Path("/dev/kvm").exists() else set()
    assert _rules(kvm) == there


@pytest.mark.usefixtures("supported")
def test_a_program_elsewhere(tmp_path: Path) -> None:
    """Its directory, and that of its firmware; a link to it counts as what it leads to."""
    (tmp_path / "opt/bin").mkdir(parents=True)
    (tmp_path / "opt/share/qemu").mkdir(parents=True)
    program = tmp_path / "opt/bin/q"
    program.touch(mode=0o755)
    (tmp_path / "q").symlink_to(program)
    own = {rule(tmp_path / "opt" / name, RUN) for name in ("bin", "share/qemu")}
    for path in (program, tmp_path / "q"):
        assert set(Reach(str(path)).options(CLONE)) - set(Reach("true").options(CLONE)) == own
    assert Reach("no-such-qemu").options(CLONE) == Reach("true").options(CLONE)


def test_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are setpriv's last options; where there can be none, nothing is said of them."""
    monkeypatch.setattr(landlock, "problem", lambda rules, *command: "none here")
    without = Reach("true")
    assert without.problem == "none here" and without.options(CLONE) == ()
    bare = Demotion(1879048192).command()
    assert Demotion(1879048192, (), without.options(CLONE)).command() == bare
    monkeypatch.setattr(landlock, "problem", lambda rules, *command: "")
    options = Reach("true").options(CLONE)
    assert options[0].startswith("--landlock-access=fs:execute,read-file,")
    assert rule("/usr", RUN) in options
    assert Demotion(1879048192, (), options).command() == [*bare[:-1], *options, "--"]


@pytest.mark.parametrize(
    ("version", "code", "said"),
    [
        (7, 0, ""),
        (3, 0, ""),
        (2, 0, "Linux 6.2 or newer is needed"),
        (-1, errno.ENOSYS, "this kernel has no Landlock"),
        (-1, errno.EOPNOTSUPP, "boot it with landlock in lsm="),
        (-1, errno.EPERM, "refuses Landlock: Operation not permitted"),
    ],
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, version: int, code: int, said: str) -> None:
    """What one lacks."""

    class Kernel:
        @staticmethod
        def syscall(*_: object) -> int:
            ctypes.set_errno(code)
            return version

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Kernel)
    problem = landlock.kernel_problem()
    assert said in problem and bool(problem) is bool(said)


@pytest.mark.parametrize(
    ("setpriv", "status", "said"),
    [
        ("exit 0", "PASS", "open only"),
        ("echo \"setpriv: unrecognized option '--landlock-access=fs:a'\" >&2; exit 1", "WARN",
         "setpriv of util-linux 2.40 or newer is needed for Landlock"),
        ("echo libodd.so: cannot open >&2; exit 127", "WARN", "Landlock: libodd.so: cannot open"),
        ("exit 3", "WARN", "fails under Landlock: exit code 3"),
    ],
)  # fmt: skip
@NEEDS_ROOT
def test_doctor_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setpriv: str, status: str, said: str
) -> None:
    """A setpriv without the options, and a QEMU that does not start under these rules."""
    program = tmp_path / "setpriv"
    program.write_text(f"#!/bin/sh\n{setpriv}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(landlock, "kernel_problem", lambda: "")
    config = msgspec.structs.replace(configured(tmp_path), qemu="true", accel="tcg")
    check = next(check for check in run_checks(config) if check.name == "landlock")
    assert check.status == status and said in check.detail
    assert bool(check.fix) is (status != "PASS")


@NEEDS_ROOT
def test_what_can_be_opened(tmp_path: Path) -> None:
    """Where this host can do it: the program and what it inherits, and nothing else."""
    found = Reach("true")
    if found.problem:
        pytest.skip(found.problem)
    file = tmp_path / "memory"
    file.write_text("inherited")
    file.chmod(0o444)
    with open(file, "rb") as opened:
        fd = opened.fileno()
        launch = replace(CLONE, hardware=NEW, opened={MEMORY: fd})
        confined = Demotion(1879048192, (), found.options(launch)).command()

        def tried(script: str) -> int:
            command = [*confined, "sh", "-c", script]
            return subprocess.run(
                command, check=False, pass_fds=[fd], timeout=10, capture_output=True
            ).returncode

        assert tried(f"exec cat /proc/self/fd/{fd}") == 0
        assert tried("cat /etc/passwd") != 0 and tried(f"cat /proc/self/fd/{fd} /proc/stat") != 0
        for directory in ("/tmp", "/dev/shm", "/var/tmp"):
            assert tried(f"echo >{directory}/landlock-test") != 0
            assert not Path(directory, "landlock-test").exists()
