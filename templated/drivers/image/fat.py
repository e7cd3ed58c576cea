"""Small FAT file systems, for firmware and for cloud-init: mkfs.vfat (dosfstools) and mtools."""

from __future__ import annotations

from pathlib import Path

from templated.drivers.host.programs import run


async def make_fat(target: Path, label: str, kibibytes: int, tree: Path) -> None:
    """Make a file system in the new file `target`, with all that is in the directory `tree`.

    Raises HostError when a program is missing or fails; the file may be there then.
    """
    await run("mkfs.vfat", "-n", label, "-C", str(target), str(kibibytes))
    names = sorted(str(path) for path in tree.iterdir())
    await run("mcopy", "-s", "-i", str(target), *names, "::")
