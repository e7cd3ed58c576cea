"""Many TCP flows that send all the time, and how long each was silent at the other end.

Run as two processes, each in a network namespace: `sink ADDRESS PORT` reads, and prints when its
stdin closes; `send ADDRESS PORT FLOWS SECONDS [EVERY]` prints a line when all are connected, and
what it has sent at its end. `drain ADDRESS PORT` reads one flow to its end and prints how fast it
was; `pour ADDRESS PORT SECONDS` sends it; `shout ADDRESS PORT` sends datagrams. What is printed is
JSON.

They are plain loops over epoll: 1,000 flows that send every 50 ms are 20,000 messages a second, on
each side.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress

EVERY = 0.05
"""Seconds between two messages of a flow."""
_MESSAGE = struct.Struct("!II")
_TICK = 0.002
_DRAIN = 10.0
_BUFFER = 1 << 20


def sink(address: str, port: int) -> None:
    """Accept flows, and print of each: messages, longest silence in seconds, and its peer."""
    listener = socket.create_server((address, port), backlog=4096)
    poll = select.epoll()
    flows: dict[int, _Flow] = {}
    for fd in (listener.fileno(), 0):
        poll.register(fd, select.EPOLLIN)
    print("listening", flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd == 0:
                print(json.dumps([flow.told() for flow in flows.values()]), flush=True)
                return
            if fd == listener.fileno():
                peer, name = listener.accept()
                flows[peer.fileno()] = _Flow(peer, name[0])
                poll.register(peer, select.EPOLLIN)
                continue
            if not flows[fd].read():
                poll.unregister(fd)


class _Flow:
    """One flow; its socket is kept to the end, so that its descriptor's number stays its own."""

    def __init__(self, peer: socket.socket, name: str) -> None:
        self._socket = peer
        self._name = name
        self._first = b""
        self._size = 0
        self._last = 0.0
        self._silent = 0.0

    def read(self) -> bool:
        """Take what has come; False at its end."""
        try:
            data = self._socket.recv(4096)
        except OSError:
            data = b""
        if not data:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            return False
        now = time.monotonic()
        if self._last:
            self._silent = max(self._silent, now - self._last)
        self._first = self._first or data[:4]
        self._size += len(data)
        self._last = now
        return True

    def told(self) -> dict[str, object]:
        number = int.from_bytes(self._first, "big") if self._first else -1
        messages = self._size / _MESSAGE.size
        return {"flow": number, "messages": messages, "silent": self._silent, "peer": self._name}


def send(address: str, port: int, flows: int, seconds: float, every: float = EVERY) -> None:
    """Send from each flow for so long, then close them; print how much each has sent."""
    sockets = [socket.create_connection((address, port), 10) for _ in range(flows)]
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setblocking(False)
    print("connected", flush=True)
    sent, failed = [0] * flows, dict[int, str]()
    began, turn = time.monotonic(), 0
    while (past := time.monotonic() - began) < seconds:
        # All that is due by now, at once: a sleep for each would take longer than to send.
        for number in range(turn, int(past / every * flows)):
            flow = number % flows
            if flow not in failed:
                try:
                    sockets[flow].send(_MESSAGE.pack(flow, sent[flow]))
                    sent[flow] += 1
                except OSError as error:
                    failed[flow] = str(error)
            turn = number + 1
        time.sleep(_TICK)
    deadline = time.monotonic() + _DRAIN
    for one in sockets:
        one.setblocking(True)
        one.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            one.shutdown(socket.SHUT_WR)
            one.recv(1)  # the other end closes when it has read all
        except OSError:
            continue
    print(json.dumps({"sent": sent, "failed": failed}), flush=True)


def drain(address: str, port: int) -> None:
    """Read one flow as fast as it comes, and print its bytes and seconds."""
    with socket.create_server((address, port)) as listener:
        print("listening", flush=True)
        peer, _ = listener.accept()
    buffer, size = bytearray(_BUFFER), 0
    began = time.monotonic()
    with peer:
        while count := peer.recv_into(buffer):
            size += count
    print(json.dumps({"bytes": size, "seconds": time.monotonic() - began}), flush=True)


def pour(address: str, port: int, seconds: float) -> None:
    """Send one flow as fast as it goes."""
    data, end = bytes(_BUFFER), time.monotonic() + seconds
    with socket.create_connection((address, port), 10) as peer:
        while time.monotonic() < end:
            peer.sendall(data)


def shout(address: str, port: int) -> None:
    """Send a datagram every millisecond, whatever becomes of them, until this is killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while True:
            with suppress(OSError):
                sender.sendto(b"anybody?", (address, port))
            time.sleep(0.001)


def main(what: str, address: str, port: str, *more: str) -> None:
    """Do what the command line says."""
    if what in ("sink", "send"):
        # What else this host does is no gap of the flows.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    if what == "sink":
        sink(address, int(port))
    elif what == "send":
        send(address, int(port), int(more[0]), *map(float, more[1:]))
    elif what == "drain":
        drain(address, int(port))
    elif what == "shout":
        shout(address, int(port))
    else:
        pour(address, int(port), float(more[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
