"""The QEMU program: where it is, and its version, asked again only when the file has changed."""

from __future__ import annotations

import shutil

from templated.drivers.host.files import Stamp, stamp
from templated.drivers.hypervisor.qemu import accel
from templated.model.generation import QemuVersion


class Program:
    """A program by its path, or by its name in PATH."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._path: str | None = None
        self._version: tuple[Stamp | None, QemuVersion] | None = None

    @property
    def path(self) -> str:
        """Where it is; its bare name when it is nowhere in PATH."""
        return shutil.which(self._binary) or self._binary

    async def version(self) -> QemuVersion:
        """Path and version; HostError when it is missing or is no QEMU."""
        present = self._stamp()
        if self._version is None or self._version[0] != present:
            self._version = (present, await accel.qemu_version(self.path))
        return self._version[1]

    def is_version(self, version: str) -> bool:
        """Whether it is known to be of this version. Costs a stat."""
        if self._version is None or self._version[0] != self._stamp():
            return False
        return self._version[1].version == version

    @property
    def known_version(self) -> str:
        """The version that was found out last; empty before."""
        return self._version[1].version if self._version else ""

    def _stamp(self) -> Stamp | None:
        # Asked on each start: PATH is searched only when the program is not where it was.
        found = stamp(self._path) if self._path else None
        if found is None:
            self._path = shutil.which(self._binary)
            found = stamp(self._path) if self._path else None
        return found
