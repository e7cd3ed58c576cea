"""A control group for each VM: what it may take of the host, and how often it wanted more.

Version 2 where the host has it, else version 1 (Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/ of the kernel). Groups lie below that of this process: systemd's Delegate= lets a unit
have groups of its own. In version 2 only groups without processes have groups with controllers
below them, so the daemon then is in one named `daemon`, by DelegateSubgroup= of systemd 254; on an
older systemd it goes there itself, and ExecStopPost= of the unit makes way for the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from templated import failpoints
from templated.errors import HostError
from templated.model.limits import Limits

OURS = "daemon"
CONTROLLERS = ("memory", "pids", "cpu", "io")
"""Those that limits need; version 1 calls the last one blkio."""
_FIRST = {"io": "blkio"}
_PERIOD_US = 100_000
_V1_SHARES = 1024
"""What cpu.shares is by default, as 100 is for cpu.weight."""
_MOST_V1_SHARES = 262144
_BACKGROUND = 5
"""The weight of a VM that nobody waits for: nice does not count between groups. With the least, 1,
a member of a pool came to the bound of its start on a host without idle CPUs."""
_USUAL = 100
_GONE = (errno.ENOENT, errno.ENODEV)
"""What the kernel says of a group, or of a file of it, that another thread has just removed."""
_LEAVING, _PAUSE = 0.2, 0.01
"""Seconds until a process that has ended has left its group."""
_DELEGATED = ("trusted.delegate", "user.delegate")
"""Set by systemd to 1 on a group that it leaves to a unit (systemd, docs/CGROUP_DELEGATION.md)."""


@dataclass(frozen=True)
class Group:
    """The group of one VM: a directory for each controller, all the same one in version 2."""

    paths: Mapping[str, Path]
    version: int
    device: str = ""
    """major:minor of the disk that disk layers are on."""

    def make(self, limits: Limits) -> None:
        """Make it, with the limits that hold from the start. Blocks for some 0.1 ms.

        Raises HostError; leaves nothing then.
        """
        try:
            if failpoints.armed:
                failpoints.hit("cgroup.make")
            for path in self._directories():
                path.mkdir(mode=0o755, exist_ok=True)
            self._write(self._early(limits))
        except OSError as error:
            with contextlib.suppress(HostError):
                self.remove()
            raise HostError(
                f"cannot make a control group: {error.strerror}: {error.filename or ''}",
                hint="see `templated doctor`",
            ) from error

    def join(self, pid: int, *, background: bool = False) -> None:
        """Put a process into it; what it takes from then on counts. Blocks: some milliseconds.

        With `background` it gives way to all others, until `weigh` is called. Raises HostError; of
        version 1 it may be in a part then. A process that has ended is no error.
        """
        try:
            if failpoints.armed:
                failpoints.hit("cgroup.join")
            for path in self._directories():
                with contextlib.suppress(ProcessLookupError):
                    _put(path / "cgroup.procs", str(pid))
            if background:
                self._write([self._weight(_BACKGROUND)])
        except OSError as error:
            raise HostError(
                f"cannot put a VM into its control group: {error.strerror}",
                hint="see `templated doctor`",
            ) from error

    def weigh(self) -> None:
        """Give it the usual share of the CPUs again. Costs one write; raises HostError."""
        try:
            self._write([self._weight(_USUAL)])
        except OSError as error:
            raise HostError(f"cannot weigh a VM: {error.strerror}: {error.filename}") from error

    def hold(self, pid: int, limits: Limits) -> None:
        """Hold a VM that is up to all of its limits; one without a group, of a daemon that made
        none, gets it now. Idempotent. Blocks; raises as `make`, `join` and `limit` do."""
        if not all(path.exists() for path in self._directories()):
            self.make(limits)
            self.join(pid)
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        """Set all limits, those of a VM that is up among them. Idempotent. Blocks.

        Raises HostError; the VM may have some of the limits then.
        """
        try:
            if failpoints.armed:
                failpoints.hit("cgroup.limit")
            self._write([*self._early(limits), *self._late(limits)])
        except OSError as error:
            raise HostError(f"cannot limit a VM: {error.strerror}: {error.filename}") from error

    def hits(self, limits: Limits) -> dict[str, int]:
        """How often the VM wanted more than each of these limits. Memory is not among them: what
        wants more of that is ended.

        Blocks. Raises nothing: a group that is gone has no figures.
        """
        found = {}
        if limits.pids is not None:
            found["pids"] = self._figure("pids", "pids.events", "max")
        if limits.cpus is not None:
            found["cpus"] = self._figure("cpu", "cpu.stat", "nr_throttled")
        return found

    def killed_for_memory(self) -> bool:
        """Whether the kernel has ended a process of it because of its own limit. Blocks.

        `oom_kill` also counts what the host's lack of memory has ended.
        """
        if self.version == 2:
            killed = self._figure("memory", "memory.events", "oom_kill")
            reached = self._figure("memory", "memory.events", "oom")
        else:
            killed = self._figure("memory", "memory.oom_control", "oom_kill")
            # Not memory.failcnt: newer kernels do not count there any more.
            most = self._figure("memory", "memory.max_usage_in_bytes")
            reached = most >= self._figure("memory", "memory.limit_in_bytes")
        return killed > 0 and reached > 0

    def held_memory(self) -> int:
        """Bytes that it holds now and the kernel cannot take back; 0 when not known. Blocks.

        Pages of files are left out: they go when others want the memory.
        """
        names = ("anon", "shmem", "kernel") if self.version == 2 else ("rss", "shmem")
        return sum(self._figure("memory", "memory.stat", name) for name in names)

    def remove(self) -> None:
        """End what is in it still, and remove it. Idempotent. Raises HostError when that fails.

        Its VM has ended by then: what is left are programs that this one has started, or a VM that
        does not look like one any more.
        """
        try:
            if failpoints.armed:
                failpoints.hit("cgroup.remove")
            for path in self._directories():
                _kill(path)
                _remove(path)
        except OSError as error:
            raise HostError(
                f"cannot remove the control group {error.filename}: {error.strerror}",
                hint="a process of a VM is in it still",
            ) from error

    def _directories(self) -> Iterator[Path]:
        return iter(dict.fromkeys(self.paths.values()))

    def _figure(self, controller: str, file: str, name: str = "") -> int:
        """A number of a file: the whole, or what stands after a name."""
        path = self.paths.get(controller)
        if path is None:
            return 0
        try:
            lines = (path / file).read_text().splitlines()
        except OSError:
            return 0
        for line in lines:
            key, _, value = line.rpartition(" ")
            if key == name and value.isdigit():
                return int(value)
        return 0

    def _write(self, values: Iterable[tuple[str, str, str]]) -> None:
        for controller, file, value in values:
            if controller in self.paths:
                _put(self.paths[controller] / file, value)

    def _early(self, limits: Limits) -> Iterator[tuple[str, str, str]]:
        """Controller, file and value of what holds from the start."""
        two = self.version == 2
        if limits.memory is not None:
            file = "memory.max" if two else "memory.limit_in_bytes"
            yield "memory", file, str(limits.memory)
            # Without swap: it would take the disk in place of the memory. Not all kernels have it.
            swap = "memory.swap.max" if two else "memory.memsw.limit_in_bytes"
            if "memory" in self.paths and (self.paths["memory"] / swap).exists():
                yield "memory", swap, "0" if two else str(limits.memory)
            if two:
                # All of the VM goes: the program that `exec` starts, too.
                yield "memory", "memory.oom.group", "1"
        if limits.pids is not None:
            yield "pids", "pids.max", str(limits.pids)
        rates = {"r": limits.disk_read, "w": limits.disk_write}
        given = {kind: rate for kind, rate in rates.items() if rate is not None and self.device}
        if two and given:
            words = " ".join(f"{kind}bps={rate}" for kind, rate in given.items())
            yield "io", "io.max", f"{self.device} {words}"
        elif given:
            names = {"r": "read", "w": "write"}
            for kind, rate in given.items():
                file = f"blkio.throttle.{names[kind]}_bps_device"
                yield "io", file, f"{self.device} {rate}"

    def _late(self, limits: Limits) -> Iterator[tuple[str, str, str]]:
        """Those that would make a start longer."""
        two = self.version == 2
        if limits.cpus is not None:
            quota = int(limits.cpus * _PERIOD_US)
            if two:
                yield "cpu", "cpu.max", f"{quota} {_PERIOD_US}"
            else:
                yield "cpu", "cpu.cfs_quota_us", str(quota)
        if limits.cpu_weight is not None:
            yield self._weight(limits.cpu_weight)

    def _weight(self, weight: int) -> tuple[str, str, str]:
        if self.version == 2:
            return "cpu", "cpu.weight", str(weight)
        shares = max(2, min(weight * _V1_SHARES // _USUAL, _MOST_V1_SHARES))
        return "cpu", "cpu.shares", str(shares)


@dataclass
class ControlGroups:
    """The groups of one daemon's VMs.

    Where there can be none, VMs run without, and `problem` says why.
    """

    problem: str = ""
    version: int = 0
    bases: dict[str, Path] = field(default_factory=dict)
    """By controller: below which directory the groups are."""
    prefix: str = ""
    """How the names of groups begin; the id of the slot follows."""
    device: str = ""

    def __bool__(self) -> bool:
        return bool(self.bases)

    def missing(self, limits: Limits) -> list[str]:
        """Which of these limits cannot be held here."""
        disk = limits.disk_read is not None or limits.disk_write is not None
        wanted = {
            "memory": limits.memory is not None and "memory" not in self.bases,
            "pids": limits.pids is not None and "pids" not in self.bases,
            "cpus": limits.cpus is not None and "cpu" not in self.bases,
            "cpu_weight": limits.cpu_weight is not None and "cpu" not in self.bases,
            "disk_read, disk_write": disk and not ("io" in self.bases and self.device),
        }
        return [name for name, lost in wanted.items() if lost]

    def group(self, slot_id: str) -> Group | None:
        """The group of a slot's VM, made or not; None where there can be none."""
        if not self.bases:
            return None
        paths = {name: base / f"{self.prefix}{slot_id}" for name, base in self.bases.items()}
        return Group(paths, self.version, self.device)

    def sweep(self, keep: Iterable[str]) -> None:
        """Remove the groups of slots that are no more, unless processes are in them. Blocks."""
        kept = {f"{self.prefix}{slot_id}" for slot_id in keep}
        for base in set(self.bases.values()):
            with contextlib.suppress(OSError):
                for path in base.glob(f"{self.prefix}*"):
                    if path.name not in kept:
                        with contextlib.suppress(OSError):
                            _remove(path)


def control_groups(owner: str, disk: Path, *, make: bool = True) -> ControlGroups:
    """Where this daemon's VMs can have groups: of version 2, else of version 1.

    `owner` tells this daemon's groups from those of others, `disk` is where disk layers lie.
    With `make` false nothing is made and nothing moved: this process is not the daemon. Raises
    nothing.
    """
    try:
        own, mounts = _own(), _mounts()
        found = _second(own, mounts, owner, make=make)
        if not found and not found.problem:
            found = _first(own, mounts, owner)
    except OSError as error:
        found = ControlGroups(f"control groups cannot be used: {error.strerror}: {error.filename}")
    found.device = _device(disk)
    return found


def offered() -> tuple[int, list[str]]:
    """The version that the host has, and which of the controllers are in it. Raises nothing."""
    with contextlib.suppress(OSError):
        mounts = _mounts()
        second = _usable(mounts[""]) if "" in mounts else set()
        if second:
            return 2, [name for name in CONTROLLERS if name in second]
        return 1, [name for name in CONTROLLERS if _FIRST.get(name, name) in mounts]
    return 2, []


def _usable(mount: _Mount) -> set[str]:
    """The controllers that version 2 has on this host."""
    return {*(mount.point / "cgroup.controllers").read_text().split()} & {*CONTROLLERS}


def _second(
    own: Mapping[str, str], mounts: Mapping[str, _Mount], owner: str, *, make: bool
) -> ControlGroups:
    """Version 2; nothing and no problem where it has none of our controllers."""
    mount = mounts.get("")
    if mount is None or "" not in own:
        return ControlGroups()
    here = mount.path(own[""])
    if not _usable(mount):
        return ControlGroups()
    base = here.parent if here.name == OURS else here
    if not _is_delegated(base):
        return ControlGroups(f"{base} is not delegated to this daemon (Delegate= of its unit)")
    if not os.access(base / "cgroup.procs", os.W_OK):
        return ControlGroups(f"{base} cannot be written")
    if make:
        # Also the VMs of a daemon that made no groups.
        (base / OURS).mkdir(exist_ok=True)
        for pid in (base / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                _put(base / OURS / "cgroup.procs", pid)
        there = set((base / "cgroup.controllers").read_text().split())
        for name in there & {*CONTROLLERS}:
            with contextlib.suppress(OSError):  # read back below
                _put(base / "cgroup.subtree_control", f"+{name}")
    file = "cgroup.subtree_control" if make else "cgroup.controllers"
    there = set((base / file).read_text().split())
    bases = {name: base for name in CONTROLLERS if name in there}
    return ControlGroups("", 2, bases, f"templated-{owner}-")


def _first(own: Mapping[str, str], mounts: Mapping[str, _Mount], owner: str) -> ControlGroups:
    """Version 1: beside this process's children, in each controller's hierarchy."""
    bases: dict[str, Path] = {}
    for name in CONTROLLERS:
        present = _FIRST.get(name, name)
        if present in mounts and present in own:
            here = mounts[present].path(own[present])
            if os.access(here, os.W_OK):
                bases[name] = here
    if not bases:
        return ControlGroups(
            "no control group can be written (of version 1 a unit needs ProtectControlGroups=no)"
        )
    return ControlGroups("", 1, bases, f"templated-{owner}-")


def _is_delegated(path: Path) -> bool:
    for attribute in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return True
    return False


@dataclass(frozen=True)
class _Mount:
    """One hierarchy: where it is mounted, and which of its directories that shows."""

    point: Path
    root: str

    def path(self, group: str) -> Path:
        """The directory of a group that /proc names."""
        return self.point / os.path.relpath(group, self.root)


def _own() -> dict[str, str]:
    """This process's groups by controller; that of version 2 by the empty name (cgroups(7))."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        found.update(dict.fromkeys(names.split(","), path))
    return found


def _mounts() -> dict[str, _Mount]:
    """The hierarchies by controller, as `_own`. Source: proc(5), /proc/PID/mountinfo."""
    found: dict[str, _Mount] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = before.split(" ")[3:5]
        mount = _Mount(Path(point), root)
        if kind == "cgroup2":
            found.setdefault("", mount)
        elif kind == "cgroup":
            for name in options.split(","):
                found.setdefault(name, mount)
    return found


def _device(path: Path) -> str:
    """major:minor of the whole disk below a directory: limits are not for parts of one.

    Empty where there is none, as for a tmpfs.
    """
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    number = existing.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    with contextlib.suppress(OSError):
        if (device / "partition").exists():
            device = device.resolve().parent
        return (device / "dev").read_text().strip()
    return ""


def _kill(path: Path) -> None:
    """End all processes of a group, by cgroup.kill of Linux 5.14 where it is."""
    try:
        pids = [int(pid) for pid in (path / "cgroup.procs").read_text().split()]
        if pids and (path / "cgroup.kill").exists():
            _put(path / "cgroup.kill", "1")
            return
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    for pid in filter(None, pids):  # 0: of another PID namespace
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _remove(path: Path) -> None:
    """Remove a group. It may be gone, and some kernels tell of a process's end a moment before."""
    deadline = time.monotonic() + _LEAVING
    while path.exists():
        try:
            path.rmdir()
        except OSError as error:
            if error.errno in _GONE:
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)


def _put(path: Path, value: str) -> None:
    """Write a file of the kernel in one call: it takes the whole value or refuses it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)
