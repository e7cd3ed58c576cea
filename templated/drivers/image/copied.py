"""An image from a file that somebody brings: checked, and copied, so that it never changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from templated.drivers.image import fat
from templated.drivers.image.namespaces import Progress, check_programs, ended
from templated.drivers.image.qcow2 import check_qcow2, refused
from templated.errors import BuildError
from templated.model.spec import ImageSpec, SeedSpec
from templated.model.units import size_bytes

_LEAKS = 3
"""The exit code of `qemu-img check` for clusters that nobody uses: no harm."""
_SEED_ROOM = 128
"""KiB of the seed's file system beside its files."""


class ImageCopy:
    """One copy in `work`, a directory of its own. `run` leaves the files in `work/out`."""

    def __init__(self, spec: ImageSpec, work: Path, progress: Progress) -> None:
        assert spec.path is not None
        self._spec, self._path, self._work = spec, Path(spec.path), work
        self._progress = progress
        self.out = work / "out"

    async def run(self) -> None:
        """Make disk.qcow2, and seed.img where there is a seed.

        Raises BuildError for a file that cannot be used, HostError when a program is missing. The
        file itself is only read.
        """
        check_programs("qemu-img", *(fat.PROGRAMS if self._spec.seed else ()))
        self.out.mkdir(mode=0o755)
        self._progress("check")
        self._require_size(await asyncio.to_thread(check_qcow2, self._path))
        await self._check()
        self._progress("copy")
        target = self.out / "disk.qcow2"
        command = ["cp", "--reflink=auto", "--sparse=always", "--", str(self._path), str(target)]
        code, said = await ended(command, self._work)
        if code != 0:
            raise BuildError(f"the image cannot be copied: {said}", hint="free some space")
        # What is used is what was checked, also when the file was exchanged meanwhile.
        self._require_size(await asyncio.to_thread(check_qcow2, target))
        if self._spec.seed is not None:
            await make_seed(self.out / "seed.img", self._spec.seed, self._work / "seed")

    def _require_size(self, size: int) -> None:
        """What VMs may write is counted by `image.size`."""
        if size > size_bytes(self._spec.size):
            problem = f"its disk has {size >> 20} MiB, more than image.size, {self._spec.size}"
            raise refused(self._path, problem, f"set image.size: {-(-size >> 20)}MiB")

    async def _check(self) -> None:
        command = ["qemu-img", "check", "-q", "-f", "qcow2", str(self._path)]
        code, said = await ended(command, self._work)
        if "another process" in said:
            raise refused(self._path, "a VM uses it", "shut that VM down, or give a copy")
        if code not in (0, _LEAKS):
            hint = "repair a copy: qemu-img check -r all COPY"
            raise refused(self._path, f"it is broken: {said or f'exit code {code}'}", hint)


async def make_seed(target: Path, seed: SeedSpec, folder: Path) -> None:
    """Make cloud-init's NoCloud file system: FAT, with the label that it looks for.

    Source: cloud-init's reference of the datasource NoCloud. Raises BuildError.
    """
    files = {
        "user-data": seed.user_data,
        "meta-data": seed.meta_data,
        "network-config": seed.network_config,
    }
    await asyncio.to_thread(folder.mkdir)
    size = _SEED_ROOM
    for name, text in files.items():
        if text:
            await asyncio.to_thread((folder / name).write_text, text)
            size += len(text.encode()) // 1024 + 1
    await fat.make_fat(target, "CIDATA", size, folder)
