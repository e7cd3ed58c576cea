"""A qcow2 file that somebody brings: what may be wrong with it, found before QEMU opens it.

A qcow2 file can name other files of the host, which QEMU would open. So its header is read here.
Format: QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from templated.errors import BuildError

# magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method
_HEAD = struct.Struct(">4sIQIIQI")
_MAGIC = b"QFI\xfb"
_FEATURES, _HEADER_3 = 72, 104
"""Offset of the incompatible features of version 3, and the least size of its header."""
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_KNOWN = 0b11111
"""dirty, corrupt, external data file, compression type, extended L2 entries."""


def check_qcow2(path: Path) -> int:
    """Read a file's header; the bytes of the disk in it.

    Raises BuildError, in one line, unless it is a qcow2 that stands alone. Blocks. Whether what
    follows is sound, and whether a VM uses it, `qemu-img check` says.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refused(path, "it is no file")
            head = os.read(descriptor, _HEADER_3)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from error
    if (problem := header_problem(head)) is not None:
        raise refused(path, *problem)
    return int(_HEAD.unpack_from(head)[5])


def header_problem(head: bytes) -> tuple[str, str] | None:
    """What is wrong with the first bytes of a file as a qcow2, and what to do; None: nothing."""
    convert = "convert it: qemu-img convert -O qcow2 OLD NEW"
    if not head.startswith(_MAGIC) or len(head) < _HEAD.size:
        return "it is no qcow2 file, whatever its name says", convert
    _, version, backing, _, _, _, crypt = _HEAD.unpack_from(head)
    if version not in (2, 3):
        return f"it is a qcow2 of version {version}, which is not known here", convert
    if backing:
        return "it has a backing file, and an image must stand alone", convert
    if crypt:
        return "it is encrypted", "decrypt it: qemu-img convert, with its secret"
    if version == 3:
        if len(head) < _HEADER_3:
            return "its header is cut off", "copy it again"
        (features,) = struct.unpack_from(">Q", head, _FEATURES)
        if features & _DATA_FILE:
            return "its content is in another file", convert
        if features & _CORRUPT:
            return "it is marked as corrupt", "repair a copy: qemu-img check -r all COPY"
        if features & ~_KNOWN:
            return "it has features that are not known here", convert
    return None


def refused(path: Path, problem: str, hint: str = "correct image.path") -> BuildError:
    """The error for an image's file that cannot be used."""
    return BuildError(f"image.path {path}: {problem}", hint=hint)
