"""Logs that a guest can fill, with a bound that the kernel keeps at once.

A log begins BEGIN bytes into its file, after a hole, and no process that writes one may write a
file beyond END (RLIMIT_FSIZE, see `bound_files`). So QEMU, which appends, has LIMIT bytes and then
gets an error, which it ignores. It holds without a daemon that looks, and costs a start nothing.
The bound is one for all files of a process, and a disk may be large: hence the hole. `ls` shows it
as a part of the log's size, `du` does not.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from templated.errors import HostError

LIMIT = 4 << 20
"""Bytes that a log can have."""
END = 1 << 40
BEGIN = END - LIMIT
_KEPT = 256 << 10


def bound_files() -> None:
    """Let this process, and every one that it starts from now on, write no file beyond END.

    setrlimit(2), signal(7): SIGXFSZ, which Python ignores, has to be ignored in the others too.
    Raises HostError when this process may not have files of that size.
    """
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and most < END:
        raise HostError(
            f"files of this process may have {most} bytes, and its logs need {END}",
            hint="raise the limit: LimitFSIZE= of the unit, or ulimit -f",
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (END, END))


def make(path: Path) -> None:
    """An empty log, for its owner only. Raises OSError; leaves none then."""
    path.touch(mode=0o600, exist_ok=False)
    with contextlib.suppress(OSError):
        # A file system without files of that size: the log begins at 0, and `cut` is its bound.
        os.truncate(path, BEGIN)


def length(path: Path) -> int:
    """Bytes that were written to a log. Raises OSError when there is none."""
    size = path.stat().st_size
    return size - _begin(size)


def end(path: Path, most: int) -> bytes:
    """The last bytes of a log. Raises OSError when there is none."""
    with open(path, "rb") as log:
        size = os.fstat(log.fileno()).st_size
        log.seek(max(_begin(size), size - most))
        return log.read(most)


def cut(path: Path) -> None:
    """Keep the end of a log in NAME.1, and empty it: it has LIMIT bytes again.

    Raises OSError. Writers append (O_APPEND), so this leaves no hole behind the one it begins with.
    """
    path.with_suffix(".log.1").write_bytes(end(path, _KEPT))
    os.truncate(path, _begin(path.stat().st_size))


def _begin(size: int) -> int:
    return BEGIN if size >= BEGIN else 0
