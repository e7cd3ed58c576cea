"""Control groups: what is written for which limits, and where groups may be. Limits that hold are
in tests/real/test_limits.py, on version 1, and in tests/lab/test_limits.py, on version 2."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from templated.drivers.cgroups import ControlGroups, Group
from templated.errors import HostError
from templated.model.limits import UNLIMITED, Limits
from templated.model.spec import ImageSpec, LimitSpec, MachineSpec, TemplateSpec
from templated.services.machines.admission import Promise

CONTROLLERS = ("memory", "pids", "cpu", "io")
LIMITS = Limits(
    memory=64 << 20, pids=40, cpus=0.25, cpu_weight=50, disk_read=1 << 20, disk_write=2 << 20
)
EARLY = {
    2: {
        "memory.max": "67108864",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "40",
        "io.max": "8:0 rbps=1048576 wbps=2097152",
    },
    1: {
        "memory.limit_in_bytes": "67108864",
        "memory.memsw.limit_in_bytes": "67108864",
        "pids.max": "40",
        "blkio.throttle.read_bps_device": "8:0 1048576",
        "blkio.throttle.write_bps_device": "8:0 2097152",
    },
}
LATE = {
    2: {"cpu.max": "25000 100000", "cpu.weight": "50"},
    1: {"cpu.cfs_quota_us": "25000", "cpu.shares": "512"},
}


class Files:
    """A directory with the files that the kernel would make."""

    def __init__(self, root: Path, *names: str) -> None:
        self.root = root
        root.mkdir()
        for name in names:
            (root / name).write_text("")

    def written(self) -> dict[str, str]:
        return {path.name: text for path in self.root.iterdir() if (text := path.read_text())}


def group_of(files: Files, version: int, device: str = "8:0") -> Group:
    return Group(dict.fromkeys(CONTROLLERS, files.root), version, device)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_hold_from_the_start_or_when_a_vm_is_up(tmp_path: Path, version: int) -> None:
    """CPU limits are not among the first, since they would make the start longer."""
    files = Files(tmp_path / "group", *EARLY[version], *LATE[version])
    group = group_of(files, version)
    group.make(LIMITS)
    assert files.written() == EARLY[version]
    group.limit(LIMITS)
    assert files.written() == {**EARLY[version], **LATE[version]}


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_writes_nothing(tmp_path: Path, version: int) -> None:
    """A group without limits only counts."""
    files = Files(tmp_path / "group", *EARLY[version], *LATE[version])
    group_of(files, version).make(UNLIMITED)
    group_of(files, version).limit(UNLIMITED)
    assert files.written() == {}


def test_a_limit_that_is_refused(tmp_path: Path) -> None:
    """One line that names the file, and nothing is left."""
    group = Group({"memory": tmp_path / "group"}, 2)
    with pytest.raises(HostError, match=r"cannot make a control group: .*memory\.max"):
        group.make(LIMITS)
    assert not (tmp_path / "group").exists()


def test_figures(tmp_path: Path) -> None:
    """The kernel's files, as they look."""
    files = Files(tmp_path / "group")
    (files.root / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n")
    (files.root / "memory.stat").write_text("anon 1200\nfile 999\nkernel 30\nshmem 4\n")
    (files.root / "pids.events").write_text("max 3\n")
    (files.root / "cpu.stat").write_text("usage_usec 5\nnr_periods 4\nnr_throttled 2\n")
    group = group_of(files, 2)
    assert group.hits(LIMITS) == {"pids": 3, "cpus": 2} and group.hits(UNLIMITED) == {}
    assert group.killed_for_memory() and group.held_memory() == 1234
    # The host had none left: that is not its limit.
    (files.root / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\n")
    assert not group.killed_for_memory()
    (files.root / "memory.limit_in_bytes").write_text("4096\n")
    (files.root / "memory.max_usage_in_bytes").write_text("4096\n")
    (files.root / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert group_of(files, 1).killed_for_memory()
    (files.root / "memory.max_usage_in_bytes").write_text("4095\n")
    assert not group_of(files, 1).killed_for_memory()


def test_a_group_that_is_gone(tmp_path: Path) -> None:
    """It has no figures, and can be removed once more."""
    group = group_of(Files(tmp_path / "group"), 2)
    group.remove()
    group.remove()
    assert group.hits(LIMITS) == {"pids": 0, "cpus": 0}
    assert not group.killed_for_memory() and group.held_memory() == 0


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV])
def test_a_group_that_another_removes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The kernel says so of its files and of itself, in one of two ways."""
    group = group_of(Files(tmp_path / "group"), 2)

    def read(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    def rmdir(path: Path) -> None:
        os.rmdir(path)
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    group.remove()
    assert not (tmp_path / "group").exists()


def test_two_removals_at_once(tmp_path: Path) -> None:
    """Both succeed: as each sees what the other has left of it."""
    both = threading.Barrier(2)

    def remove(group: Group) -> None:
        both.wait(10)
        group.remove()

    with ThreadPoolExecutor(2) as threads:
        for number in range(50):
            paths = {name: tmp_path / f"{name}-{number}" for name in CONTROLLERS}
            group = Group(paths, 1)
            group.make(UNLIMITED)
            for done in [threads.submit(remove, group) for _ in range(2)]:
                done.result()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_held(tmp_path: Path) -> None:
    """Each limit is named whose controller is missing."""
    assert ControlGroups("none").missing(UNLIMITED) == []
    names = ["memory", "pids", "cpus", "cpu_weight", "disk_read, disk_write"]
    assert ControlGroups("none").missing(LIMITS) == names
    some = ControlGroups("", 2, dict.fromkeys(CONTROLLERS, tmp_path), "t-")
    assert some.missing(LIMITS) == names[-1:]
    some.device = "8:0"
    assert some.missing(LIMITS) == []


def test_sweep(tmp_path: Path) -> None:
    """Groups of slots that are no more go; those of others stay."""
    for name in ("t-kept", "t-gone", "daemon", "other"):
        (tmp_path / name).mkdir()
    ControlGroups("", 2, dict.fromkeys(CONTROLLERS, tmp_path), "t-").sweep(["kept"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon", "other", "t-kept"]


def test_limits_and_promise_of_a_template() -> None:
    """Units become those of the kernel; without a limit the guest's memory counts."""
    spec = TemplateSpec(
        name="t",
        limits=LimitSpec(memory="64MiB", cpus=0.25, disk_write="2MiB", vms=3),
        machine=MachineSpec(memory="256MiB"),
        image=ImageSpec(size="2GiB"),
    )
    disk = (2 << 30) + (2 << 20) + (16 << 20)
    assert Limits.of(spec) == Limits(memory=64 << 20, cpus=0.25, disk_write=2 << 20, disk=disk)
    assert Promise.of(spec) == Promise("t", 64 << 20, 2 << 30, 3)
    assert Promise.of(TemplateSpec(name="t")).memory == 128 << 20
    assert not Limits.of(TemplateSpec(name="t")).controlled
    little = TemplateSpec(name="t", limits=LimitSpec(disk="16MiB"))
    assert Limits.of(little).disk == Promise.of(little).disk == 16 << 20


@pytest.mark.parametrize(
    ("limits", "said"),
    [(LimitSpec(pids=81), "limits.pids must be at least 82, with these vcpus"),
     (LimitSpec(disk="15MiB"), "limits.disk must be at least 16MiB")],
)  # fmt: skip
def test_limits_that_no_vm_can_live_with(limits: LimitSpec, said: str) -> None:
    """QEMU ends when it gets no thread; a log must fit in, and be cut."""
    with pytest.raises(ValueError, match=said):
        TemplateSpec(name="t", limits=limits, machine=MachineSpec(vcpus=2))


def test_a_vm_that_nobody_waits_for(tmp_path: Path) -> None:
    """It gives way to others until it is weighed; of a member of a pool nobody knows more."""
    for version, file, light, usual in (
        (2, "cpu.weight", "5", "100"),
        (1, "cpu.shares", "51", "1024"),
    ):
        files = Files(tmp_path / str(version), "cgroup.procs", file)
        group_of(files, version).join(12, background=True)
        assert files.written() == {"cgroup.procs": "12", file: light}
        group_of(files, version).weigh()
        assert (files.root / file).read_text().startswith(usual)


def test_a_vm_without_a_group_gets_one(tmp_path: Path) -> None:
    """One of a daemon that made none."""
    group = Group({"other": tmp_path / "group"}, 2)
    with pytest.raises(HostError, match="cannot put a VM into its control group"):
        group.hold(12, LIMITS)  # what the kernel would have made is not there
    assert (tmp_path / "group").is_dir()
