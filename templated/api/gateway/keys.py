"""The access keys of the configuration, with their secrets."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from templated.errors import ConfigError
from templated.model.access import Role
from templated.model.config import GatewayKey

_SECRET = re.compile(rb"[!-~]{8,256}")
_LONGEST = 1024


@dataclass(frozen=True)
class Key:
    """An access key; its secret is in no representation of it."""

    id: str
    role: Role
    secret: str = field(repr=False)


def read_keys(keys: Sequence[GatewayKey]) -> dict[str, Key]:
    """The keys by their ids. Raises ConfigError for a file that others can read or that holds no
    secret, and for two keys with one id. Reads files."""
    found: dict[str, Key] = {}
    for key in keys:
        if key.id in found:
            raise ConfigError(
                f"gateway.keys: {key.id} is there twice", hint="give each key an id of its own"
            )
        secret = key.secret if key.secret_file is None else _secret(key.secret_file)
        assert secret is not None  # a key has one of both
        found[key.id] = Key(key.id, key.role, secret)
    return found


def _secret(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"gateway.keys: cannot read {path}: {error.strerror}", hint="check `secret_file:`"
        ) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"gateway.keys: {path} is no file", hint="check `secret_file:`")
        if found.st_mode & 0o077 or found.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                f"gateway.keys: others can read {path}", hint=f"chown it, and chmod 600 {path}"
            )
        content = os.read(fd, _LONGEST).rstrip(b"\n")
    finally:
        os.close(fd)
    if not _SECRET.fullmatch(content):
        raise ConfigError(
            f"gateway.keys: {path} does not hold a secret",
            hint="one line with 8 to 256 printable characters and no space",
        )
    return content.decode()
