"""Files that hold one secret, which nobody but the daemon's user may read."""

from __future__ import annotations

import os
import re
import stat

from templated.errors import ConfigError

_PRINTABLE = re.compile(rb"[!-~]+")
_LONGEST = 4096


def read_secret(path: str, key: str, *, shortest: int = 1, longest: int = 256) -> str:
    """The secret in a file; `key` is that of the configuration which names it.

    Raises ConfigError for a file that is not there, that others can read, or that holds no secret
    of that many characters. Reads a file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error.strerror}", hint="check `secret_file:`"
        ) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{key}: {path} is no file", hint="check `secret_file:`")
        if others_read(found):
            raise ConfigError(
                f"{key}: others can read {path}", hint=f"chown it, and chmod 600 {path}"
            )
        content = os.read(fd, _LONGEST).rstrip(b"\r\n")
    finally:
        os.close(fd)
    if not _PRINTABLE.fullmatch(content) or not shortest <= len(content) <= longest:
        raise ConfigError(
            f"{key}: {path} does not hold a secret",
            hint=f"one line with {shortest} to {longest} printable characters and no space",
        )
    return content.decode()


def others_read(found: os.stat_result) -> bool:
    """Whether others than root and the daemon's user can read a file."""
    return bool(found.st_mode & 0o077) or found.st_uid not in (0, os.geteuid())
