"""An escape, played: what somebody who has taken over a QEMU can do to everything else.

A program of its own, with nothing but the standard library: it is given what a QEMU holds, and is
started by setpriv as that QEMU was. Each attempt runs in a process of its own under that QEMU's
filter of system calls. Prints what came of each as JSON: the name of an error, a signal, or DONE.
Attempts change nothing where they can: the byte that is written is the one that is there.

x86-64 only: numbers of system calls are from <asm/unistd_64.h>.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import itertools
import json
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

DONE = "DONE"
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECCOMP, _FILTER = 22, 2
_MMAP, _MPROTECT, _PRCTL = 9, 10, 157
_PTRACE, _PROCESS_VM_READV, _PIDFD_OPEN, _PIDFD_GETFD = 101, 310, 434, 438
_MOUNT, _UNSHARE, _SETNS, _FALLOCATE, _BPF = 165, 272, 308, 285, 321
_NEWUSER, _NEWNS, _NEWNET = 0x10000000, 0x00020000, 0x40000000
_PUNCH_HOLE = 3
_PAGE = 4096

Attempt = Callable[[], object]


def main() -> None:
    order = json.load(sys.stdin)
    found = {name: _played(attempt, order) for name, attempt in attempts(order)}
    json.dump(found, sys.stdout)


def attempts(order: dict[str, Any]) -> list[tuple[str, Attempt]]:
    """All attempts, by what they reach for."""
    found: list[tuple[str, Attempt]] = []
    for role, fds in order["fds"].items():
        for fd, (name, work) in itertools.product(fds, _FILE):
            found.append((f"{role}: {name} by descriptor {fd}", partial(work, fd)))
    for what, path in order["paths"].items():
        found.append((f"{what}: open to write", partial(os.open, path, os.O_RDWR)))
        found.append((f"{what}: read", partial(os.open, path, os.O_RDONLY)))
    for whose, pid in order["processes"].items():
        found += [(f"{whose}: {name}", partial(work, pid)) for name, work in _PROCESS]
    for what, path in order["sockets"].items():
        found.append((f"{what}: connect", partial(_connect, path)))
    found += [(f"host: {name}", work) for name, work in _HOST]
    return found


def _played(attempt: Attempt, order: dict[str, Any]) -> str:
    """What came of an attempt."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            _become(order)
            attempt()
            os.write(theirs, DONE.encode())
        except OSError as error:
            os.write(theirs, errno.errorcode.get(error.errno or 0, str(error)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return said or DONE  # a program that was run says nothing


def _become(order: dict[str, Any]) -> None:
    """Under the filter of that QEMU; its user this program is already."""
    for text in order["filters"]:
        code = base64.b64decode(text)
        rules = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(rules))
        _call(_PRCTL, _PR_SET_SECCOMP, _FILTER, ctypes.c_char_p(program), 0, 0)


def _call(number: int, *arguments: object) -> int:
    _LIBC.syscall.restype = ctypes.c_long
    result = _LIBC.syscall(ctypes.c_long(number), *map(_word, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return int(result)


def _word(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


# --- files, by the descriptors that QEMU holds ------------------------------------------------


def _write(fd: int) -> None:
    os.pwrite(fd, os.pread(fd, 1, 0), 0)


def _map(fd: int) -> None:
    with mmap.mmap(fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[0] = mapped[0]


def _protect(fd: int) -> None:
    """A shared mapping that was made to read, and is to be written."""
    address = _call(_MMAP, 0, _PAGE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    _call(_MPROTECT, address, _PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def _grow(fd: int) -> None:
    os.ftruncate(fd, os.fstat(fd).st_size + _PAGE)


def _punch(fd: int) -> None:
    end = os.fstat(fd).st_size // _PAGE * _PAGE
    _call(_FALLOCATE, fd, _PUNCH_HOLE, end - _PAGE, _PAGE)


def _reopen(fd: int) -> None:
    _write(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))


def _chmod(fd: int) -> None:
    os.fchmod(fd, os.fstat(fd).st_mode & 0o777)


_FILE: list[tuple[str, Callable[[int], object]]] = [
    ("write", _write),
    ("map shared", _map),
    ("mprotect", _protect),
    ("truncate", _grow),
    ("punch a hole", _punch),
    ("open again and write", _reopen),
    ("chmod", _chmod),
]


# --- processes --------------------------------------------------------------------------------


def _ptrace(pid: int) -> None:
    _call(_PTRACE, 0x4206, pid, 0, 0)  # PTRACE_SEIZE: the process does not stop


def _read_memory(pid: int) -> None:
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(buffer), 8)
    remote = struct.pack("PN", _PAGE, 8)
    try:
        _call(_PROCESS_VM_READV, pid, ctypes.c_char_p(local), 1, ctypes.c_char_p(remote), 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:  # allowed; nothing is mapped there
            raise


def _take_descriptor(pid: int) -> None:
    _call(_PIDFD_GETFD, _call(_PIDFD_OPEN, pid, 0), 1, 0)


_PROCESS: list[tuple[str, Callable[[int], object]]] = [
    ("signal", lambda pid: os.kill(pid, 0)),
    ("ptrace", _ptrace),
    ("process_vm_readv", _read_memory),
    ("/proc/PID/mem", lambda pid: os.open(f"/proc/{pid}/mem", os.O_RDWR)),
    ("/proc/PID/fd", lambda pid: os.listdir(f"/proc/{pid}/fd")),
    ("pidfd_getfd", _take_descriptor),
    ("priority", lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19)),
]


# --- the host ---------------------------------------------------------------------------------


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)


def _exec() -> None:
    os.execv("/bin/true", ["true"])  # noqa: S606


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _create(directory: str) -> None:
    path = f"{directory}/templated-drill"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)


def _setns() -> None:
    _call(_SETNS, os.open("/proc/1/ns/net", os.O_RDONLY), _NEWNET)


OPEN_TO_ALL: list[tuple[str, Attempt]] = [
    ("read /etc/passwd", lambda: os.open("/etc/passwd", os.O_RDONLY)),
    *((f"a file in {name}", partial(_create, name)) for name in ("/tmp", "/dev/shm", "/var/tmp")),
]
"""What every user may, unless Landlock prevents it."""

_HOST: list[tuple[str, Attempt]] = [
    *OPEN_TO_ALL,
    ("read /etc/shadow", lambda: os.open("/etc/shadow", os.O_RDONLY)),
    ("mount", lambda: _call(_MOUNT, b"none", b"/mnt", b"tmpfs", 0, None)),
    ("new mount namespace", lambda: _call(_UNSHARE, _NEWNS)),
    ("new user namespace", lambda: _call(_UNSHARE, _NEWUSER)),
    ("another network namespace", _setns),
    ("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    ("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    ("become root", lambda: os.setuid(0)),
    ("run a program", _exec),
    ("fork", _fork),
    ("load BPF", lambda: _call(_BPF, 5, ctypes.create_string_buffer(128), 128)),
    ("higher priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
    ("/dev/mem", lambda: os.open("/dev/mem", os.O_RDWR)),
]


if __name__ == "__main__":
    main()
