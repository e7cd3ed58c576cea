#!/usr/bin/python3 -ISu
"""The agent inside the guest: newline JSON on the virtio serial port `templated.agent.0`.

One file, standard library only, one thread. A request `{"id", "cmd", ...}` is one line; so is
its reply `{"id", "ok": true, "result"}` or `{"id", "ok": false, "error": {"code", "message"}}`.

The first run of any code after a restore is slow under TCG, which translates it anew: what
counts on the way from a restore to an identity is how much code runs, not how often. So
`identify` forks nothing, imports nothing, uses descriptors that are open already, and does not
decode JSON when the line has the shape that the host gives it; and a frozen agent waits in a
plain read. An idle agent has no timer: everything else waits in one epoll.
"""

from __future__ import annotations

import binascii
import collections
import ctypes
import errno
import fcntl
import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any, cast

VERSION = 1
PORT = "templated.agent.0"
MAX_LINE = 1 << 20
CHUNK = 1 << 16
QUEUE_LIMIT = 1 << 20
DRAIN_SECONDS = 1.0
GRACE_SECONDS = 5.0
HOOK_SECONDS = 10.0
MAX_EXEC_SECONDS = 86400.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
}

# linux/random.h, linux/sockios.h, linux/mount.h
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
SIOCGIFADDR, SIOCSIFADDR, SIOCGIFNETMASK = 0x8915, 0x8916, 0x891B
SIOCSIFHWADDR, SIOCGIFHWADDR = 0x8924, 0x8927
IFF_UP, MS_BIND = 1, 4096
# linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h
NLM_F_REQUEST, NLM_F_ECHO, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x8, 0x200, 0x400
NLMSG_ERROR, RTM_NEWADDR, RTM_NEWROUTE = 2, 20, 24
IFA_ADDRESS, IFA_LOCAL, RTA_OIF, RTA_GATEWAY = 1, 2, 4, 5
ROUTE = (254, 3, 0, 1)  # RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST

PACKED = struct.Struct("<1s72sd6s4s1s4s64s128s32s36s36s256s384s")
"""What `identify` is given, in hex, so that next to nothing is left to do with it: a step; struct
rand_pool_info with 64 bytes; the clock in seconds; MAC, address, length of the prefix, gateway
(zeros for none); host name; and what goes into FILES. Texts are filled up with spaces."""
SEEN = struct.Struct("<6s4s4sd")
"""What it answers, in hex: MAC, address, netmask and clock in seconds as the kernel says; then, a
line each, host name, machine-id, boot_id and UUID."""
FILES = {
    "hostname": "/etc/hostname",
    "hosts": "/etc/hosts",
    "machine-id": "/etc/machine-id",
    "boot_id": "/proc/sys/kernel/random/boot_id",
    "uuid": "/sys/class/dmi/id/product_uuid",
    "resolv.conf": "/etc/resolv.conf",
    "identity.json": "",
}
"""The files of an identity: names in /run/templated, and what they are mounted over."""
IDENTIFY, CLAIM, REHEARSAL = b"i", b"c", b"r"
STEPS = {IDENTIFY: "identify", CLAIM: "claim"}
"""All of an identity; its name, the time and entropy only, for a guest that has the rest; the same
without hooks, after which the guest may be paused."""
QUICK = b',"cmd":"identify","packed":"'
QUICK_DATA = -2 * PACKED.size - len(b'"}')
QUICK_HEAD = QUICK_DATA - len(QUICK)
PAGE = 4096
NO_GATEWAY = bytes(4)
TAKE_POOL, TAKE_MAC = struct.Struct("72s").pack_into, struct.Struct("6s").pack_into

join = b"".join
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode


class Refused(Exception):
    """A request that cannot be done; becomes an error reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_text(path: str) -> str:
    """The first 64 KiB of a file, stripped."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, CHUNK).decode().strip()
    finally:
        os.close(descriptor)


class System:
    """The guest's kernel, as far as an identity reaches into it. Tests put another in its place.

    Every method raises OSError when the kernel refuses.
    """

    run = "/run/templated"
    etc = "/etc"

    def __init__(self) -> None:
        self._random = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._descriptor = self._socket.fileno()
        names = [name for name in sorted(os.listdir("/sys/class/net")) if name != "lo"]
        self._interface = names[0].encode() if names else b""
        self._files: dict[str, int] = {}
        self._clear = False
        self._make_requests(socket.if_nametoindex(names[0]) if names else 0)

    def _make_requests(self, index: int) -> None:
        """All that is known of the requests to the kernel; the rest is put between the parts."""
        # fcntl.ioctl takes a bytearray in its first try, and bytes only in its second.
        self._pool = bytearray(72)
        self._ifreq = bytearray(struct.pack("16s24x", self._interface))
        self._set_mac = bytearray(struct.pack("16sH22x", self._interface, 1))  # ARPHRD_ETHER
        self._netlink = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._netlink.bind((0, 0))
        # The kernel has answered when it comes back from sending; this is in case it does not.
        self._netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 2, 0))
        flags = NLM_F_REQUEST | NLM_F_ECHO | NLM_F_EXCL | NLM_F_CREATE
        # nlmsghdr, then ifaddrmsg and two attributes, or rtmsg and two
        self._address_parts = (
            struct.pack("=IHHIIB", 40, RTM_NEWADDR, flags, 1, 0, socket.AF_INET),
            struct.pack("=BBIHH", 0, 0, index, 8, IFA_LOCAL),
            struct.pack("=HH", 8, IFA_ADDRESS),
        )
        self._route_parts = (
            struct.pack("=IHHII", 44, RTM_NEWROUTE, flags, 2, 0)
            + struct.pack("=8BIHH", socket.AF_INET, 0, 0, 0, *ROUTE, 0, 8, RTA_GATEWAY),
            struct.pack("=HHI", 8, RTA_OIF, index),
        )

    def prepare(self) -> None:
        """Bring the interfaces up, and lay files in memory over those that make an identity.

        Two of them the kernel fixes. The others lie on the disk, where a write costs more, and
        again when it is written back.
        """
        os.makedirs(self.run, exist_ok=True)
        for interface in (b"lo", self._interface):
            if interface:
                self._up(interface)
        for name, target in FILES.items():
            if target.startswith("/etc/"):
                open(target, "ab").close()
            if os.path.exists(target):
                self._cover(target, f"{self.run}/{name}")
        self.open_files()

    def open_files(self) -> None:
        """Hold the files of the identity open."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._files = {name: os.open(f"{self.run}/{name}", flags, 0o644) for name in FILES}

    def _up(self, name: bytes) -> None:
        request = fcntl.ioctl(self._socket, SIOCGIFFLAGS, struct.pack("16s24x", name))
        (flags,) = struct.unpack_from("H", request, 16)
        fcntl.ioctl(self._socket, SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | IFF_UP))

    def _cover(self, target: str, source: str) -> None:
        if os.path.exists(source):
            return  # an earlier agent of this boot has done it
        with open(target, "rb") as old, open(source, "wb") as new:
            new.write(old.read())
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(source.encode(), target.encode(), None, MS_BIND, None) != 0:
            code = ctypes.get_errno()
            os.unlink(source)
            raise OSError(code, os.strerror(code), target)

    def write(self, name: str, data: bytes) -> None:
        """Replace the content of a file of the identity in place, and read it back."""
        descriptor = self._files[name]
        os.pwrite(descriptor, data, 0)
        if os.pread(descriptor, PAGE, 0) != data:  # it was longer
            os.ftruncate(descriptor, len(data))
            if os.pread(descriptor, PAGE, 0) != data:
                raise OSError(errno.EIO, "does not keep what is written to it", name)

    def read(self, name: str) -> bytes:
        """The content of a file of the identity, at most a page."""
        return os.pread(self._files[name], PAGE, 0)

    def forget(self) -> None:
        """Empty the files whose length is not fixed, but for a byte that keeps their page."""
        for name in ("hostname", "hosts", "resolv.conf", "identity.json"):
            os.ftruncate(self._files[name], 1)

    def add_entropy(self, request: bytes) -> None:
        """Mix in a struct rand_pool_info, and reseed the kernel's generator now."""
        TAKE_POOL(self._pool, 0, request)
        fcntl.ioctl(self._random, RNDADDENTROPY, self._pool)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)

    def set_clock(self, seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, seconds)

    def set_hostname(self, name: bytes) -> None:
        socket.sethostname(name)  # type: ignore[arg-type]  # it takes what os.fsencode takes

    def hostname(self) -> bytes:
        return join((socket.gethostname().encode(), b"\n"))

    def set_mac(self, mac: bytes) -> None:
        TAKE_MAC(self._set_mac, 18, mac)
        fcntl.ioctl(self._descriptor, SIOCSIFHWADDR, self._set_mac)

    def mac(self) -> bytes | bytearray:
        fcntl.ioctl(self._descriptor, SIOCGIFHWADDR, self._ifreq)
        return self._ifreq[18:24]

    def set_address(self, ip: bytes, prefix: bytes, gateway: bytes) -> None:
        """Give the interface its only IPv4 address, and the default route through `gateway`."""
        if not self._clear:
            self.clear_address()
        self._clear = False
        head, local, address = self._address_parts
        self._ask(join((head, prefix, local, ip, address, ip)))
        if gateway != NO_GATEWAY:
            head, device = self._route_parts
            message = join((head, gateway, device))
            if self._ask(message)[-16:] != message[-16:]:
                raise OSError(errno.EIO, "the kernel has made another default route")

    def _ask(self, message: bytes) -> bytes:
        """Send a netlink request; returns what the kernel has made of it (NLM_F_ECHO)."""
        self._netlink.send(message)
        answer = self._netlink.recv(PAGE)
        if answer[4] == NLMSG_ERROR:
            code = -int.from_bytes(answer[16:20], "little", signed=True)
            raise OSError(code, os.strerror(code), "rtnetlink")
        return answer

    def clear_address(self) -> None:
        """Take the interface's IPv4 address away, and with it every route through it."""
        if self._interface:
            request = struct.pack("16sHH4s16x", self._interface, socket.AF_INET, 0, bytes(4))
            fcntl.ioctl(self._descriptor, SIOCSIFADDR, request)
        self._clear = True

    def address(self) -> tuple[bytes | bytearray, bytes | bytearray]:
        """The interface's IPv4 address and its netmask."""
        fcntl.ioctl(self._descriptor, SIOCGIFADDR, self._ifreq)
        ip = self._ifreq[20:24]
        fcntl.ioctl(self._descriptor, SIOCGIFNETMASK, self._ifreq)
        return ip, self._ifreq[20:24]

    def hooks(self) -> list[str]:
        """The executables in /etc/templated/identity.d, in name order."""
        folder = self.etc + "/templated/identity.d"
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        paths = [f"{folder}/{name}" for name in sorted(names) if not name.startswith(".")]
        return [path for path in paths if os.access(path, os.X_OK)]

    def sync(self) -> None:
        os.sync()


class Execution:
    """A command that runs for the host: its pipes, its end and its deadline."""

    def __init__(self, agent: Agent, number: Any, request: dict[str, Any]) -> None:
        argv = request["argv"]
        if not isinstance(argv, list) or not argv:
            raise Refused("invalid", "argv must be a list that is not empty")
        self._agent, self._number = agent, number
        self._connection = agent.connection
        self._stdin = memoryview(binascii.a2b_base64(request.get("stdin") or ""))
        timeout = min(float(request.get("timeout") or 30.0), MAX_EXEC_SECONDS)
        self.deadline: float | None = time.monotonic() + timeout
        self.timed_out = False
        self._ended = False
        self._process = subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.PIPE if self._stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **(request.get("env") or {})},
            cwd=request.get("cwd") or "/",
            bufsize=0,
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        agent.watch(self._pidfd, select.EPOLLIN, self._on_exit)
        self._streams: dict[int, str] = {}
        for name in ("stdout", "stderr"):
            descriptor = getattr(self._process, name).fileno()
            os.set_blocking(descriptor, False)
            self._streams[descriptor] = name
        self.paused = True
        self.resume()
        if self._process.stdin:
            os.set_blocking(self._process.stdin.fileno(), False)
            agent.watch(self._process.stdin.fileno(), select.EPOLLOUT, self._on_stdin)

    def resume(self) -> None:
        """Read the command's output again."""
        if self.paused:
            self.paused = False
            for descriptor in self._streams:
                self._agent.watch(descriptor, select.EPOLLIN, self._on_output)
            if self._ended:
                self.deadline = time.monotonic() + DRAIN_SECONDS

    def pause(self) -> None:
        """Stop reading: the host takes its output more slowly than the command makes it."""
        if not self.paused:
            self.paused = True
            for descriptor in self._streams:
                self._agent.unwatch(descriptor)
            if self._ended:
                self.deadline = None

    def expire(self) -> None:
        """The deadline came: of the command, or of output that others still hold open."""
        self.deadline = None
        if self._ended:
            self._finish()
            return
        self.timed_out = True
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _on_stdin(self, descriptor: int, events: int) -> None:
        try:
            self._stdin = self._stdin[os.write(descriptor, self._stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self._stdin = self._stdin[:0]
        if not self._stdin:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._agent.unwatch(self._process.stdin.fileno())
            self._process.stdin.close()

    def _on_output(self, descriptor: int, events: int) -> None:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return
        if data:
            text = binascii.b2a_base64(data, newline=False).decode()
            frame = {
                "id": self._number,
                "stream": self._streams[descriptor],
                "data": text,
            }
            self._agent.send(frame, self._connection)
            return
        self._agent.unwatch(descriptor)
        del self._streams[descriptor]
        if self._ended and not self._streams:
            self._finish()

    def _on_exit(self, descriptor: int, events: int) -> None:
        self._process.wait()
        self._agent.unwatch(descriptor)
        os.close(descriptor)
        self._ended = True
        self._close_stdin()
        # A grandchild may keep the pipes open; what it writes is waited for only so long.
        self.deadline = None if self.paused else time.monotonic() + DRAIN_SECONDS
        if not self._streams:
            self._finish()

    def _finish(self) -> None:
        for descriptor in self._streams:
            self._agent.unwatch(descriptor)
        self._streams = {}
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        code = self._process.returncode
        result = {
            "exit_code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "timed_out": self.timed_out,
        }
        self._agent.executions.discard(self)
        self._agent.reply(self._number, result, self._connection)


class Agent:
    """The protocol on a port: `fd_in` and `fd_out` are non-blocking, and may be the same.

    `serve` runs until `stop` is set. Nothing that a request contains ends it.
    """

    def __init__(self, fd_in: int, fd_out: int, system: System) -> None:
        self._in, self._out, self._system = fd_in, fd_out, system
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int, int], None]] = {}
        self._input = bytearray()
        self._skipping = False
        self._queue: collections.deque[memoryview] = collections.deque()
        self._queued = 0
        self._retry = False
        self._connected = False
        self._grace: float | None = None
        self.connection = 0
        """Counts connections: the end of a command must not reach a later one."""
        self.executions: set[Execution] = set()
        self.stop = False
        self._identified = False
        self._marked_at = 0.0
        self._hooks: list[str] | None = None
        self._parked = False
        self._number: Any = None
        # Edge-triggered, as a port without a host reports EPOLLHUP for ever.
        edges = select.EPOLLIN | select.EPOLLET
        if fd_in == fd_out:
            self.watch(fd_in, edges | select.EPOLLOUT, self._on_port)
        else:
            self.watch(fd_in, edges, self._on_port)
            self.watch(fd_out, select.EPOLLOUT | select.EPOLLET, self._on_port)

    @property
    def queued(self) -> int:
        """Bytes that wait for the host to take them."""
        return self._queued

    def close(self) -> None:
        """Let go of the port; its descriptors stay open."""
        self._epoll.close()

    def watch(self, descriptor: int, events: int, handler: Callable[[int, int], None]) -> None:
        """Have `handler` called with the descriptor and its events."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """End `watch`; nothing happens when there was none."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def serve(self) -> None:
        """Answer requests until `stop`."""
        while not self.stop:
            if self._parked:
                self._park()
            self.turn(None)

    def _park(self) -> None:
        """Be frozen in a plain read, and answer identify there; return on anything else.

        A clone's first code is what follows that read, and an idle one has run no other.
        """
        data = b""
        os.set_blocking(self._in, True)
        try:
            while True:
                data = os.read(self._in, PAGE)
                line = data.strip()
                if line or not data:  # more than the empty lines of a new connection, or its end
                    reply = self._quick(line)
                    if reply is None:
                        break
                    os.write(self._out, reply)
                    self._marked_at = time.monotonic()
        except (Refused, ValueError, OSError, struct.error):
            pass  # it is tried once more below, where a failure is answered
        os.set_blocking(self._in, False)
        self._parked, self._connected = False, True
        self._begin()
        self._take(data)
        self._receive()

    def turn(self, limit: float | None) -> None:
        """Wait for something, at most `limit` seconds, and handle it."""
        for descriptor, events in self._epoll.poll(self._wait(limit)):
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler(descriptor, events)
        if self._grace is not None and self._grace <= time.monotonic():
            self._disconnect()
        if self._retry:
            self._flush()
        if self.executions:
            now = time.monotonic()
            for execution in list(self.executions):
                if execution.deadline is not None and execution.deadline <= now:
                    execution.expire()

    def _wait(self, limit: float | None) -> float | None:
        if not self.executions and not self._retry and self._grace is None:
            return limit
        due = [item.deadline for item in self.executions if item.deadline is not None]
        if self._grace is not None:
            due.append(self._grace)
        waits = [max(0.0, min(due) - time.monotonic())] if due else []
        if self._retry:
            waits.append(0.1)  # in case the port does not tell that there is room again
        if limit is not None:
            waits.append(limit)
        return min(waits, default=None)

    def _on_port(self, descriptor: int, events: int) -> None:
        if descriptor == self._in:
            if not events & (select.EPOLLHUP | select.EPOLLERR):
                self._connected, self._grace = True, None
            elif self._grace is None:
                self._disconnect()
            if events & select.EPOLLIN:
                self._receive()
        if self._queue:
            self._flush()

    def _disconnect(self) -> None:
        self._connected = self._skipping = self._retry = False
        self._grace = None
        self._input.clear()
        self._drop_output()

    def _drop_output(self) -> None:
        self._queue.clear()
        self._queued = 0
        for execution in self.executions:
            execution.resume()

    def _begin(self) -> None:
        """A new connection: its first line is empty, or ends what an old one left half-said."""
        self.connection += 1
        self._drop_output()

    def _receive(self) -> None:
        """Read all there is and handle the lines."""
        while True:
            try:
                data = os.read(self._in, CHUNK)
            except OSError:  # nothing more for now, or a broken port
                return
            if not data:
                return
            if not self._connected:
                # Data may overtake the notice that the host is there, which the kernel handles
                # in a work queue. Until then writing fails, and what is to be said is kept.
                self._connected = True
                self._grace = time.monotonic() + GRACE_SECONDS
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._input += data
        while (end := self._input.find(b"\n")) >= 0:
            line = bytes(self._input[:end])
            del self._input[: end + 1]
            if self._skipping:
                self._skipping = False
            elif len(line) > MAX_LINE:
                self.refuse(None, "too_long", "a line is longer than 1 MiB")
            elif line and not line.isspace():
                self._handle(line)
            else:
                self._begin()
        if self._skipping:
            self._input.clear()
        elif len(self._input) > MAX_LINE:
            self._skipping = True
            self._input.clear()
            self.refuse(None, "too_long", "a line is longer than 1 MiB")

    def _handle(self, line: bytes) -> None:
        number = None
        try:
            request = self._parse(line)
            if not isinstance(request, dict):
                raise Refused("invalid", "a request must be an object")
            number = request.get("id")
            command = COMMANDS.get(cast(str, request.get("cmd")))
            if command is None:
                raise Refused("unknown_command", f"no command {request.get('cmd')!r}")
            self._number = number
            result = command(self, request)
            if result is not None:
                self.reply(number, result, self.connection)
                if command in (Agent.quiesce, Agent.identify):
                    self._marked_at = time.monotonic()
        except Refused as error:
            self.refuse(number, error.code, str(error))
        except (KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
            self.refuse(number, "invalid", f"{type(error).__name__}: {error}")
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "os").lower()
            self.refuse(number, code, str(error))

    def _parse(self, line: bytes) -> Any:
        try:
            return _decode(line.decode())
        except ValueError:
            self._begin()
            raise

    def reply(self, number: Any, result: dict[str, Any], connection: int) -> None:
        """Send the good end of request `number`."""
        self.send({"id": number, "ok": True, "result": result}, connection)

    def refuse(self, number: Any, code: str, message: str) -> None:
        """Send the bad end of request `number`."""
        body = {
            "id": number,
            "ok": False,
            "error": {"code": code, "message": message[:2000]},
        }
        self.send(body, self.connection)

    def send(self, message: dict[str, Any], connection: int) -> None:
        """Queue a line for the host; dropped when its connection is over."""
        if not self._connected or connection != self.connection:
            return
        line = (_encode(message) + "\n").encode()
        self._queue.append(memoryview(line))
        self._queued += len(line)
        self._flush()
        if self._queued > QUEUE_LIMIT:
            for execution in self.executions:
                execution.pause()

    def _flush(self) -> None:
        self._retry = False
        while self._queue:
            head = self._queue[0]
            try:
                count = os.write(self._out, head)
            except BlockingIOError:
                self._retry = True
                break
            except OSError:
                self._drop_output()
                return
            self._queued -= count
            if count == len(head):
                self._queue.popleft()
            else:
                self._queue[0] = head[count:]
        if self._queued <= QUEUE_LIMIT // 2:
            for execution in self.executions:
                execution.resume()

    def ping(self, request: dict[str, Any]) -> dict[str, Any]:
        """Say that the agent is there."""
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "time": time.time(),
            "identified": self._identified,
        }

    def identify(self, request: dict[str, Any]) -> dict[str, Any]:
        """Become the machine that `packed` describes; returns what the kernel then says."""
        return {"seen": self._become(str(request["packed"]).encode()).decode()}

    def _quick(self, line: bytes) -> bytes | None:
        """The reply to an identify of the shape that the host gives it; None for all else."""
        head = line[:QUICK_HEAD]
        if line[QUICK_HEAD:QUICK_DATA] != QUICK or head[:6] != b'{"id":' or len(head) > 20:
            return None
        seen = self._become(line[QUICK_DATA:-2])
        return join((head, b',"ok":true,"result":{"seen":"', seen, b'"}}\n'))

    def _become(self, packed: bytes) -> bytes:
        """Take the identity that PACKED tells of; returns SEEN. Straight on: every turn costs."""
        values = PACKED.unpack(binascii.unhexlify(packed))
        step, entropy, now, mac, ip, prefix, gateway = values[:7]
        name, hosts, machine_id, boot_id, uid, dns, facts = values[7:]
        system = self._system
        write, read = system.write, system.read
        system.add_entropy(entropy)
        if self._marked_at:  # `now` was then, not now
            now += time.monotonic() - self._marked_at
        system.set_clock(now)
        name = name.rstrip()
        system.set_hostname(name)
        write("hostname", join((name, b"\n")))
        write("hosts", join((hosts.rstrip(), b"\n")))
        if step == IDENTIFY:
            write("machine-id", join((machine_id, b"\n")))
            write("boot_id", join((boot_id, b"\n")))
            write("uuid", join((uid, b"\n")))
            dns = dns.rstrip()
            if dns:
                write("resolv.conf", join((dns, b"\n")))
            system.set_mac(mac)
            system.set_address(ip, prefix, gateway)
        hooks, self._hooks = self._hooks, None
        if hooks is None:
            hooks = system.hooks()
        if step == REHEARSAL:  # what follows is a claim, with these hooks
            hooks, self._hooks, self._parked = [], hooks, not self.executions
        if hooks:
            run_hooks(hooks, {"step": STEPS[step], **_decode(facts.decode())})
        write("identity.json", join((facts.rstrip(), b"\n")))
        self._identified = True
        ip, netmask = system.address()
        seen = SEEN.pack(system.mac(), ip, netmask, time.time())
        texts = (seen, system.hostname(), read("machine-id"), read("boot_id"), read("uuid"))
        return binascii.hexlify(join(texts))

    def clock(self, request: dict[str, Any]) -> dict[str, Any]:
        """Shift the wall clock by `adjust` seconds."""
        self._system.set_clock(time.time() + float(request["adjust"]))
        return {"time": time.time()}

    def quiesce(self, request: dict[str, Any]) -> dict[str, Any]:
        """Prepare to be frozen: no address, clean file systems, no garbage to collect later."""
        self._system.clear_address()
        self._system.forget()
        self._system.sync()
        self._hooks = self._system.hooks()  # none can come while it is frozen
        gc.collect()
        gc.freeze()
        self._parked = not self.executions
        return {"executions": len(self.executions)}

    def execute(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Start a command; its reply follows when it ends."""
        cwd = request.get("cwd") or "/"
        try:
            self.executions.add(Execution(self, self._number, request))
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            if error.filename == cwd:
                raise Refused("bad_cwd", f"{cwd}: {error.strerror}") from error
            missing = not isinstance(error, PermissionError)
            return {
                "exit_code": 127 if missing else 126,
                "signal": None,
                "timed_out": False,
                "error": "not_found" if missing else "not_executable",
            }
        return None

    def put(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write one chunk of a file; it appears under its name with the last one."""
        path, offset = os.fspath(request["path"]), int(request.get("offset", 0))
        part = path + ".templated-part"
        data = binascii.a2b_base64(request["data"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if offset == 0 else 0)
        descriptor = os.open(part, flags, 0o600)
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(descriptor, view, offset)
                offset, view = offset + count, view[count:]
            if request.get("eof"):
                os.fchmod(descriptor, int(request.get("mode", 0o644)) & 0o7777)
        finally:
            os.close(descriptor)
        if request.get("eof"):
            try:
                os.replace(part, path)
            except OSError as error:
                if error.errno != errno.EBUSY:  # another file is mounted over it
                    raise
                shutil.copyfile(part, path)
                os.unlink(part)
        return {"size": offset}

    def get(self, request: dict[str, Any]) -> dict[str, Any]:
        """Read one chunk of a file."""
        offset = int(request.get("offset", 0))
        length = min(int(request.get("length", CHUNK)), CHUNK)
        descriptor = os.open(request["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
        # Files in /proc have size 0: only an empty read tells their end.
        eof = len(data) == 0 or 0 < status.st_size <= offset + len(data)
        text = binascii.b2a_base64(data, newline=False).decode()
        mode = status.st_mode & 0o7777
        return {"data": text, "eof": eof, "size": status.st_size, "mode": mode}


COMMANDS: dict[str, Callable[[Agent, dict[str, Any]], dict[str, Any] | None]] = {
    "ping": Agent.ping,
    "identify": Agent.identify,
    "clock": Agent.clock,
    "exec": Agent.execute,
    "put": Agent.put,
    "get": Agent.get,
    "quiesce": Agent.quiesce,
}


def run_hooks(paths: list[str], identity: dict[str, str]) -> None:
    """Run the identity hooks in order, HOOK_SECONDS for all; Refused when one fails."""
    end = time.monotonic() + HOOK_SECONDS
    extra = {f"TEMPLATED_{name.upper()}": value for name, value in identity.items()}
    for path in paths:
        # The output goes to a file: a child that a hook leaves behind would hold a pipe open.
        output = os.memfd_create("hook")
        try:
            process = subprocess.Popen(
                [path],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**ENVIRONMENT, **extra},
                cwd="/",
                start_new_session=True,
            )
            try:
                code = process.wait(max(0.01, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise Refused("hook", f"{path}: not done in {HOOK_SECONDS:g} s") from None
            if code != 0:
                size = os.lseek(output, 0, os.SEEK_END)
                tail = os.pread(output, 500, max(0, size - 500)).decode(errors="replace")
                raise Refused("hook", f"{path}: exit code {code}: {tail.strip()}")
        finally:
            os.close(output)


def open_port() -> int:
    """Open the virtio port named PORT, and link it where udev would; waits up to 10 s for it."""
    for _ in range(100):
        base = "/sys/class/virtio-ports"
        for port in os.listdir(base) if os.path.isdir(base) else []:
            if read_text(f"{base}/{port}/name") == PORT:
                os.makedirs("/dev/virtio-ports", exist_ok=True)
                link = f"/dev/virtio-ports/{PORT}"
                if not os.path.islink(link):
                    os.symlink(f"/dev/{port}", link)
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        time.sleep(0.1)
    raise SystemExit(f"templated: no virtio port {PORT}")


def main() -> None:
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    os.umask(0o022)
    system = System()
    system.prepare()
    port = open_port()
    agent = Agent(port, port, system)
    print("templated: agent ready", flush=True)
    agent.serve()


if __name__ == "__main__":
    main()
