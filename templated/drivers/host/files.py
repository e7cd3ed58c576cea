"""Files and the file systems that hold them."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from templated import failpoints
from templated.errors import HostError

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Space:
    """Bytes of a file system: those that are free, and all."""

    free: int
    size: int


def file_system(path: Path) -> Space | None:
    """The file system that `path` is on; free is what users without privileges can get."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)


def stamp(path: str | Path) -> Stamp | None:
    """A value that changes when the file does; None when there is no file. Costs one stat."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_ino, status.st_mtime_ns


def fsync(path: Path) -> None:
    """Wait until the content of a file or a directory is on the disk. Blocks; raises OSError."""
    if failpoints.armed:
        failpoints.hit("files.fsync")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bind_private(listener: socket.socket, path: Path) -> None:
    """Bind a unix socket that its owner alone may connect to, from the first moment on. OSError.

    The file gets the mode of the unbound socket, less the umask (unix_bind_bsd in net/unix). The
    umask itself is the whole process's: other threads may be making directories meanwhile.
    """
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(str(path))


def remove_directory(path: Path) -> None:
    """Remove a directory with all that is in it; it may be gone already. Blocks.

    Raises HostError when a part of it cannot be removed; leaves that part.
    """
    try:
        if failpoints.armed:
            failpoints.hit("files.remove")
        while True:
            try:
                return shutil.rmtree(path)
            except FileNotFoundError:  # also when a file in it went away meanwhile
                if not path.exists():
                    return None
            except PermissionError:  # of a mode that keeps even its owner out
                if path.stat().st_mode & 0o700 == 0o700:
                    raise
                path.chmod(0o700)
    except OSError as error:
        raise HostError(
            f"cannot remove {error.filename or path}: {error.strerror or error}",
            hint="see the host's log for errors of this disk",
        ) from error
