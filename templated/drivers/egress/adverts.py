"""Hearing a virtual router that sends: the advertisements of VRRP (RFC 5798)."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from ipaddress import IPv4Address

_VRRP = 112
_GROUP = IPv4Address("224.0.0.18")


async def heard(own: str, seconds: float) -> bool:
    """Whether an advertisement comes within so long, on the leg that has the address `own`.

    Raises OSError when there is no such address.
    """
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with closing(socket.socket(socket.AF_INET, kind, _VRRP)) as listener:
        member = _GROUP.packed + IPv4Address(own).packed
        listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_recv(listener, 256)
        except TimeoutError:
            return False
        return True
