"""The initial RAM disk of a guest: busybox, the virtio drivers and a shell script.

Debian's own (initramfs-tools) takes seconds to unpack and probe under TCG; this one holds what a
virtio machine needs and no more. It is not compressed: QEMU hands it over in memory, and
unpacking it in an emulated CPU costs more than copying it.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel ("newc").
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterator
from pathlib import Path

DRIVERS = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "erofs",  # of the code of functions
)
APPLETS = ("sh", "mount", "insmod", "sleep", "reboot", "switch_root")
_FOLDERS = ("bin", "dev", "proc", "sys", "mnt", "modules")


class Newc:
    """A cpio archive in the newc format, in memory; everything in it belongs to root."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(
        self,
        name: str,
        mode: int,
        content: bytes = b"",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        """Append one entry; `mode` with its file type, `device` as major and minor."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,
            0,
            1,
            0,
            len(content),
            0,
            0,
            *device,
            len(encoded),
            0,
        )
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._pad()
        self._data += content
        self._pad()

    def finish(self) -> bytes:
        """The archive with its trailer."""
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def driver_order(tree: Path, names: tuple[str, ...] = DRIVERS) -> list[Path]:
    """The files under `tree` that load `names`, each after those it depends on.

    A name without a file is taken as built into the kernel. Each module names its own
    dependencies (modinfo's `depends`), so no modules.dep is needed.
    """
    files = {_module_name(path): path for path in tree.rglob("*.ko*")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:
            return
        for dependency in _depends(path):
            visit(dependency)
        order.append(path)

    for name in names:
        visit(name)
    return order


def build_initramfs(script: bytes, busybox: bytes, modules: list[Path]) -> bytes:
    """The archive: `script` as /init, the modules, and their order in /modules/order."""
    archive = Newc()
    for folder in _FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    # The kernel opens the console before the script can mount a devtmpfs.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, script)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox)
    for applet in APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    names = [f"{_module_name(path)}.ko" for path in modules]
    for name, path in zip(names, modules, strict=True):
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, _read_module(path))
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{n}\n" for n in names).encode())
    return archive.finish()


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _read_module(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _depends(path: Path) -> Iterator[str]:
    """The names in the `depends=` string of a module's .modinfo section."""
    content = _read_module(path)
    start = content.find(b"\0depends=")
    if start >= 0:
        text = content[start + 9 : content.index(b"\0", start + 1)].decode()
        yield from (name.replace("-", "_") for name in text.split(",") if name)
