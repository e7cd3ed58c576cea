"""Tap devices, by the ioctls of /dev/net/tun (kernel: Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import fcntl
import os
import struct

from templated import failpoints

_DEVICE = "/dev/net/tun"
# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETOWNER = 0x400454CC
_TUNSETPERSIST = 0x400454CB
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_TUN_EXCL = 0x8000


def open_tap(name: str, *, new: bool) -> int:
    """A non-blocking fd of the tap `name`, which is gone again when the fd closes (`persist`).

    No IFF_VNET_HDR: QEMU refuses to load a virtio-net state with another setting than it was
    saved with, and a template has none. With `new`, OSError(EBUSY) when the name exists;
    without, EBUSY when a process has it open. Other OSErrors: no permission, no tun module.
    """
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_TUN_EXCL if new else 0)
    if failpoints.armed:
        failpoints.hit("network.tap")
    fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # struct ifreq: 16 bytes of name, then a union of 24 that starts with the flags
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if new:
            # Without an owner whoever can open the device may take one that nobody has open.
            fcntl.ioctl(fd, _TUNSETOWNER, os.geteuid())
    except BaseException:
        os.close(fd)
        raise
    return fd


def persist(fd: int) -> None:
    """Keep the tap after its fds are closed. Raises OSError."""
    if failpoints.armed:
        failpoints.hit("network.persist")
    fcntl.ioctl(fd, _TUNSETPERSIST, 1)


def probe() -> None:
    """Make a tap and close it: the only sure test of the permission. Raises OSError."""
    # The kernel puts the first free number in place of %d.
    os.close(open_tap("tpprobe%d", new=False))
