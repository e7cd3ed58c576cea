"""The guest's kernel, as far as an identity and the agent's port reach into it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import time

from .wire import CHUNK, PAGE, PORT, join

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
CODE_SERIAL = "templated-code"
NO_GATEWAY = bytes(4)
TAKE_POOL, TAKE_MAC = struct.Struct("72s").pack_into, struct.Struct("6s").pack_into


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


def read_text(path: str) -> str:
    """The first 64 KiB of a file, stripped."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, CHUNK).decode().strip()
    finally:
        os.close(descriptor)


def has_code() -> bool:
    """Whether this machine has the second disk, for the code of a function."""
    try:
        return read_text("/sys/block/vdb/serial") == CODE_SERIAL
    except (OSError, ValueError):
        return False


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
