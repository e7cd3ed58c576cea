"""The second disk, and what is in it: a function's code, read-only, at /var/task."""

from __future__ import annotations

import ctypes
import fcntl
import os

from .wire import Refused

# linux/mount.h, linux/fs.h
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
BLKFLSBUF = 0x1261
UUID_AT, UUID_BYTES = 1024 + 48, 16  # of the superblock of erofs (fs/erofs/erofs_fs.h)


class Drive:
    """The disk of the code. Nobody else may have it open: the kernel would go on showing what was
    read before the host exchanged it.

    Every method raises OSError when the kernel refuses.
    """

    root = "/var/task"

    def __init__(self, device: str = "/dev/vdb") -> None:
        self._device = device
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._mount_arguments = (
            device.encode(),
            self.root.encode(),
            b"erofs",
            ctypes.c_ulong(MS_RDONLY | MS_NOSUID | MS_NODEV),
            None,
        )
        os.makedirs(self.root, exist_ok=True)

    def attach(self, uuid: bytes | None) -> None:
        """Mount it and prove by its UUID that it is the right one; None: whatever is there.

        Refused when it is another; it is then not mounted.
        """
        found = self._attach()
        if uuid is None or found == uuid:
            return
        # The kernel may remember another disk: the reader of these pages has to be the last one.
        self.detach()
        self._flush()
        found = self._attach()
        if found != uuid:
            self.detach()
            raise Refused("code", f"the code is not the right one: its UUID is {found.hex()}")

    def _attach(self) -> bytes:
        if self._libc.mount(*self._mount_arguments) != 0:
            self._fail("mount")
        try:
            # The mount shares these pages: what is read here is what it has read itself.
            descriptor = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, UUID_BYTES, UUID_AT)
            finally:
                os.close(descriptor)
        except OSError:
            self.detach()
            raise

    def detach(self) -> None:
        """Unmount it. With the last who has it open, the kernel forgets what it has read."""
        if self._libc.umount2(self._mount_arguments[1], 0) != 0:
            self._fail("umount")

    def _flush(self) -> None:
        descriptor = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, BLKFLSBUF, 0)
        finally:
            os.close(descriptor)

    def _fail(self, what: str) -> None:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}", self._device)
