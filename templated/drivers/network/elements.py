"""Elements of nftables sets and maps, put and taken by netlink: what changes while clones start.

A process of nft(8) costs several milliseconds and reads all tables first; one message costs a
fraction of one, however many ports there are. The messages are those of
linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from templated import failpoints

_NETFILTER = 12  # NETLINK_NETFILTER
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END, _ERROR = 0x10, 0x11, 2
_PUT, _TAKE = 12, 14  # NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_NESTED = 0x8000
_JUMP = -3
_FAMILIES = {"ip": 2, "bridge": 7}  # NFPROTO_IPV4, NFPROTO_BRIDGE
_ANSWERS = 1 << 16


class Element(NamedTuple):
    """One element: where it is, its key, and the chain that it leads to when it is in a map."""

    family: str
    set: str
    key: tuple[str, ...]
    """An interface (at most 15 bytes), a MAC, or an IPv4 address; or some of them."""
    chain: str = ""

    @property
    def written(self) -> str:
        """The key as nft(8) writes it."""
        fields = (f'"{field}"' if _is_name(field) else field for field in self.key)
        return " . ".join(fields)


class Elements:
    """A socket in the network namespace of the thread that makes it; usable from all threads."""

    def __init__(self, table: str) -> None:
        """Raises OSError when the kernel has no nf_tables, or the process no right."""
        self._table = table
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setblocking(False)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def change(self, take: Iterable[Element], put: Iterable[Element]) -> None:
        """Take elements and put others, in one transaction, whose answer is there at once.

        Raises OSError, with nothing changed: ENOENT when an element, its set or its chain is not
        there, EEXIST when one is there already.
        """
        if failpoints.armed:
            failpoints.hit("network.elements")
        messages = [
            *(self._message(_TAKE, _REQUEST, one) for one in take),
            # Without NLM_F_EXCL: one that is there with the same verdict is no error.
            *(self._message(_PUT, _REQUEST | _CREATE, one) for one in put),
        ]
        head = struct.pack("!BBH", 0, 0, _SUBSYSTEM)
        numbered = [
            _framed(_BEGIN, _REQUEST, 0, head),
            *(_framed(kind, flags, n, body) for n, (kind, flags, body) in enumerate(messages, 1)),
            # The answer to the end comes when all has been done.
            _framed(_END, _REQUEST | _ACK, len(messages) + 1, head),
        ]
        with self._lock:
            self._socket.send(b"".join(numbered))
            codes = list(self._answers())
        failed = next((code for code in codes if code), 0 if codes else errno.EIO)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def _answers(self) -> Iterator[int]:
        """The kernel works in the call that sends: its answers are all there."""
        with contextlib.suppress(BlockingIOError):
            while data := self._socket.recv(_ANSWERS):
                while len(data) >= 20:
                    length, kind = struct.unpack_from("=IH", data)
                    if kind == _ERROR:
                        yield -struct.unpack_from("=i", data, 16)[0]
                    data = data[(length + 3) & ~3 :]

    def _message(self, kind: int, flags: int, one: Element) -> tuple[int, int, bytes]:
        key = _attribute(1, b"".join(map(_field, one.key)))
        element = _attribute(1 | _NESTED, key)
        if one.chain and kind == _PUT:
            verdict = _attribute(1, struct.pack("!i", _JUMP)) + _attribute(2, _text(one.chain))
            element += _attribute(2 | _NESTED, _attribute(2 | _NESTED, verdict))
        body = struct.pack("!BBH", _FAMILIES[one.family], 0, 0)
        body += _attribute(1, _text(self._table)) + _attribute(2, _text(one.set))
        return _SUBSYSTEM << 8 | kind, flags, body + _elements(element)


def _elements(element: bytes) -> bytes:
    return _attribute(3 | _NESTED, _attribute(1 | _NESTED, element))


def _framed(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _is_name(field: str) -> bool:
    """Names of interfaces begin with a letter here; MACs have colons, addresses begin with a
    digit."""
    return field[0].isalpha() and ":" not in field


def _field(field: str) -> bytes:
    """A part of a key, as the kernel has it: each takes whole words of four bytes."""
    if ":" in field:
        return bytes.fromhex(field.replace(":", "")) + b"\0\0"
    if _is_name(field):
        return field.encode().ljust(16, b"\0")
    return ipaddress.IPv4Address(field).packed
