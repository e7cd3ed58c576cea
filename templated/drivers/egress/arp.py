"""ARP on one leg: who has an address (RFC 5227), and telling that one is here."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import NamedTuple

_ETH_P_ARP = 0x0806
_REQUEST, _REPLY = 1, 2
_FRAME = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_ALL = b"\xff" * 6
_NONE = b"\0" * 6
_NOBODY = "0.0.0.0"  # noqa: S104 - what a probe has as its sender


class Heard(NamedTuple):
    """What an ARP frame says of its sender."""

    mac: str
    ip: str


class Arp:
    """A packet socket on the leg `name`, of the namespace that the process is in."""

    def __init__(self, name: str) -> None:
        """Raises OSError when there is no such leg."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_PACKET, kind, socket.htons(_ETH_P_ARP))
        try:
            self._socket.bind((name, _ETH_P_ARP))
        except OSError:
            self._socket.close()
            raise
        self._mac = bytes(self._socket.getsockname()[4])
        self._hearers: list[Callable[[Heard], None]] = []
        asyncio.get_running_loop().add_reader(self._socket, self._readable)

    def close(self) -> None:
        """Give the socket back."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def on_heard(self, hearer: Callable[[Heard], None]) -> None:
        """Call this with what each frame of others says."""
        self._hearers.append(hearer)

    def announce(self, ip: str) -> None:
        """Tell everybody that `ip` is here: an ARP announcement of RFC 5227. OSError: link down."""
        self._send(_REQUEST, ip, ip)

    def ask(self, ip: str, sender: str = _NOBODY) -> None:
        """Ask who has `ip`; without a sender it is a probe, that nobody learns anything from."""
        self._send(_REQUEST, sender, ip)

    async def holder(self, ip: str, times: int = 3, spacing: float = 0.2) -> str:
        """The MAC of somebody else who has `ip`, asked so often; empty when nobody says so.

        Raises OSError when the leg cannot send.
        """
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def hear(heard: Heard) -> None:
            if heard.ip == ip and not found.done():
                found.set_result(heard.mac)

        self._hearers.append(hear)
        try:
            for _ in range(times):
                self.ask(ip)
                await asyncio.wait([found], timeout=spacing)
                if found.done():
                    return found.result()
            return ""
        finally:
            self._hearers.remove(hear)

    def _send(self, operation: int, sender: str, target: str) -> None:
        frame = _FRAME.pack(
            *(_ALL, self._mac, _ETH_P_ARP, 1, 0x0800, 6, 4, operation),
            *(self._mac, IPv4Address(sender).packed, _NONE, IPv4Address(target).packed),
        )
        self._socket.send(frame)

    def _readable(self) -> None:
        try:
            frame = self._socket.recv(128)
        except OSError:  # the leg went down, or away; keepalived sees that, too
            return
        if len(frame) < _FRAME.size:
            return
        parts = _FRAME.unpack(frame[: _FRAME.size])
        mac, ip = parts[8], parts[9]
        if mac == self._mac or parts[3] != 1 or parts[4] != 0x0800:
            return
        heard = Heard(mac.hex(":"), str(IPv4Address(ip)))
        for hearer in list(self._hearers):
            hearer(heard)
