"""A disk that boots by itself: a partition table, GRUB for BIOS and UEFI, and the root.

No device is needed for that: GRUB's first two stages for BIOS lie where they look for each other
by default, in sector 0 and from sector 1 on (boot.S and diskboot.S of GRUB 2.06 and 2.12). UEFI
finds its own on a FAT partition under the name for removable disks (UEFI 2.10, 3.5.1.1).
"""

from __future__ import annotations

import struct
from pathlib import Path

from templated.errors import BuildError

SECTOR = 512
START = 2048
"""The first partition's first sector; GRUB's second stage lies before it."""
ESP_KIB = 16384
EFI_NAME = "EFI/BOOT/BOOTX64.EFI"
FORMATS = {
    "i386-pc": ("biosdisk",),
    "x86_64-efi": ("efi_gop",),
}
"""GRUB's platforms, with the modules that each needs beside MODULES."""
MODULES = (
    *("part_msdos", "ext2", "search_fs_uuid", "normal", "configfile", "linux", "echo"),
    *("serial", "terminal"),
)
_CODE, _SIGNATURE = 440, 0xFE
_LINUX, _EFI_SYSTEM = 0x83, 0xEF


def find_script(root: str) -> str:
    """What GRUB does first, on either firmware: find the file system `root`, a UUID."""
    return f"search.fs_uuid {root} root\nset prefix=($root)/boot/grub\n"


def boot_script(kernel: str, initrd: str, root: str) -> str:
    """grub.cfg: one entry, at once, all of it on the serial console."""
    return (
        "set timeout=0\n"
        "serial --unit=0 --speed=115200\n"
        "terminal_output serial\n"
        f"linux /boot/{kernel} root=UUID={root} ro quiet console=ttyS0\n"
        f"initrd /boot/{initrd}\n"
        "boot\n"
    )


def root_sectors(size: int) -> int:
    """Sectors for the root on a disk of `size` bytes, beside all that `first_sectors` names.

    Raises BuildError when there are none.
    """
    sectors = size // SECTOR - START - ESP_KIB * 1024 // SECTOR
    if sectors <= 0:
        raise BuildError(
            f"image.size, {size >> 20} MiB, has no room for a boot loader and a system",
            hint="set image.size: 2GiB",
        )
    return sectors


def first_sectors(boot: bytes, core: bytes, root: int, esp: int) -> bytes:
    """All before the first partition: boot code, partition table, and GRUB's second stage.

    `boot` and `core` are its boot.img and core.img; `root` and `esp` the sizes of the partitions,
    in sectors. Raises BuildError when the second stage has no room.
    """
    if len(core) > (START - 1) * SECTOR:
        raise BuildError("GRUB is larger than the room before the first partition")
    table = _entry(0x80, _LINUX, START, root) + _entry(0, _EFI_SYSTEM, START + root, esp)
    head = boot[:_CODE].ljust(_CODE, b"\0") + struct.pack("<IH", _SIGNATURE, 0)
    return head + table.ljust(64, b"\0") + b"\x55\xaa" + core


def _entry(status: int, kind: int, start: int, count: int) -> bytes:
    # By sectors alone: cylinders and heads say "too large for us".
    return struct.pack("<B3sB3sII", status, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start, count)


def newest(folder: Path, pattern: str) -> str:
    """The name of the only file of its kind in /boot; BuildError when there is none."""
    names = sorted(path.name for path in folder.glob(pattern))
    if not names:
        raise BuildError(
            f"the image has no /boot/{pattern}",
            hint="set image.kernel to a package such as linux-image-cloud-amd64",
        )
    return names[-1]
