"""Network and process namespaces, by system calls: Python has them from 3.12 on only."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# linux/sched.h, linux/prctl.h
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_SYSCTLS = {
    "net/ipv6/conf/all/disable_ipv6": 1,
    "net/ipv6/conf/default/disable_ipv6": 1,
    "net/ipv4/conf/default/rp_filter": 0,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/all/send_redirects": 0,
    "net/ipv4/conf/default/send_redirects": 0,
    "net/ipv4/conf/all/accept_redirects": 0,
    "net/ipv4/conf/default/accept_redirects": 0,
    # an address is answered for on its own leg only, and never used on another
    "net/ipv4/conf/all/arp_ignore": 1,
    "net/ipv4/conf/all/arp_announce": 2,
    # what the other forwarder saw of a flow, this one did not: its windows are unknown
    "net/netfilter/nf_conntrack_tcp_be_liberal": 1,
    "net/ipv4/ip_forward": 1,
}


def isolate() -> None:
    """Give this process a network namespace, and the children it forks from now on a process one.

    With the first of these children all others of it end. Raises OSError.
    """
    _call("unshare", _CLONE_NEWNET | _CLONE_NEWPID)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def open_namespace() -> int:
    """A descriptor of the network namespace that this thread is in."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Run the block in another network namespace; only for a process of one thread."""
    home = open_namespace()
    _call("setns", namespace, _CLONE_NEWNET)
    try:
        yield
    finally:
        _call("setns", home, _CLONE_NEWNET)
        os.close(home)


def set_sysctls() -> None:
    """Make the namespace of this process one that forwards; OSError when a switch is missing."""
    for name, value in _SYSCTLS.items():
        # a kernel without IPv6 has no switch for it
        path = Path("/proc/sys") / name
        if path.exists() or "ipv6" not in name:
            path.write_text(str(value))


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
