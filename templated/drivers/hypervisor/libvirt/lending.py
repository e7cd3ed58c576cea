"""What QEMU opens by a path when libvirt starts it: hard links in a directory of the VM's own.

libvirt hands QEMU paths, and QEMU runs as a user who reaches nothing of ours. So each VM gets a
directory that only the group of that user may enter, with links to its files alone. The directories
above are made passable for that group; what else lies in them has modes that shut it out (the
daemon's umask).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from templated.drivers.hypervisor.base import Kernel, Launch
from templated.errors import HostError

DISK, MEMORY, KERNEL, INITRD, CODE, GIVEN, SEED, VARIABLES = (
    *("disk.qcow2", "memory", "kernel", "initrd"),
    *("code.img", "given.img", "seed.img", "variables.fd"),
)
_WRITTEN = (DISK, VARIABLES)
"""What belongs to libvirt's user while the VM runs, as does memory that it writes."""
_PASSABLE = 0o710


@dataclass(frozen=True)
class User:
    """Whom libvirt runs QEMU as."""

    uid: int
    gid: int


def layer(number: int) -> str:
    """The name of a disk layer below the highest."""
    return f"layer-{number}.qcow2"


@dataclass
class Held:
    """Descriptors that a launch names, duplicated: its caller closes his own."""

    files: dict[str, int]
    """By the names that they are lent under."""
    agent: int | None
    state: int | None
    tap: int | None
    _one: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def given(self) -> None:
        """Close what QEMU has by now: all but the saved state. Idempotent."""
        for fd in (*self.files.values(), self.agent, self.tap):
            if fd is not None:
                os.close(fd)
        self.files, self.agent, self.tap = {}, None, None

    def close(self) -> None:
        """Close all that is left. Idempotent."""
        self.given()
        if (fd := self.take_state()) is not None:
            os.close(fd)

    def take_state(self) -> int | None:
        """The saved state's, which is the caller's from here on. From any thread."""
        with self._one:
            fd, self.state = self.state, None
            return fd


def named(launch: Launch) -> dict[str, Path]:
    """The files of a launch, by the names that they are lent under."""
    files = {DISK: launch.disk}
    files |= {layer(number): path for number, path in enumerate(launch.backing)}
    others = {
        MEMORY: launch.memory,
        CODE: launch.code,
        SEED: launch.seed,
        VARIABLES: launch.variables,
    }
    files |= {name: path for name, path in others.items() if path is not None}
    if isinstance(launch.boot, Kernel):
        files |= {KERNEL: launch.boot.kernel, INITRD: launch.boot.initrd}
    return files


def hold(launch: Launch, tap: int | None) -> Held:
    """Duplicate what a launch has open, and open the rest. Raises HostError; holds nothing then."""
    with contextlib.ExitStack() as undo:
        try:
            files: dict[str, int] = {}
            for name, path in named(launch).items():
                files[name] = _opened(path, launch.opened, new=name == MEMORY)
                undo.callback(os.close, files[name])
            others = [os.dup(launch.agent_fd)]
            undo.callback(os.close, others[0])
            for fd in (launch.state_fd, tap):
                others.append(-1 if fd is None else os.dup(fd))
                if fd is not None:
                    undo.callback(os.close, others[-1])
        except OSError as error:
            raise HostError(f"cannot open a VM's files: {error}") from error
        undo.pop_all()
    agent, *rest = others
    state, port = (None if fd < 0 else fd for fd in rest)
    return Held(files, agent, state, port)


def _opened(path: Path, opened: Mapping[Path, int], *, new: bool) -> int:
    fd = opened.get(path)
    if fd is not None:
        return os.dup(fd)
    if new and not path.exists():
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@dataclass(frozen=True)
class Lent:
    """The directories of one VM, on the disk and in memory. They need not exist."""

    directory: Path
    memory: Path

    def path(self, name: str) -> Path:
        """Where a file is lent under its name."""
        return (self.memory if name == MEMORY else self.directory) / name

    def lend(self, files: Mapping[str, int], user: User | None) -> None:
        """Make the directories, with a link to each file; what QEMU writes is `user`'s then.

        Blocks for some 0.3 ms. Raises HostError; `take_back` removes what is there then.
        """
        try:
            for directory in (self.directory, self.memory):
                _passable(directory.parent.parent, user)
                _passable(directory.parent, user)
                _passable(directory, user)
            for name, fd in files.items():
                _link(fd, self.path(name))
            for name in files.keys() & {CODE, SEED}:
                _readable(self.path(name))
            written = files.keys() & set(_WRITTEN)
            if MEMORY in files and os.fstat(files[MEMORY]).st_mode & 0o222:  # of a base VM
                os.fchmod(files[MEMORY], 0o600)
                written |= {MEMORY}
            if user is not None:
                for name in written:
                    os.chown(self.path(name), user.uid, user.gid)
        except OSError as error:
            raise HostError(
                f"cannot lend a VM its files: {error}",
                hint="images, generations and slots must lie in one file system, and the daemon "
                "must be root or use qemu:///session",
            ) from error

    def lend_copy(self, size: int, user: User | None) -> int:
        """Make an empty memory file of so many bytes for QEMU to write; a descriptor for filling.

        Blocks; raises HostError, as `lend`.
        """
        path = self.path(MEMORY)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                if user is not None:
                    os.fchown(fd, user.uid, user.gid)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise HostError(f"cannot make {path}: {error.strerror}") from error
        return fd

    def lend_more(self, name: str, source: Path) -> Path:
        """Link one more file, in place of one of this name. Blocks; raises OSError."""
        path = self.path(name)
        path.unlink(missing_ok=True)
        os.link(source, path)
        _readable(path)
        return path

    def forget_memory(self) -> None:
        """Remove the memory's name: QEMU has it open. Blocks; raises nothing."""
        shutil.rmtree(self.memory, ignore_errors=True)

    def take_back(self) -> None:
        """Make what it wrote ours again, and remove the links. Idempotent. Blocks; raises nothing.

        For a VM that has ended: what it wrote may become a template's.
        """
        for name in _WRITTEN:
            with contextlib.suppress(OSError):
                os.chown(self.path(name), os.geteuid(), os.getegid())
        shutil.rmtree(self.directory, ignore_errors=True)
        self.forget_memory()


def fill(source: int, target: int, size: int) -> None:
    """Copy a memory file, without its holes, and close the target. Blocks; raises HostError."""
    try:
        for begin, end in _data(source, size):
            os.lseek(target, begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(target, source, begin, end - begin)
    except OSError as error:
        raise HostError(
            f"cannot copy a template's memory: {error.strerror}",
            hint="free some space in shm_dir, or use QEMU 8.2 or later, which needs no copy",
        ) from error
    finally:
        os.close(target)


def _data(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data: from, to."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows
            return
        end = min(os.lseek(file, begin, os.SEEK_HOLE), size)
        yield begin, end


def _link(fd: int, target: Path) -> None:
    """Link the very file that is open, whatever lies at its path by now."""
    directory = os.open(target.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        # With a descriptor of a directory Python calls linkat(2), which can follow the link.
        os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=directory)
    finally:
        os.close(directory)


def _readable(path: Path) -> None:
    """Let all read a file that nobody else reaches: code is made for its owner alone."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o444 != 0o444:
        path.chmod(mode | 0o444)


def _passable(directory: Path, user: User | None) -> None:
    """Make a directory where it is missing, and let the user's group pass, when it is ours."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if user is None or status.st_mode & 0o001 or status.st_uid != os.geteuid():
        return
    if status.st_gid != user.gid or not status.st_mode & 0o010:
        os.chown(directory, -1, user.gid)
        directory.chmod(_PASSABLE)
