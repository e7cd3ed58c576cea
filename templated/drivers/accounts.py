"""The users and groups of this host, and who is at the other end of a unix socket."""

from __future__ import annotations

import ctypes
import errno
import functools
import grp
import os
import pwd
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from templated.errors import ConfigError
from templated.model.access import EVERYTHING, Rule, grant
from templated.model.config import AccessConfig, AccessRule

# <asm-generic/socket.h>, since Linux 4.13.
_SO_PEERGROUPS = 59
# What Python's getsockopt takes at most.
_SHORT = 1024
# NGROUPS_MAX, of four bytes each.
_LONG = 65536 * 4
_UCRED = struct.Struct("=iII")
_DATABASES = {"user": "passwd", "group": "group"}
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Peer:
    """The process that connected, as it was then: pid, uid and all its groups."""

    pid: int
    uid: int
    gids: frozenset[int]


class Socket(Protocol):
    """What asyncio and uvloop let one do with a connection's socket."""

    @property
    def family(self) -> int: ...
    def fileno(self) -> int: ...
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes | int: ...


def peer_of(sock: Socket) -> Peer | None:
    """Who connected, from the kernel (unix(7)); None over TCP, where nobody can be asked."""
    if sock.family != socket.AF_UNIX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    assert isinstance(credentials, bytes)
    pid, uid, gid = _UCRED.unpack(credentials)
    return Peer(pid, uid, frozenset({gid, *_groups(sock)}))


def _groups(sock: Socket) -> list[int]:
    """The caller's supplementary groups; none from a kernel that does not say."""
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _SHORT)
    except OSError as error:
        packed = _many_groups(sock.fileno()) if error.errno == errno.ERANGE else b""
    assert isinstance(packed, bytes)
    return list(memoryview(packed).cast("I"))


def _many_groups(fd: int) -> bytes:
    """The same for who is in more groups than Python makes room for."""
    packed, size = ctypes.create_string_buffer(_LONG), ctypes.c_uint(_LONG)
    failed = _LIBC.getsockopt(fd, socket.SOL_SOCKET, _SO_PEERGROUPS, packed, ctypes.byref(size))
    return b"" if failed else packed.raw[: size.value]


@functools.lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """The name of a user, "" for one without. Blocks where a directory service is asked."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OSError):
        return ""


def access_rules(access: AccessConfig) -> tuple[Rule, ...]:
    """Those for root and this process's own user, and those of the configuration.

    Raises ConfigError for a user or group that this host does not have, with the key's path.
    """
    masters = (Rule(EVERYTHING, uid=uid) for uid in {0, os.geteuid()})
    return (*masters, *(_rule(number, rule) for number, rule in enumerate(access.roles)))


def _rule(number: int, rule: AccessRule) -> Rule:
    given, where = grant(rule.role, rule.rights), f"`$.access.roles[{number}]"
    if rule.group is not None:
        gid = _number(lambda name: grp.getgrnam(name).gr_gid, "group", rule.group, where)
        return Rule(given, gid=gid)
    if rule.user is not None:
        uid = _number(lambda name: pwd.getpwnam(name).pw_uid, "user", rule.user, where)
        return Rule(given, uid=uid)
    return Rule(given, uid=rule.uid)


def _number(look_up: Callable[[str], int], kind: str, name: str, where: str) -> int:
    try:
        return look_up(name)
    except (KeyError, ValueError):
        raise ConfigError(
            f"there is no {kind} {name!r} - at {where}.{kind}`",
            hint=f"make it, or correct the name: getent {_DATABASES[kind]}",
        ) from None
