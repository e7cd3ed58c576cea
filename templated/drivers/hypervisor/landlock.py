"""Landlock (landlock(7)): a process opens nothing by its path but what rules name.

setpriv(1) takes the rules as options, and lays them on itself just before it becomes the program;
what that starts has them too, for good. A descriptor that is inherited needs no rule; opened once
more by /proc/self/fd it needs one, which names it in the same way, as setpriv inherits it as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Sequence

READ = "read-file"
WRITE = "read-file,write-file,truncate"
"""With its size: QEMU gives the base VM's memory its own."""
RUN = "execute,read-file,read-dir"
"""Of a directory, with all below it."""

# By name: `fs` alone is all that setpriv and the kernel know, and so would come to forbid more.
_NEW = "make-char,make-dir,make-reg,make-sock,make-fifo,make-block,make-sym,refer"
_FORBIDDEN = f"fs:{RUN},write-file,truncate,remove-dir,remove-file,{_NEW}"
_TRUNCATE = 3  # the ABI that has it, of Linux 6.2
_CREATE_RULESET, _VERSION = 444, 1  # asm/unistd.h, linux/landlock.h
_BOUND = 10.0


def rule(path: str | os.PathLike[str], rights: str = READ) -> str:
    """An option of setpriv. The path must be there when setpriv runs."""
    return f"--landlock-rule=path-beneath:{rights}:{os.fspath(path)}"


def options(rules: Sequence[str]) -> tuple[str, ...]:
    """All options of setpriv for a process that has only these rules."""
    return (f"--landlock-access={_FORBIDDEN}", *rules)


def problem(rules: Sequence[str], *command: str) -> str:
    """Why this command cannot run with these rules; empty when it does. Blocks, as it runs it."""
    if said := kernel_problem():
        return said
    arguments = ["setpriv", *options(rules), "--", *command]
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=_BOUND, check=False
        )
    except OSError as error:
        return f"setpriv cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{command[0]} under Landlock did not end within {_BOUND:g} s"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    if "--landlock-access" in said:  # it complains of the option
        return "setpriv of util-linux 2.40 or newer is needed for Landlock"
    return f"{command[0]} fails under Landlock: {said or f'exit code {done.returncode}'}"


def kernel_problem() -> str:
    """What the kernel lacks; empty when it has all that is used."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version >= _TRUNCATE:
        return ""
    if version >= 0:
        return "Linux 6.2 or newer is needed for Landlock"
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        return "this kernel has no Landlock"
    if code == errno.EOPNOTSUPP:
        return "Landlock is not enabled in this kernel: boot it with landlock in lsm="
    return f"the kernel refuses Landlock: {os.strerror(code)}"
