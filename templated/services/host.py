"""What this host offers: its QEMU, and the accelerator that really runs a guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from templated.drivers.hypervisor.qemu import accel
from templated.drivers.image.store import Image
from templated.errors import HostError
from templated.model.config import Config
from templated.model.generation import QemuVersion


class Host:
    """Facts that cost time to find out, found out once."""

    def __init__(self, config: Config, state_dir: Path) -> None:
        self._config = config
        self.proof_cache = state_dir / "kvm-proof.json"
        self._proving = asyncio.Lock()
        self._path: str | None = None
        self._version: tuple[tuple[int, int] | None, QemuVersion] | None = None

    async def qemu(self) -> QemuVersion:
        """QEMU's version, asked again only when the binary has changed; HostError without one."""
        stamp = self._qemu_stamp()
        if self._version is None or self._version[0] != stamp:
            binary = shutil.which(self._config.qemu) or self._config.qemu
            self._version = (stamp, await accel.qemu_version(binary))
        return self._version[1]

    def qemu_is(self, version: str) -> bool:
        """Whether the binary is known to be of this version. Costs a few stat calls."""
        if self._version is None or self._version[0] != self._qemu_stamp():
            return False
        return self._version[1].version == version

    def _qemu_stamp(self) -> tuple[int, int] | None:
        # Asked on each start: PATH is searched only when the program is not where it was.
        stamp = _stamp(self._path)
        if stamp is None:
            self._path = shutil.which(self._config.qemu)
            stamp = _stamp(self._path)
        return stamp

    async def accelerator(self, image: Image) -> str:
        """`kvm` or `tcg`, as configured; `auto` takes KVM only when a guest runs under it.

        HostError when KVM is demanded and not there. The proof runs once and is remembered.
        """
        if self._config.accel == "tcg":
            return "tcg"
        reason = accel.kvm_opens()
        if self._config.accel == "kvm":
            if reason:
                raise HostError(
                    f"accel is kvm, but {reason}",
                    hint="load the module, or set accel: auto",
                )
            return "kvm"
        if reason:
            return "tcg"
        async with self._proving:
            version = await self.qemu()
            proof = accel.recall(self.proof_cache, version.version)
            if proof is None:
                proof = await accel.prove_kvm(
                    self._config.qemu,
                    version.version,
                    image.kernel,
                    image.initrd,
                    self.proof_cache,
                )
        return "kvm" if proof.works else "tcg"

    def known_accelerator(self) -> str:
        """What is known without running anything, for display."""
        if self._config.accel != "auto":
            return self._config.accel
        version = self._version[1].version if self._version else ""
        proof = accel.recall(self.proof_cache, version)
        if accel.kvm_opens() or (proof is not None and not proof.works):
            return "tcg"
        return "kvm" if proof is not None else "auto (not proven yet)"


def _stamp(path: str | None) -> tuple[int, int] | None:
    if path is not None:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
    return None
