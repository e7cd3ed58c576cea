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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from templated.errors import ConfigError
from templated.model.access import EVERYTHING, Rule, grant
from templated.model.config import AccessConfig, AccessRule
from templated.model.uids import UidRange

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


def range_problem(uids: UidRange) -> str:
    """Why VMs cannot run as these users; empty when they can. Reads the host's lists of users."""
    if not _mapped("uid", uids) or not _mapped("gid", uids):
        return f"the uids {uids} do not exist in this user namespace"
    for user in pwd.getpwall():
        if user.pw_uid in uids:
            return f"user {user.pw_name} has uid {user.pw_uid}, one of {uids}"
    for group in grp.getgrall():
        if group.gr_gid in uids:
            return f"group {group.gr_name} has gid {group.gr_gid}, one of {uids}"
    for file in ("/etc/subuid", "/etc/subgid"):
        for owner, first, count in _subordinate(file):
            if uids.meets(first, count):
                return f"{file} gives {owner} ids that are among {uids}"
    return ""


def _mapped(kind: str, uids: UidRange) -> bool:
    """Whether the user namespace of this process has all of them (user_namespaces(7))."""
    rows = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    last = uids.first + uids.count
    return any(int(first) <= uids.first and last <= int(first) + int(n) for first, _, n in rows)


def _subordinate(file: str) -> Iterator[tuple[str, int, int]]:
    """The rows of subuid(5) or subgid(5); none where there is no such file."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        owner, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if first.isdecimal() and count.isdecimal():
            yield owner, int(first), int(count)
