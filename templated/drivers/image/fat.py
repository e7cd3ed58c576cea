"""Small FAT file systems, for firmware and for cloud-init: mkfs.vfat (dosfstools) and mtools."""

from __future__ import annotations

from pathlib import Path

from templated.drivers.image.namespaces import ended
from templated.errors import BuildError

PROGRAMS = ("mkfs.vfat", "mcopy")


async def make_fat(target: Path, label: str, kibibytes: int, tree: Path) -> None:
    """Make a file system in the new file `target`, with all that is in the directory `tree`.

    Raises BuildError when it does not fit, or a program fails; the file may be there then.
    """
    names = sorted(str(path) for path in tree.iterdir())
    for command in (
        ["mkfs.vfat", "-n", label, "-C", str(target), str(kibibytes)],
        ["mcopy", "-s", "-i", str(target), *names, "::"],
    ):
        code, said = await ended(command, target.parent)
        if code != 0:
            raise BuildError(f"{command[0]} failed: {said or f'exit code {code}'}")
